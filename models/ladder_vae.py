"""Several stochastic layers, guided from the top down (Sønderby et al. 2016).

z_L ~ N(0, I),    z_l | z_l+1 ~ N(mu(z_l+1), diag sigma(z_l+1)^2),    x | z_1 ~ Bernoulli(f(z_1))
q(z_L | x) and q(z_l | x, z_l+1), all Normal: guide and model draw the layers in one order.

In `hierarchical_vae` the guide climbs, and z_2 sees of x only what z_1 has kept. Here the top layer
sees x itself, and each layer below knows what those above have said. Left out is the paper's
sharing, q(z_l | x, z_l+1) proportional to p(z_l | z_l+1) N(z_l; m(x), diag s(x)^2): the model's own
net, weighted by precision against one that reads x alone. Here one net reads x and z_l+1.
"""

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def ladder_vae(
    data_size: int = 784,
    latent_sizes: tuple[int, ...] = (100, 50),
    hidden: tuple[int, ...] = (200, 200),
    hidden_top: tuple[int, ...] = (100, 100),
) -> LatentModel:
    """p(z_L) = N(0, I), p(z_l | z_l+1) = N, p(x | z_1) = Bernoulli; q from z_L down to z_1."""
    layers = [(f"z{i}", size) for i, size in enumerate(latent_sizes, start=1)]
    above, top_size = layers[-1]
    sites = {above: Latent(Normal, top_size)}
    guide = {above: Latent(Normal, top_size, given="x", net=MLP(*hidden))}
    for name, size in reversed(layers[:-1]):
        sites[name] = Latent(Normal, size, given=above, net=MLP(*hidden_top))
        guide[name] = Latent(Normal, size, given=("x", above), net=MLP(*hidden))
        above = name
    x = Observed(Bernoulli, data_size, given=above, net=MLP(*hidden))
    return LatentModel(**sites, x=x, guide=guide, name="ladder_vae")
