"""The mixture of factor analysers, component and factors integrated out: log p(x) is exact.

c ~ Categorical(pi),    z ~ N(0, I),    x | c, z ~ N(mu_c + W_c z, diag psi)

(Ghahramani & Hinton 1996): clusters, each with a plane of its own that data lie along, which is
dimension reduction piece by piece. z is integrated out in closed form, x | c ~ N(mu_c, W_c W_c' +
diag psi), and c is summed out, so that SVI climbs log p(x) itself; with one component it is factor
analysis. `pvae.fit_mixture_of_factor_analysers` fits it by EM and gives p(z | x, c).
"""

from pyro.distributions import Categorical, LowRankMultivariateNormal

from pvae import Latent, LatentModel, Learned, Observed, Predicted
from pvae.nets import Table


def mixture_of_factor_analysers(
    data_size: int = 784, latent_size: int = 10, num_components: int = 10
) -> LatentModel:
    """p(c) = Categorical(pi), p(x | c) = N(mu_c, W_c W_c' + diag psi)."""
    return LatentModel(
        c=Latent(Categorical, num_components, logits=Learned(0.0, num_components)),
        x=Observed(
            LowRankMultivariateNormal,
            data_size,
            given="c",
            net=Table(),
            cov_factor=Predicted(Table(), (data_size, latent_size)),
            cov_diag=Learned(1.0, data_size),
        ),
        name="mixture_of_factor_analysers",
    )
