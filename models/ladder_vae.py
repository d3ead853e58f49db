"""The ladder VAE: stochastic layers, and a guide that shares the model's way down (Sønderby 2016).

z_L ~ N(0, I),    z_l | z_l+1 ~ N(mu(z_l+1), diag sigma(z_l+1)^2),    x | z_1 ~ Bernoulli(f(z_1))
q(z_L | x) = N(m(x), diag s(x)^2)
q(z_l | x, z_l+1) proportional to p(z_l | z_l+1) N(z_l; m(x), diag s(x)^2)    (eq. 11 to 13)

In `hierarchical_vae` the guide climbs, and z_2 sees of x only what z_1 has kept. Here the top layer
sees x itself, and each layer below is what the layers above expect, by the model's own nets,
corrected by what x says, each weighted by its precision. Left out is that the nets that read x are
one chain in the paper, from layer to layer; here each reads x by itself.
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
    if not latent_sizes:
        raise ValueError("`latent_sizes` needs a number for each layer, got none.")
    layers = [(f"z{i}", size) for i, size in enumerate(latent_sizes, start=1)]
    above, top_size = layers[-1]
    sites = {above: Latent(Normal, top_size)}
    guide = {above: Latent(Normal, top_size, given="x", net=MLP(*hidden))}
    for name, size in reversed(layers[:-1]):
        sites[name] = Latent(Normal, size, given=above, net=MLP(*hidden_top))
        guide[name] = Latent(Normal, size, given="x", net=MLP(*hidden), times_prior=True)
        above = name
    x = Observed(Bernoulli, data_size, given=above, net=MLP(*hidden))
    return LatentModel(**sites, x=x, guide=guide, name="ladder_vae")
