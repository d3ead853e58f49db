"""Deterministic autoencoders: PCA in closed form, and a deep one by gradient steps.

    data (N, *event)  --fit_pca, fit_autoencoder-->  Autoencoder  --encode-->  z  --decode-->  x

Both minimise the squared error of x -> z -> x. PCA does it over affine maps (Pearson 1901; Bourlard
& Kamp 1988), the deep one over networks (Hinton & Salakhutdinov 2006, "Reducing the dimensionality
of data with neural networks"). Neither has a p(z) to draw from, nor a p(x | z): there is no p(x),
and nothing to hold against the log p(x) of a VAE but reconstructions and interpolations.

The loop is `pvae.fit`, as for any pair: the squared error is -log N(x; decode(encode(x)), 1/2) but
for a constant. The autoencoder is no `LatentModel` with a tiny noise, which would have a p(x), of
no meaning, and codes that are random.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pvae.baselines.linear_gaussian import scatter
from pvae.baselines.rows import as_rows, mean
from pvae.data import Data
from pvae.fence import evaluating
from pvae.nets import MLP, Input, Linear, Net

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Autoencoder", "fit_autoencoder", "fit_pca"]


class Autoencoder(nn.Module):
    """x -> z -> x without noise. Its verbs mean what they mean for a declared model.

    Args:
        encoder: the net from x to z.
        decoder: the net from z to x.
        event_shape: the shape of a datum.
        latent_size: Q, the size of z.
        name: what tables call it.
    """

    why_no_log_p = "deterministic: no p(x)"  # for tables that have log p(x) of others
    history: "pd.DataFrame | None" = None

    def __init__(
        self,
        encoder: Net,
        decoder: Net,
        event_shape: tuple[int, ...],
        latent_size: int,
        name: str = "autoencoder",
    ):
        super().__init__()
        self.name, self.event_shape, self.latent_size = name, tuple(event_shape), latent_size
        self.encoder = encoder.build([Input(self.event_shape)], {"z": (latent_size,)})
        self.decoder = decoder.build([Input((latent_size,))], {"x": self.event_shape})

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a batch (N, *event); differentiable."""
        return self.decoder(self.encoder(x)["z"])["x"]

    def encode(self, data: Any) -> dict[str, Tensor]:
        """The codes z of data (N, *event), (N, Q).

        Raises:
            ValueError: for data of another shape, or not finite.
        """
        with evaluating(self):
            return self.encoder(self._batch(data))

    def decode(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """x at codes z (S, Q) of your choosing, (S, *event).

        Raises:
            ValueError: for codes of another shape.
        """
        z = values["z"]
        if z.shape[-1:] != (self.latent_size,):
            raise ValueError(
                f"Codes of {self.name!r} must have shape (S, {self.latent_size}), "
                f"got {tuple(z.shape)}."
            )
        with evaluating(self):
            return self.decoder(z.to(next(self.parameters())))

    def reconstruct(self, data: Any) -> dict[str, Tensor]:
        """x decoded from the codes of data (N, *event), (N, *event).

        Raises:
            ValueError: for data of another shape, or not finite.
        """
        return self.decode(self.encode(data))

    def interpolate(self, start: Any, end: Any, steps: int = 10) -> dict[str, Tensor]:
        """Decode points on the line between the codes of two data, or of two batches pairwise.

        Args:
            start: (N, *event).
            end: (N, *event).
            steps: number of points, both ends included.

        Returns:
            x, (steps, N, *event).

        Raises:
            ValueError: for fewer than 2 steps, or batches of different sizes.
        """
        if steps < 2:
            raise ValueError(f"`steps` must be at least 2, both ends included, got {steps}.")
        first, last = self.encode(start)["z"], self.encode(end)["z"]
        if len(first) != len(last):
            raise ValueError(
                f"`start` and `end` need as many data as each other, got {len(first)} and "
                f"{len(last)}."
            )
        t = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)[:, None, None]
        return self.decode({"z": (1 - t) * first + t * last})

    @property
    def model(self) -> NoReturn:
        """Raises TypeError, so that `evaluate`, which looks for it, tells why there is no p(x)."""
        raise TypeError(
            f"{self.name!r} is a deterministic autoencoder: it has no p(z) and no p(x | z), so it "
            "has no p(x), and neither log p(x) nor a bound can be given. Compare reconstructions "
            "and interpolations; for log p(x), give z a prior and x a noise: pvae.fit_ppca instead "
            "of PCA, pvae.models.gaussian_vae instead of an autoencoder."
        )

    def _batch(self, data: Any) -> Tensor:
        values = _complete(data).realised().values
        if tuple(values.shape[1:]) != self.event_shape:
            raise ValueError(
                f"Data for {self.name!r} must have shape (N, "
                f"{', '.join(map(str, self.event_shape))}), got {tuple(values.shape)}."
            )
        return values.to(next(self.parameters()))


