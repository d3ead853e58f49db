"""Probabilistic principal component analysis (Tipping & Bishop 1999): the linear VAE.

z ~ N(0, I),    x | z ~ N(W z + b, sigma^2 I)

log p(x) and p(z | x) are known in closed form (`pvae.exact`), so every bound can be held against
the truth. The guide has the posterior's mean in its family, and its spread up to rotations of z.

Fitted by SVI like any declared model, or in closed form (`pvae.fit_ppca(...).to_model()`).
"""

from pyro.distributions import Normal

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import Linear


def ppca(data_size: int = 784, latent_size: int = 50) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = N(W z + b, sigma^2 I); q(z | x) = N(V x + c, diag s^2)."""
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Normal, data_size, given="z", net=Linear(), scale=Learned(0.1)),
        guide={
            "z": Latent(
                Normal, latent_size, given="x", net=Linear(), scale=Learned(0.1, latent_size)
            )
        },
        name="ppca",
    )
