"""The variational autoencoder of categorical latents (Jang, Gu & Poole 2017), not relaxed.

c_m ~ Categorical(1/K), m = 1..M,    x | c_1..c_M ~ Bernoulli(f(c_1, ..., c_M))

A net reads all categories together, one-hot. Their K^M combinations can be summed out where M is
small: log p(x) is exact, and no gradient has noise from drawing. Where M is large, a guide
q(c | x) = prod_m Categorical(c_m; pi_m(x)) draws them, and learns by the score function as in
`sigmoid_belief_network`. Both are the same model, of the same decoder.
"""

from typing import Any

from pyro.distributions import Bernoulli, Categorical

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def categorical_vae(
    data_size: int = 784,
    num_latents: int = 2,
    categories: int = 10,
    hidden: tuple[int, ...] = (200, 200),
    guided: bool = False,
) -> LatentModel:
    """p(c_m) = Categorical(1/K), p(x | c_1..c_M) = Bernoulli; c summed out, or q(c | x)."""
    if guided:
        shape = (num_latents, categories)
        return LatentModel(
            c=Latent(Categorical, shape),
            x=Observed(Bernoulli, data_size, given="c", net=MLP(*hidden)),
            guide={"c": Latent(Categorical, shape, given="x", net=MLP(*hidden))},
            name="categorical_vae",
        )
    names = [f"c{m}" for m in range(1, num_latents + 1)]
    sites: dict[str, Any] = {name: Latent(Categorical, categories) for name in names}
    x = Observed(Bernoulli, data_size, given=names, net=MLP(*hidden))
    return LatentModel(**sites, x=x, name="categorical_vae")
