"""Declare a latent-variable model, fit it, and learn how well log p(x) is known."""

from pvae import bounds, exact, nets, plots
from pvae.baselines import (
    fit_autoencoder,
    fit_em,
    fit_factor_analysis,
    fit_mixture_of_bernoullis,
    fit_mixture_of_factor_analysers,
    fit_pca,
    fit_ppca,
)
from pvae.data import Data, DataSpec, load_data
from pvae.declare import Given, Latent, LatentModel, Learned, Observed, Predicted
from pvae.evaluation import (
    Collapse,
    Comparison,
    Evaluation,
    Gaps,
    Imputation,
    Sandwich,
    ais,
    collapse,
    compare,
    evaluate,
    gaps,
    impute,
    sandwich,
)
from pvae.inference_data import to_datatree, to_elpd
from pvae.objectives import (
    CIWAE,
    CUBO,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TVO,
    Cyclical,
    ForwardKL,
    Renyi,
    ReweightedWakeSleep,
    WarmUp,
)
from pvae.passes import log_weights
from pvae.pyro_pair import PyroPair
from pvae.pyro_svi import from_pyro_svi
from pvae.refinement import Refine, SemiAmortised
from pvae.svi import Fit, fit, load

from pvae import models  # isort: skip  (declared with the names above)

__version__ = "0.1.0"

__all__ = [
    "CIWAE",
    "CUBO",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "TVO",
    "Collapse",
    "Comparison",
    "Cyclical",
    "Data",
    "DataSpec",
    "Evaluation",
    "Fit",
    "ForwardKL",
    "Gaps",
    "Given",
    "Imputation",
    "Latent",
    "LatentModel",
    "Learned",
    "Observed",
    "Predicted",
    "PyroPair",
    "Refine",
    "Renyi",
    "ReweightedWakeSleep",
    "Sandwich",
    "SemiAmortised",
    "WarmUp",
    "ais",
    "bounds",
    "collapse",
    "compare",
    "evaluate",
    "exact",
    "fit",
    "fit_autoencoder",
    "fit_em",
    "fit_factor_analysis",
    "fit_mixture_of_bernoullis",
    "fit_mixture_of_factor_analysers",
    "fit_pca",
    "fit_ppca",
    "from_pyro_svi",
    "gaps",
    "impute",
    "load",
    "load_data",
    "log_weights",
    "models",
    "nets",
    "plots",
    "sandwich",
    "to_datatree",
    "to_elpd",
]
