"""The variational autoencoder of counts, such as the RNA molecules of each gene that a cell shows.

z ~ N(0, I),    x | z ~ Poisson(f(z)) or NegativeBinomial(r, f(z)),    q(z | x) = N, as in `vae`

A Poisson's variance is its mean m. Real counts vary more: the negative binomial is a Poisson whose
rate is itself a draw, of a Gamma, so that its variance is m + m^2 / r, with an r learned for each
dimension (Lopez et al. 2018, scVI). As r grows it becomes the Poisson. The guide reads log(1 + x),
as scVI's does. Left out is scVI's factor for the sum of a cell's counts: z has to tell it.
"""

from typing import Any, Literal

from pyro.distributions import NegativeBinomial, Normal, Poisson

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import MLP, Log1p


def count_vae(
    data_size: int = 784,
    latent_size: int = 10,
    hidden: tuple[int, ...] = (200, 200),
    counts: Literal["poisson", "negative binomial"] = "negative binomial",
) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = Poisson or NegativeBinomial; q(z | x) = N(mu(x), sigma(x)^2)."""
    kinds: dict[str, dict[str, Any]] = {
        "poisson": {"distribution": Poisson},
        "negative binomial": {
            "distribution": NegativeBinomial,
            "total_count": Learned(1.0, data_size),
        },
    }
    if counts not in kinds:
        raise ValueError(f"`counts` must be one of {', '.join(kinds)}; got {counts!r}.")
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(shape=data_size, given="z", net=MLP(*hidden), **kinds[counts]),
        guide={"z": Latent(Normal, latent_size, given="x", net=Log1p(MLP(*hidden)))},
        name="count_vae",
    )