class _Training(nn.Module):
    """An autoencoder as a pair of Pyro programs whose log-weight is -|x - x̂|², plus a constant."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def model(self, x: Tensor) -> None:
        pyro.module("autoencoder", self.autoencoder)
        with pyro.plate("data", len(x), dim=-1):
            reconstruction = Normal(self.autoencoder(x), math.sqrt(0.5))
            pyro.sample("x", reconstruction.to_event(x.dim() - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is random."""


def fit_autoencoder(
    data: Any, latent_size: int, net: Net | None = None, *, seed: int = 0, **settings: Any
) -> Autoencoder:
    """Fit a deep autoencoder by gradient steps on the squared error.

    Args:
        data: `Data`, tensor or array (N, *event).
        latent_size: Q, the size of z.
        net: the encoder, whose mirror image is the decoder; `MLP(200, 200)` if left out.
        seed: of the initial weights and of batches.
        **settings: as of `pvae.fit`: epochs, batch_size, lr, validation, patience, device, ...

    Returns:
        Autoencoder, whose `history` has the mean squared error |x - x̂|² of a datum by epoch.

    Raises:
        ValueError: as `pvae.fit`, and for data with missing entries.
    """
    from pvae.pyro_pair import PyroPair
    from pvae.svi import fit

    net = MLP(200, 200) if net is None else net
    observed = _complete(data)
    if isinstance(validation := settings.get("validation"), Data):
        _complete(validation)
    shape = tuple(observed.values.shape[1:])
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's as well
        autoencoder = Autoencoder(net, net.mirrored(), shape, latent_size)
    autoencoder.to(observed.values.dtype)
    programs = _Training(autoencoder)
    pair = PyroPair(programs.model, programs.guide, name="autoencoder")
    history = fit(pair, observed, None, seed=seed, **settings).history
    constant = math.prod(shape) / 2 * math.log(math.pi)
    bounds = history.filter(regex="^(train|valid)$")
    autoencoder.history = history[["step"]].join(-bounds - constant)
    return autoencoder


def _complete(data: Any) -> Data:
    """Data of which no entry is missing; others are refused as by every baseline."""
    observed = Data.of(data)
    as_rows(observed.subset(slice(1)))
    return observed


def fit_pca(data: Any, latent_size: int) -> Autoencoder:
    """Fit PCA: z = Uᵀ (x - μ), x̂ = U z + μ, U the leading eigenvectors of the data's covariance.

    Args:
        data: `Data`, tensor or array (N, *event).
        latent_size: Q, the number of components; the first varies most.

    Returns:
        Autoencoder, linear, of the data's floating type and on its device. Each column of U has its
        largest element positive, so that the signs are the same everywhere.

    Raises:
        ValueError: unless 1 <= Q <= D, or for data that are not finite or fewer than 2.
    """
    observed = Data.of(data)
    x = as_rows(observed)
    N, D = x.shape
    if not 1 <= latent_size <= D:
        raise ValueError(
            f"`latent_size` must be at least 1 and at most the {D} elements of a datum, "
            f"got {latent_size}."
        )
    if N < 2:
        raise ValueError(f"PCA needs at least 2 data, got {N}: one has no variance.")
    mu = mean(x)
    U = torch.linalg.eigh(scatter(x, mu)).eigenvectors.flip(1)[:, :latent_size]
    U = U * U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    shape = tuple(observed.values.shape[1:])
    with torch.random.fork_rng([]):
        pca = Autoencoder(Linear(), Linear(), shape, latent_size, name="pca").to(x)
    values = {"encoder": (U.T, -U.T @ mu), "decoder": (U, mu)}
    with torch.no_grad():
        for part, affine in values.items():
            for parameter, value in zip(pca.get_submodule(part).parameters(), affine, strict=True):
                parameter.copy_(value)
    return pca
