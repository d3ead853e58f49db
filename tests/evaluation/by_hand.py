"""Evaluations whose numbers are written by hand."""

from typing import Any

import numpy as np
import torch
import xarray as xr

from pvae import Evaluation
from pvae.data import Data

SPEC = Data.of(torch.zeros(4, 3)).spec


def bound(
    *log_p: float, se: Any = 0.1, khat: Any = 0.1, K: int = 500, **changes: Any
) -> Evaluation:
    """An evaluation whose largest bound is `log_p`."""
    low = [value - 1 for value in log_p]
    each = np.ones(len(log_p))
    columns = {
        "bound": (("particles", "datum"), [low, list(log_p)]),
        "bound_se": (("particles", "datum"), [se * each, se * each]),
        "khat": ("datum", khat * each),
        "ess": ("datum", 50 * each),
    }
    return evaluation(xr.Dataset(columns, {"particles": [1, K]}), K, **changes)


def adaptive(log_p: list[float], se: list[float], draws: list[int], **changes: Any) -> Evaluation:
    """An evaluation in which each datum has draws of its own number."""
    result = bound(*[value - 0.5 for value in log_p], K=min(draws), **changes)
    result.per_datum["bound_own"] = ("datum", log_p)
    result.per_datum["bound_own_se"] = ("datum", se)
    result.per_datum["draws"] = ("datum", np.array(draws))
    return result


def exact(*log_p: float, **changes: Any) -> Evaluation:
    """An evaluation that knows log p(x), and nothing else."""
    return evaluation(xr.Dataset({"exact": ("datum", list(log_p))}), 0, **changes)


def evaluation(per_datum: xr.Dataset, num_particles: int, **changes: Any) -> Evaluation:
    fields = {
        "model": "model",
        "spec": SPEC,
        "measure": "probability",
        "dimensions": 3,
        "fingerprint": "of X",
        "num_particles": num_particles,
        "proposal": "guide",
        "per_datum": per_datum,
        "per_unit": xr.Dataset(),
        "seconds": 0.0,
    }
    return Evaluation(**{**fields, **changes})
