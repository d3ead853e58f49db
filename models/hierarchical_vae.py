"""Stochastic layers one above the other, as in Burda, Grosse & Salakhutdinov 2016, section 5.

z_L ~ N(0, I),    z_l | z_l+1 ~ N(mu(z_l+1), diag sigma(z_l+1)^2),    x | z_1 ~ Bernoulli(f(z_1))
q(z_1 | x) and q(z_l+1 | z_l), all Normal: the guide climbs the layers one by one.
"""

from itertools import pairwise

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def hierarchical_vae(
    data_size: int = 784,
    latent_sizes: tuple[int, ...] = (100, 50),
    hidden: tuple[int, ...] = (200, 200),
    hidden_top: tuple[int, ...] = (100, 100),
) -> LatentModel:
    """p(z_L) = N(0, I), p(z_l | z_l+1) = N, p(x | z_1) = Bernoulli; q from z_1 up to z_L."""
    if not latent_sizes:
        raise ValueError("`latent_sizes` needs a number for each layer, got none.")
    layers = [(f"z{i}", size) for i, size in enumerate(latent_sizes, start=1)]
    (first, low), (above, top) = layers[0], layers[-1]
    sites = {above: Latent(Normal, top)}
    for name, size in reversed(layers[:-1]):
        sites[name] = Latent(Normal, size, given=above, net=MLP(*hidden_top))
        above = name
    guide = {first: Latent(Normal, low, given="x", net=MLP(*hidden))}
    for (below, _), (name, size) in pairwise(layers):
        guide[name] = Latent(Normal, size, given=below, net=MLP(*hidden_top))
    x = Observed(Bernoulli, data_size, given=first, net=MLP(*hidden))
    return LatentModel(**sites, x=x, guide=guide, name="hierarchical_vae")
