"""Baselines to compare a deep model with.

data (N, *event)  --fit_em, fit_ppca, ...-->  parameters  --log_prob-->  (N,), nats, exact
data (N, *event)  --fit_pca, fit_autoencoder-->  x -> z -> x, without any p(x)

Where log p(x) is known there is no bound to report; `.to_model()` gives the same parameters to the
declared model, for `pvae.evaluate`.
"""

from pvae.baselines.autoencoder import Autoencoder, fit_autoencoder, fit_pca
from pvae.baselines.factor_analysis import FactorAnalysis, fit_factor_analysis
from pvae.baselines.mixture_of_bernoullis import BernoulliMixture, fit_mixture_of_bernoullis
from pvae.baselines.mixture_of_factor_analysers import (
    MixtureOfFactorAnalysers,
    fit_mixture_of_factor_analysers,
)
from pvae.baselines.mixture_of_gaussians import GaussianMixture, fit_em
from pvae.baselines.ppca import ProbabilisticPCA, fit_ppca

__all__ = [
    "Autoencoder",
    "BernoulliMixture",
    "FactorAnalysis",
    "GaussianMixture",
    "MixtureOfFactorAnalysers",
    "ProbabilisticPCA",
    "fit_autoencoder",
    "fit_em",
    "fit_factor_analysis",
    "fit_mixture_of_bernoullis",
    "fit_mixture_of_factor_analysers",
    "fit_pca",
    "fit_ppca",
]
