"""Models whose log p(x) is known without pvae: what every estimator in the tests is held against.

    truth.log_prob(x)        (N,), nats, float64, by a formula written here or by scipy
    truth.sample(num_data)   x of the model, (N, *event)
    truth.model(x), truth.guide(x)   Pyro programs, where the model has a guide worth having
    truth.declared()         the same model as a `LatentModel`, in float64 (scales are binary
                             fractions, since declared constants pass through float32)

Nothing here imports `pvae.exact`, which is one of the things tested.
"""

from tests.exact.discrete import GuidedCoin, TwoCategoricals
from tests.exact.linear_gaussian import LinearGaussian, TwoLayers
from tests.exact.mixtures import GaussianMixture, LinearMixture
from tests.exact.nonlinear import Ring, Square

__all__ = [
    "GaussianMixture",
    "GuidedCoin",
    "LinearGaussian",
    "LinearMixture",
    "Ring",
    "Square",
    "TwoCategoricals",
    "TwoLayers",
]
