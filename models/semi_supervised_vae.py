"""The semi-supervised VAE (Kingma, Mohamed, Rezende & Welling 2014, M2): some data are labelled.

y ~ Categorical(pi),    z ~ N(0, I),    x | z, y ~ Bernoulli(f(z, y))
q(z | x, y) = N(mu(x, y), diag sigma(x, y)^2), in which a label that is missing is no category

Data are columns x and y, y NaN where there is no label. The bound is of log p(x, y) where there is
one, and elsewhere of log p(x), with y summed out exactly:

    p(x) = sum_y p(y) E_p(z)[p(x | z, y)]

So there is no q(y | x) to be learned, nor a term that weighs its errors: the paper's classifier is
the model's own p(y | x), by `pvae.impute(model, {"x": x, "y": y}).probabilities["y"]`. Where few
data have labels, repeat those: else the likelihood of the others decides what y stands for.
"""

from pyro.distributions import Bernoulli, Categorical, Normal

from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


def semi_supervised_vae(
    data_size: int = 784,
    categories: int = 10,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
) -> LatentModel:
    """p(y) uniform, p(z) = N(0, I), p(x | z, y) = Bernoulli; q(z | x, y) = N, y perhaps missing."""
    return LatentModel(
        y=Observed(Categorical, categories, missing=True),
        z=Latent(Normal, latent_size),
        x=Observed(Bernoulli, data_size, given=("z", "y"), net=MLP(*hidden)),
        guide={"z": Latent(Normal, latent_size, given=("x", "y"), net=MLP(*hidden))},
        name="semi_supervised_vae",
    )
