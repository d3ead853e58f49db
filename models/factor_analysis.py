"""Factor analysis: PPCA with a noise of its own for each element of x (Rubin & Thayer 1982).

z ~ N(0, I),    x | z ~ N(W z + b, diag sigma^2)

log p(x) and p(z | x) are known in closed form (`pvae.exact`). PPCA explains variance, and so
depends on the unit in which each element is measured; this explains what elements share, and gives
the rest to sigma: rescaled data give the same factors.

Fitted by SVI like any declared model, or by `pvae.fit_factor_analysis(...).to_model()`.
"""

from pyro.distributions import Normal

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import Linear


def factor_analysis(data_size: int = 784, latent_size: int = 50) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = N(W z + b, diag sigma^2); q(z | x) = N(V x + c, diag s^2)."""
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Normal, data_size, given="z", net=Linear(), scale=Learned(0.1, data_size)),
        guide={
            "z": Latent(
                Normal, latent_size, given="x", net=Linear(), scale=Learned(0.1, latent_size)
            )
        },
        name="factor_analysis",
    )
