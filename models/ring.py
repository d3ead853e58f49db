"""The tutorial's ring (Doersch 2016, figure 2): a normal cloud made into a circle by a fixed map.

z ~ N(0, I_2),    x | z ~ N(g(z), sigma^2 I),    g(z) = z / 10 + z / ||z||

Any distribution is a function of a normal one, so N(0, I) is prior enough. The decoder is known and
only the guide is learned: what a bound lacks of log p(x), known by quadrature (`pvae.exact`), is
its fault. The posterior is a wedge from the origin outwards, which no Normal is: the ELBO has the
guide lie inside it, IWAE has it cover the whole.
"""

from pyro.distributions import Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP, Ring


def ring(sigma: float = 0.1, hidden: tuple[int, ...] = (50, 50)) -> LatentModel:
    """p(z) = N(0, I_2), p(x | z) = N(z / 10 + z / ||z||, sigma^2 I); q(z | x) = N."""
    return LatentModel(
        z=Latent(Normal, 2),
        x=Observed(Normal, 2, given="z", net=Ring(), scale=sigma),
        guide={"z": Latent(Normal, 2, given="x", net=MLP(*hidden))},
        name="ring",
    )
