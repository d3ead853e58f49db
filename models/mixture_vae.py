"""The VAE whose prior is a mixture of Gaussians: GMVAE (Dilokthanakul et al. 2016), VaDE (Jiang et
al. 2017).

c ~ Categorical(pi),    z | c ~ N(mu_c, diag sigma_c^2),    x | z ~ Bernoulli(f(z))
q(z | x) = N(mu(x), diag sigma(x)^2); c needs no guide: it is summed out,

    p(z) = sum_c pi_c N(z; mu_c, diag sigma_c^2),    p(c | x, z) = p(c | z), since x sees z alone

VaDE has a q(c | x) in its bound; with c summed out nothing is left there to approximate. Left out
of GMVAE is its further noise w, of which mu_c and sigma_c are networks. A mixture of Gaussians
clusters data where they are; this one clusters them where a network has put them. `model.posterior(
x, 100)["c"]` draws z from q(z | x) and c from p(c | z): of each datum the commonest is its cluster.
"""

import torch
from pyro.distributions import Bernoulli, Categorical, Normal

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import MLP, Table


def mixture_vae(
    data_size: int = 784,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
    num_components: int = 10,
) -> LatentModel:
    """p(c) = Categorical(pi), p(z | c) = N(mu_c, sigma_c^2), p(x | z) = Bernoulli; q(z | x) = N."""
    model = LatentModel(
        c=Latent(Categorical, num_components, logits=Learned(0.0, num_components)),
        z=Latent(Normal, latent_size, given="c", net=Table()),
        x=Observed(Bernoulli, data_size, given="z", net=MLP(*hidden)),
        guide={"z": Latent(Normal, latent_size, given="x", net=MLP(*hidden))},
        name="mixture_vae",
    )
    # Components that start in one place share clusters and stay there, a local maximum.
    model.module_of("z").assign("loc", torch.randn(num_components, latent_size))
    return model
