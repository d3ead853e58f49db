"""The mixture of Bernoullis, its component summed out: log p(x) is exact.

c ~ Categorical(pi),    x_d | c ~ Bernoulli(p_cd), independent given c

Fitted by SVI like any declared model, or by EM (`pvae.fit_mixture_of_bernoullis(...).to_model()`;
Bishop 2006, section 9.3.3).
"""

from pyro.distributions import Bernoulli, Categorical

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import Table


def mixture_of_bernoullis(data_size: int = 784, num_components: int = 10) -> LatentModel:
    """p(c) = Categorical(pi), p(x | c) = Bernoulli(p_c)."""
    return LatentModel(
        c=Latent(Categorical, num_components, logits=Learned(0.0, num_components)),
        x=Observed(Bernoulli, data_size, given="c", net=Table()),
        name="mixture_of_bernoullis",
    )
