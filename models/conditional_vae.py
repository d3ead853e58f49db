"""The conditional variational autoencoder (Sohn, Lee & Yan 2015): what to generate can be asked.

z ~ N(0, I),    x | z, y ~ Bernoulli(f(z, y)),    q(z | x, y) = N(mu(x, y), diag sigma(x, y)^2)

The label y is given, never modelled: every number is of log p(x | y). As the label tells what x is,
z is left with how it is done (slant, thickness), and one z decoded under every label is one hand
writing all digits. The prior of z takes no label, which the paper allows as a special case.
"""

from pyro.distributions import Bernoulli, Normal

from pvae import Given, Latent, LatentModel, Observed
from pvae.nets import MLP


def conditional_vae(
    data_size: int = 784,
    categories: int = 10,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
) -> LatentModel:
    """p(z) = N(0, I), p(x | z, y) = Bernoulli; q(z | x, y) = N(mu(x, y), diag sigma(x, y)^2)."""
    return LatentModel(
        y=Given((), categories=categories),
        z=Latent(Normal, latent_size),
        x=Observed(Bernoulli, data_size, given=("z", "y"), net=MLP(*hidden)),
        guide={"z": Latent(Normal, latent_size, given=("x", "y"), net=MLP(*hidden))},
        name="conditional_vae",
    )
