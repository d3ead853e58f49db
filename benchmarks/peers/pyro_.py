"""Pyro: SVI with `Trace_ELBO`, and for K > 1 with `RenyiELBO(alpha=0)`, its IWAE, vectorised.

Validation is off. Pyro sums the loss over the batch where the others average, so Adam's epsilon is
larger by the batch size: then it makes the same steps. Fused, it is as fast as `ClippedAdam`.
"""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from benchmarks import inputs
from benchmarks.peers.pytorch import mlp
from benchmarks.peers.training import LR, Training

__all__ = ["JOBS"]


class VAE(nn.Module):
    """Model and guide over a batch (N, 784)."""

    def __init__(self, latent: int):
        super().__init__()
        layers = inputs.layers(latent)
        self.latent = latent
        self.encoder, self.decoder = mlp(layers["encoder"]), mlp(layers["decoder"])

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Steps(Training):
    """`SVI.step`, batch by batch."""

    def __init__(self, *given: Any, objective: type[Trace_ELBO] = Trace_ELBO, flush: bool = True):
        self.objective, self.flush = objective, flush
        super().__init__(*given)

    def prepare(self) -> None:
        torch.set_flush_denormal(self.flush)
        pyro.enable_validation(False)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.x = torch.from_numpy(self.data).to(self.device)
        vae = VAE(self.latent).to(self.device)
        adam = pyro.optim.Adam({"lr": LR, "eps": 1e-8 * self.batch, "fused": True})
        self.svi = SVI(vae.model, vae.guide, adam, self.loss())

    def loss(self) -> Any:
        if self.particles > 1:
            return RenyiELBO(
                alpha=0,
                num_particles=self.particles,
                vectorize_particles=True,
                max_plate_nesting=1,
            )
        if self.objective is JitTrace_ELBO:
            return JitTrace_ELBO(ignore_jit_warnings=True)
        return self.objective()

    def run(self, batches: np.ndarray) -> np.ndarray:
        indices = torch.from_numpy(batches).to(self.device)
        return np.array([self.svi.step(self.x[index]) for index in indices]) / self.batch


JOBS = {
    ("Pyro SVI", "step"): partial(Steps, flush=False),
    ("Pyro SVI, denormals flushed", "step"): Steps,
    ("Pyro SVI, JitTrace_ELBO", "step"): partial(Steps, objective=JitTrace_ELBO),
}
