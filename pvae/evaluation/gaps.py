"""Where the gap between log p(x) and the ELBO comes from (Cremer, Li & Duvenaud 2018, section 3).

    log p(x) - L[q]  =  (log p(x) - L[q*])   +   (L[q*] - L[q])
                        approximation gap        amortisation gap

q* is the best of the guide's family on one datum, found by gradient steps on its own variational
parameters. Steps may stop short of it, which makes the one gap too wide by what the other lacks;
and where log p(x) is a lower bound, the approximation gap is too narrow by what that misses.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pvae.data import DataSpec
from pvae.evaluation.agreement import estimate, mean_and_error, pooled_error
from pvae.evaluation.comparable import check_comparable, why_other_model
from pvae.evaluation.evaluate import evaluate
from pvae.evaluation.result import Evaluation
from pvae.evaluation.shown import Shown
from pvae.pair import Pair, check_amortised, check_pair
from pvae.refinement import Refine

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Gaps", "gaps"]

STEPS = Refine(300, 16, 0.05, "ELBO")
ROWS = {
    "log p(x)": "",
    "L[q*]": "ELBO of the best guide found for each datum",
    "L[q]": "ELBO of the guide",
    "approximation": "log p(x) less L[q*]: what the guide's family cannot say",
    "amortisation": "L[q*] less L[q]: what its network does not find",
}


@dataclass(frozen=True, repr=False)
class Gaps(Shown):
    """The two gaps between log p(x) and the ELBO, for N data; all in nats.

    Args:
        model: name of the model.
        spec: what the data are.
        kind: what log p(x) is: "exact", or a lower bound.
        steps: gradient steps towards q*.
        per_datum: xarray Dataset over `datum`: `log p(x)`, `L[q*]`, `L[q]`, `approximation` and
            `amortisation`; beside each its standard error over draws, `..._se`.
        seconds: time it took.
    """

    model: str
    spec: DataSpec
    kind: str
    steps: int
    per_datum: "xr.Dataset"
    seconds: float

    def summary(self) -> "pd.DataFrame":
        """Means over data with standard errors over data and over draws, one row each."""
        import pandas as pd

        rows = []
        for name, what in ROWS.items():
            error = pooled_error(self.per_datum[f"{name}_se"])
            rows.append((name, *mean_and_error(self.per_datum[name]), error, what or self.kind))
        columns = ["", "value", "se (data)", "se (draws)", "what it is"]
        return pd.DataFrame(rows, columns=columns).set_index("")

    @property
    def verdict(self) -> str:
        """Which gap is the wider, and what that rests on."""
        of_family, of_network = (
            round(float(self.per_datum[name].mean()), 2) + 0.0  # no -0.00
            for name in ("approximation", "amortisation")
        )
        said = (
            f"Of {of_family + of_network:.2f} nats between log p(x) and the ELBO, "
            f"{of_network:.2f} are the network's (a better encoder would gain them) and "
            f"{of_family:.2f} the family's (a richer guide would)"
        )
        if self.kind == "exact":
            return f"{said}, as far as {self.steps} steps find the best guide of the family."
        return (
            f"{said}, as far as {self.steps} steps find the best guide of the family; log p(x) is "
            "a lower bound here, and the family's share at least this but for those steps."
        )

    @property
    def title(self) -> str:
        """One line: model, data, and how they were looked at."""
        size = self.per_datum.sizes["datum"]
        return f"{self.model} on {size} data of {self.spec.space()}; nats per datum"


def gaps(
    model: Pair,
    data: Any,
    num_particles: int = 1000,
    *,
    log_p: Evaluation | None = None,
    refine: Refine = STEPS,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> Gaps:
    """Tell what the guide's family loses from what its network loses, datum by datum.

    Args:
        model: `LatentModel` or `PyroPair` with latents that the guide draws.
        data: (N, *event), or columns by name.
        num_particles: draws of each ELBO; and K of log p(x), where that is estimated here.
        log_p: an evaluation of the same data whose log p(x) to take, such as that of `ais`. Left
            out, it is exact where that is known, and otherwise L_K of a refined guide.
        refine: how to find q*, by its ELBO.
        seed: of the draws.
        device: where to run; "auto" is CUDA where there is one.
        compile: see `evaluate`.
        progress: show bars.

    Returns:
        Gaps, in nats.

    Raises:
        ValueError: for a model whose latents are all summed out, another bound than the ELBO, or
            an evaluation of other data.
    """
    began = time.perf_counter()
    check_pair(model)
    check_amortised(model, "`gaps`")
    if log_p is not None and not isinstance(log_p, Evaluation):
        raise TypeError(f"`log_p` must be what `evaluate` or `ais` returns, got {log_p!r}.")
    if refine.bound != "ELBO":
        raise ValueError(f"`refine` must climb the ELBO, whose gaps these are; got {refine}.")
    settings: dict[str, Any] = {"device": device, "compile": compile, "progress": progress}

    def bounds(proposal: str | Refine, number: int) -> Evaluation:
        return evaluate(
            model, data, num_particles, grid=[1], proposal=proposal, seed=seed + number, **settings
        )

    guide = bounds("guide", 0)
    if not guide.num_particles:
        raise ValueError(
            f"log p(x) of {guide.model!r} is a sum over every latent: it has no guide, and no gaps."
        )
    best = bounds(refine, 1)
    if log_p is None:
        log_p = guide if guide.is_exact else bounds("refined", 2)
    check_comparable("the model", guide, "`log_p`", log_p)
    if reason := why_other_model(guide, log_p):
        raise ValueError(f"`log_p` is no evaluation of this model: {reason}.")
    return Gaps(
        model=guide.model,
        spec=guide.spec,
        kind=log_p.kind,
        steps=refine.steps,
        per_datum=_per_datum(guide, best, log_p),
        seconds=time.perf_counter() - began,
    )


def _per_datum(guide: Evaluation, best: Evaluation, log_p: Evaluation) -> "xr.Dataset":
    import xarray as xr

    value, error = log_p.log_p.values, _error(log_p)
    columns: dict[str, tuple[Any, Any]] = {"log p(x)": (value, error)}
    for name, result in (("L[q*]", best), ("L[q]", guide)):
        found = result.per_datum.sel(particles=1)
        columns[name] = found["bound"].values, found["bound_se"].values
    for name, (high, low) in {
        "approximation": ("log p(x)", "L[q*]"),
        "amortisation": ("L[q*]", "L[q]"),
    }.items():
        errors = columns[high][1] ** 2 + columns[low][1] ** 2
        columns[name] = columns[high][0] - columns[low][0], errors**0.5
    named = {name: ("datum", pair[0]) for name, pair in columns.items()}
    return xr.Dataset(named | {f"{n}_se": ("datum", pair[1]) for n, pair in columns.items()})


def _error(log_p: Evaluation) -> Any:
    """Over draws, by datum: none of an exact value."""
    if log_p.is_exact:
        return 0.0 * log_p.log_p.values
    return estimate(log_p.per_datum)[1].values
