"""pythae: `VAE.get_nll`, without gradients, in the batch size that suits it best.

It goes through one datum at a time, and returns log p(x) in spite of its name.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor

from benchmarks import inputs
from benchmarks.peers.pytorch import mlp

__all__ = ["JOBS"]

LATENT = 50
PASSES = (5, 10, 25)  # a datum's draws are cut into so many batches; the fastest is taken


class Encoder(BaseEncoder):
    """q(z | x), whose log covariance is twice the logarithm of the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(inputs.layers(LATENT)["encoder"])

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_scale = self.net(x).chunk(2, dim=-1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    """p(x | z): pythae takes probabilities, not logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(inputs.layers(LATENT)["decoder"])

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z).sigmoid())


class Evaluate:
    """log p(x) of a few data: enough to time, for its time grows with their number."""

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        torch.set_flush_denormal(True)
        torch.manual_seed(0)
        config = VAEConfig(input_dim=(inputs.SIZE,), latent_dim=LATENT, reconstruction_loss="bce")
        self.vae = VAE(config, encoder=Encoder(), decoder=Decoder()).to(device).eval()
        self.x = torch.from_numpy(inputs.load(folder, "bits", sizes["num_data"])).to(device)
        self.few = sizes["few"]
        self.particles = sizes["particles"]

    def check(self) -> dict[str, Any]:
        sizes = [self.particles // passes for passes in PASSES]  # which divide K
        times = {size: self.seconds(size) for size in sizes * 2}
        self.batch_size = min(times, key=times.__getitem__)
        bounds = [self.log_p(x[None], self.batch_size) for x in self.x[: 4 * self.few]]
        return {"bounds": bounds}

    def time(self) -> float:
        return self.seconds(self.batch_size) / (self.few * self.particles)

    def seconds(self, batch_size: int) -> float:
        start = time.perf_counter()
        value = self.log_p(self.x[: self.few], batch_size)
        if not math.isfinite(value):
            raise FloatingPointError(f"pythae's log p(x) is {value}.")
        return time.perf_counter() - start

    def log_p(self, x: Tensor, batch_size: int) -> float:
        with torch.no_grad():
            return float(self.vae.get_nll(x, n_samples=self.particles, batch_size=batch_size))


JOBS = {("pythae get_nll", "evaluate"): Evaluate}
