"""The variational autoencoder of binary data (Kingma & Welling 2014; the one of Burda et al. 2016).

z ~ N(0, I),    x | z ~ Bernoulli(f(z)),    q(z | x) = N(mu(x), diag sigma(x)^2)
"""

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def vae(
    data_size: int = 784, latent_size: int = 50, hidden: tuple[int, ...] = (200, 200)
) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = Bernoulli; q(z | x) = N(mu(x), diag sigma(x)^2)."""
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Bernoulli, data_size, given="z", net=MLP(*hidden)),
        guide={"z": Latent(Normal, latent_size, given="x", net=MLP(*hidden))},
        name="vae",
    )
