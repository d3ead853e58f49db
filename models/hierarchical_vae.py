"""Two stochastic layers, as in Burda, Grosse & Salakhutdinov 2016, section 5.

z2 ~ N(0, I),    z1 | z2 ~ N(mu(z2), diag sigma(z2)^2),    x | z1 ~ Bernoulli(f(z1))
q(z1 | x) and q(z2 | z1), both Normal: the guide climbs the layers one by one.
"""

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def hierarchical_vae(
    data_size: int = 784,
    latent_sizes: tuple[int, int] = (100, 50),
    hidden: tuple[int, ...] = (200, 200),
    hidden_top: tuple[int, ...] = (100, 100),
) -> LatentModel:
    """p(z2) = N(0, I), p(z1 | z2) = N, p(x | z1) = Bernoulli; q(z1 | x) q(z2 | z1)."""
    low, top = latent_sizes
    return LatentModel(
        z2=Latent(Normal, top),
        z1=Latent(Normal, low, given="z2", net=MLP(*hidden_top)),
        x=Observed(Bernoulli, data_size, given="z1", net=MLP(*hidden)),
        guide={
            "z1": Latent(Normal, low, given="x", net=MLP(*hidden)),
            "z2": Latent(Normal, top, given="z1", net=MLP(*hidden_top)),
        },
        name="hierarchical_vae",
    )
