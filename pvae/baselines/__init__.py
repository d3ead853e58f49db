"""Exact baselines to compare a deep model with: log p(x) is known, so there is no bound to report.

data (N, *event)  --fit_em, fit_ppca-->  parameters  --log_prob-->  (N,), nats
"""

from pvae.baselines.mixture_of_gaussians import GaussianMixture, fit_em
from pvae.baselines.ppca import ProbabilisticPCA, fit_ppca

__all__ = ["GaussianMixture", "ProbabilisticPCA", "fit_em", "fit_ppca"]
