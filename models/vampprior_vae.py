"""The VAE whose prior is made of its own guide: the VampPrior (Tomczak & Welling 2018).

p(z) = 1/K sum_k q(z | u_k),    x | z ~ Bernoulli(f(z)),    q(z | x) = N(mu(x), diag sigma(x)^2)

Of all priors the aggregate posterior, 1/N sum_n q(z | x_n), makes the ELBO largest, and overfits.
The VampPrior is a short one: K pseudo-inputs u_k, learned, in the place of N data. Declared, k is a
latent of K equal categories that is summed out, and z | k has the guide's distribution at u_k; so
the guide's net is trained by both terms of the bound. As components move with the encoder, none
is left behind where no data are encoded, as can happen to those of `mixture_vae`. By the plain ELBO
it may collapse, all components in one place and z unused: warm its KL terms up, as the paper does,
`fit(model, data, pvae.ELBO(beta=pvae.WarmUp(steps)))`.
`model.module_of("z").pseudo_inputs.values()["x"]` are the u_k: blurred prototypes of the data.
"""

from pyro.distributions import Bernoulli, Categorical, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP
from pvae.priors import PseudoInputs


def vampprior_vae(
    data_size: int = 784,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
    num_components: int = 100,
) -> LatentModel:
    """p(z) = 1/K sum_k q(z | u_k), p(x | z) = Bernoulli; q(z | x) = N(mu(x), diag sigma(x)^2)."""
    net = MLP(*hidden, activation="relu")
    return LatentModel(
        k=Latent(Categorical, num_components),
        z=Latent(Normal, latent_size, given="k", net=PseudoInputs()),
        x=Observed(Bernoulli, data_size, given="z", net=net),
        guide={"z": Latent(Normal, latent_size, given="x", net=net)},
        name="vampprior_vae",
    )
