"""The ladder VAE: stochastic layers, and a guide that shares the model's way down (Sønderby 2016).

z_L ~ N(0, I),    z_l | z_l+1 ~ N(mu(z_l+1), diag sigma(z_l+1)^2),    x | z_1 ~ Bernoulli(f(z_1))
q(z_L | x) = N(m(x), diag s(x)^2)
q(z_l | x, z_l+1) proportional to p(z_l | z_l+1) N(z_l; m(x), diag s(x)^2)    (eq. 11 to 13)

In `hierarchical_vae` the guide climbs, and z_2 sees of x only what z_1 has kept. Here the top layer
sees x itself, and each layer below is what the layers above expect, by the model's own nets,
corrected by what x says, each weighted by its precision. So q can equal p at no cost, and a layer
begun badly stays unused, its prior ever narrower: warm its KL terms up, as the paper does,
`fit(model, data, pvae.ELBO(beta=pvae.WarmUp(steps)))`. Left out are batch normalisation, and that
the nets that read x are one chain in the paper, from layer to layer; here each reads x by itself.
"""

from functools import partial

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
    rectified = partial(MLP, activation="leaky_relu")
    layers = [(f"z{i}", size) for i, size in enumerate(latent_sizes, start=1)]
    above, top_size = layers[-1]
    sites = {above: Latent(Normal, top_size)}
    guide = {above: Latent(Normal, top_size, given="x", net=rectified(*hidden))}
    for name, size in reversed(layers[:-1]):
        sites[name] = Latent(Normal, size, given=above, net=rectified(*hidden_top))
        guide[name] = Latent(Normal, size, given="x", net=rectified(*hidden), times_prior=True)
        above = name
    x = Observed(Bernoulli, data_size, given=above, net=rectified(*hidden))
    return LatentModel(**sites, x=x, guide=guide, name="ladder_vae")
