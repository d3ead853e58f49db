"""PyTorch by hand: the reparameterised bound and Adam, eager or compiled, and bare products.

Validation has no place here, denormals are flushed, and Adam is the fused one. Compiled, loss and
gradient are one graph; the optimiser is either fused or compiled too, whichever is faster.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import inputs
from benchmarks.peers.training import LR, FirstStep, Training

__all__ = ["JOBS", "mlp", "synchronize"]

FLOPS = 2 * (50 * 200 + 200 * 200 + 200 * 784)  # of the decoder's products, a datum and draw
PRODUCT_SIZES = (1024, 2048, 3072)


def mlp(layers: inputs.Layers) -> nn.Sequential:
    """Linear layers of given weights, with tanh between them."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.shape)
        linear.weight.data = torch.from_numpy(weight.T.copy())
        linear.bias.data = torch.from_numpy(bias.copy())
        modules += [linear, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def synchronize(device: str) -> None:
    """Wait for the device, which a clock does not."""
    if device == "cuda":
        torch.cuda.synchronize()


class VAE(nn.Module):
    """784-200-200-50 and back, with the loss of Burda et al. 2016: for K = 1 the ELBO's."""

    def __init__(self, latent: int):
        super().__init__()
        layers = inputs.layers(latent)
        self.encoder, self.decoder = mlp(layers["encoder"]), mlp(layers["decoder"])

    def loss(self, x: Tensor, particles: int) -> Tensor:
        """Minus L_K, mean over the data (N, 784)."""
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        noise = torch.randn(particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_ratio = ((noise.square() - z.square()) / 2 + log_scale).sum(-1)  # log p(z) - log q(z)
        log_w = log_likelihood + log_ratio
        if particles == 1:
            return -log_w.mean()
        return math.log(particles) - log_w.logsumexp(0).mean()


class Step:
    """One step of Adam on the batch at an index; returns its loss.

    Args:
        training: whose sizes, data and device to use.
        loss: `VAE.loss`, or the same compiled, with its gradient.
        fused: whether Adam is the fused one, else it is compiled.
    """

    def __init__(self, training: "Eager", loss: Callable[..., Tensor], fused: bool = True):
        self.x, self.particles, self.loss = training.x, training.particles, loss
        self.model = VAE(training.latent).to(training.device)
        self.first = {name: value.clone() for name, value in self.model.state_dict().items()}
        options: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR, **options)
        self.update = self.optimizer.step if fused else torch.compile(self.optimizer.step)

    def __call__(self, index: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, self.x[index], self.particles)
        loss.backward()
        self.update()
        return loss.detach()

    def restart(self) -> None:
        """Go back to the first weights, keeping what was compiled."""
        self.model.load_state_dict(self.first)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


class Eager(Training):
    """Steps as most people write them."""

    def prepare(self) -> None:
        torch.set_flush_denormal(True)
        torch.manual_seed(0)
        self.x = torch.from_numpy(self.data).to(self.device)
        self.step = self.make()

    def make(self) -> Step:
        """The step at its fastest."""
        return Step(self, VAE.loss)

    def run(self, batches: np.ndarray) -> np.ndarray:
        losses = [self.step(index) for index in torch.from_numpy(batches).to(self.device)]
        return torch.stack(losses).cpu().numpy()


class Compiled(Eager):
    """Loss and gradient compiled. The optimiser is compiled too where that is faster."""

    def make(self) -> Step:
        torch.compiler.reset()
        loss = torch.compile(VAE.loss, dynamic=False)
        step = min((Step(self, loss, fused) for fused in (True, False)), key=self.cost)
        step.restart()
        return step

    def cost(self, step: Step) -> float:
        """Seconds for a few steps, the first of which compiles."""
        batches = torch.from_numpy(inputs.batches(self.num_data, self.batch, 60, 0))
        times = []
        for part in batches.to(self.device).split(10):
            start = time.perf_counter()
            for index in part:
                step(index)
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times)


class CompiledOnce(Compiled):
    """Without the choice, which compiles twice."""

    def make(self) -> Step:
        return Step(self, torch.compile(VAE.loss, dynamic=False))


class Products:
    """The ceiling: the decoder's matrix products at the best rate that a large one reaches."""

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.device = device
        self.factors = [torch.randn(2, n, n, device=device) for n in PRODUCT_SIZES]

    def check(self) -> dict[str, Any]:
        self.time()
        return {}

    def time(self) -> float:
        return FLOPS / max(self.rate(*factor) for factor in self.factors for _ in range(5))

    def rate(self, a: Tensor, b: Tensor) -> float:
        """Floating-point operations a second."""
        synchronize(self.device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(self.device)
        return 2 * len(a) ** 3 / (time.perf_counter() - start)


class Limit:
    """A number of seconds, to hold a time against."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def check(self) -> dict[str, Any]:
        return {}

    def time(self) -> float:
        return self.seconds


JOBS = {
    ("PyTorch", "step"): Eager,
    ("PyTorch", "epoch"): Eager,
    ("PyTorch + torch.compile", "step"): Compiled,
    ("PyTorch + torch.compile", "first step"): lambda *given: FirstStep(CompiledOnce(*given)),
    ("matrix products alone", "evaluate"): Products,
    ("limit of 5 s", "evaluate"): lambda *_: Limit(5.0),
}
