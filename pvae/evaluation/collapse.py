"""Posterior collapse: what the latents of a guide tell of x, unit by unit and all together.

    E KL[q(z | x) || p(z)]  =  I(x; z)  +  KL[q(z) || p(z)],    q(z) = E q(z | x)

I is the information between x and z under q(z | x) p(x) of the data, and the second term says how
far the aggregate posterior is from the prior (Hoffman & Johnson 2016). z is all latents that the
guide draws, together; those summed out are left aside. With z_n ~ q(z | x_n) of N data,

    I_lower = E_n log q(z_n | x_n) / ((1 / N) sum_m q(z_n | x_m))              at most log N
    I_upper = E_n log q(z_n | x_n) / ((1 / (N - 1)) sum_{m != n} q(z_n | x_m))

bound the information over the data's source from below (InfoNCE, its critic the guide itself) and
from above (leave one out), in expectation (Poole et al. 2019, section 2). Over the N data alone,
as if there were no others, I_lower has no bias. Active units: Burda et al. 2016.
"""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.data import DataSpec
from pvae.evaluation.aggregate import Drawn, information_bounds, log_others
from pvae.evaluation.result import mean_and_error
from pvae.evaluation.shown import Shown
from pvae.fence import evaluating, fenced, resolve_device
from pvae.pair import Pair, check_amortised, check_pair, placed
from pvae.particles import check_count

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Collapse", "collapse"]

ACTIVE = 0.01  # variance over data of E_q[u] (Burda et al. 2016)
COLLAPSED = 0.01  # nats


@dataclass(frozen=True, repr=False)
class Collapse(Shown):
    """What the latents of a guide tell of N data; all in nats.

    Args:
        model: name of the model.
        spec: what the data are.
        fingerprint: of the data's values.
        num_samples: S, draws of z for each datum.
        per_datum: xarray Dataset over `datum`: `KL`, of all latents together, and `KL[z]` of each
            where there are several; `information_lower` and `information_upper`;
            `aggregate_KL_upper` and `aggregate_KL_lower`, what the information leaves of `KL`, but
            where p(z) depends on the datum. Beside each its standard error over draws, `..._se`.
        per_unit: xarray Dataset: `KL[z]`, its standard error over data `KL_se[z]`, and
            `activity[z]`, the variance over data of E_q[z | x], for each unit of each latent: where
            q and p factorise over units, and where z is of floating point. The attribute `how` of
            a KL is "closed form" or "from draws".
        seconds: time it took.
    """

    model: str
    spec: DataSpec
    fingerprint: str
    num_samples: int
    per_datum: "xr.Dataset"
    per_unit: "xr.Dataset"
    seconds: float

    @property
    def num_data(self) -> int:
        """N."""
        return int(self.per_datum.sizes["datum"])

    @property
    def active_units(self) -> dict[str, int]:
        """Units with Cov_x(E_q[u]) > 0.01 (Burda et al. 2016), by latent."""
        return {name: int(u.sum()) for name, u in self._each("activity", ACTIVE).items()}

    @property
    def collapsed_units(self) -> dict[str, int]:
        """Units of less than 0.01 nats and no activity, by latent whose q and p factorise."""
        active, costly = self._each("activity", ACTIVE), self._each("KL", COLLAPSED)
        return {name: int((~(u | active.get(name, False))).sum()) for name, u in costly.items()}

    def _each(self, what: str, threshold: float) -> dict[str, Any]:
        """Whether it lies above a threshold, by latent and unit."""
        found = {str(name): values for name, values in self.per_unit.items()}
        start = f"{what}["
        return {k[len(start) : -1]: v > threshold for k, v in found.items() if k.startswith(start)}

    @property
    def is_saturated(self) -> bool:
        """Whether `information_lower` is within log 2 of log N, the most that it can be.

        Then a code belongs to less than two of the N data, and the information may be anything
        above: only more data could tell.
        """
        return float(self.per_datum["information_lower"].mean()) > math.log(self.num_data / 2)

    def summary(self) -> "pd.DataFrame":
        """Information, distances and units, one row each.

        Returns:
            Table with columns value, standard error over data, standard error over draws, unit,
            and what the row is.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for name in self.per_datum:
            if not str(name).endswith("_se"):
                mean, se = mean_and_error(self.per_datum[name])
                of_draws = self.per_datum[f"{name}_se"]
                error = float((of_draws**2).sum(skipna=False) ** 0.5) / self.num_data
                label, what = _ROWS.get(str(name), (name, "part of it"))
                what = what.format(f"{math.log(self.num_data):.2f}")
                rows.append((label, mean, se, error, "nats per datum", what))
        for kind, counts in (("active", self.active_units), ("collapsed", self.collapsed_units)):
            for latent, count in counts.items():
                size = self.per_unit.sizes[f"unit of {latent}"]
                what = f"of {size}: variance over data of E_q[{latent} | x] > {ACTIVE}"
                if kind == "collapsed":
                    how = self.per_unit[f"KL[{latent}]"].attrs["how"]
                    what = f"of {size}: not active, and KL < {COLLAPSED} nats ({how})"
                label = f"{kind} units of {latent}"
                rows.append((label, count, math.nan, math.nan, "units", what))
        columns = ["", "value", "se (data)", "se (draws)", "unit", "what it is"]
        table = pd.DataFrame(rows, columns=columns).set_index("")
        table.attrs["data"] = self.spec.space()
        return table

    @property
    def title(self) -> str:
        """One line: model, data, and how many draws."""
        draws = f"{self.num_samples} draw{'s' * (self.num_samples > 1)} of the guide for each"
        return f"{self.model} on {self.num_data} data of {self.spec.space()}; {draws}"

    @property
    def verdict(self) -> str:
        """One sentence: which units carry the KL, and how much of it is information on x."""
        latents = [str(dim).removeprefix("unit of ") for dim in self.per_unit.sizes]
        total = float(self.per_datum["KL"].mean())
        lower, upper = (_told(self.per_datum[f"information_{end}"]) for end in ("lower", "upper"))
        of_prior = "aggregate_KL_upper" in self.per_datum  # then I(x; z) is a part of the KL
        if of_prior and float(self.per_datum["information_upper"].mean()) > total:
            upper = "all of them"
        said = [self._of_units(name) for name in latents]
        said += [f"of {total:.2f} nats in all, at least {lower} and at most {upper} tell of x"]
        if self.is_saturated:
            most = f"log N = {math.log(self.num_data):.2f}"
            said[-1] += f" ({self.num_data} data show {most} at most)"
        return "; ".join(said) + "."

    def _of_units(self, name: str) -> str:
        """How many units of a latent carry its KL, spend it on nothing, or have none."""
        size, kl = self.per_unit.sizes[f"unit of {name}"], self.per_unit.get(f"KL[{name}]")
        if kl is None:
            return f"{self.active_units[name]} of {size} units of {name} are active"
        active = self._each("activity", ACTIVE).get(name, kl > COLLAPSED)
        idle = int(((kl > COLLAPSED) & ~active).sum())
        total, carried = float(kl.sum()), float(kl.where(active, 0.0).sum())
        share = f"{100 * carried / total:.3g} % of its " if total > 0 else "its "
        said = [f"{int(active.sum())} of {size} units of {name} carry {share}{total:.2f} nats"]
        if idle:
            said.append(f"{idle} cost nats but do not move with x (activity below {ACTIVE})")
        rule = f"KL below {COLLAPSED} nats"
        if name in self.active_units:
            rule += f", activity below {ACTIVE}"
        return "; ".join([*said, f"{self.collapsed_units[name]} are collapsed ({rule})"])


_ROWS = {
    "KL": ("KL", "E_x KL[q(z | x) || p(z)] of all guided latents"),
    "information_lower": (
        "I(x; z), at least",
        "lower bound (InfoNCE), at most log N = {}; of these data alone, no bias",
    ),
    "information_upper": ("I(x; z), at most", "upper bound (leave one out)"),
    "aggregate_KL_upper": (
        "KL[q(z) || p(z)], at most",
        "upper bound: KL - lower bound of I; of these data alone, no bias",
    ),
    "aggregate_KL_lower": (
        "KL[q(z) || p(z)], at least",
        "lower bound: KL - upper bound of I; none below zero",
    ),
}


def _told(values: "xr.DataArray") -> str:
    mean, se = mean_and_error(values)
    return f"{mean:.2f}{'' if math.isnan(se) else f' +- {se:.2f}'}"


def collapse(
    model: Pair,
    data: Any,
    num_samples: int = 4,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Collapse:
    """Tell what the guide's latents know of x: KL and activity by unit, information, and its rest.

    The log-density of each of S N draws is computed under the guide at each of the N data. Those
    S N^2 pairs take time (a guide of several layers runs its nets for each), but hardly memory. The
    model is left as it was, and so is the caller's random state.

    Args:
        model: `LatentModel` or `PyroPair`.
        data: (N, *event), or columns by name; noise of a training split is drawn once.
        num_samples: S, draws for each datum.
        seed: of the draws.
        device: where to run; "auto" is CUDA where there is one.
        progress: show a bar.

    Returns:
        Collapse, in nats.

    Raises:
        ValueError: for data that do not fit the model, fewer than two, or a guide that draws no
            latent or has no density of its own for them.
        FloatingPointError: where densities come out as NaN, naming the datum.
    """
    start = time.perf_counter()
    check_pair(model)
    check_amortised(model, "`collapse`")
    check_count("num_samples", num_samples)
    place = resolve_device(device)
    columns = model.columns(data).realised()
    if len(columns) < 2:
        what = "tells data apart by their latents, and needs at least 2"
        raise ValueError(f"`collapse` {what}, got {len(columns)}.")
    with placed(model, columns, place) as on_device, evaluating(model), fenced(seed, place):
        drawn = Drawn(model, on_device, num_samples)
        others = log_others(model, on_device, drawn, progress)
    return Collapse(
        model=model.name,
        spec=columns.main.spec,
        fingerprint=columns.fingerprint(),
        num_samples=num_samples,
        per_datum=_per_datum(drawn, others),
        per_unit=_per_unit(drawn),
        seconds=time.perf_counter() - start,
    )


def _per_datum(drawn: Drawn, others: Tensor) -> "xr.Dataset":
    import xarray as xr

    rows = {name: row for name, row in drawn.rows.items() if row.dim() == 2}
    lower, upper = information_bounds(rows.pop("log_q"), others, rows.pop("noise"))
    rows["information_lower"], rows["information_upper"] = lower, upper
    if drawn.prior_is_fixed:
        rows["aggregate_KL_upper"] = rows["KL"] - lower
        rows["aggregate_KL_lower"] = rows["KL"] - upper
    columns = {}
    for name, value in rows.items():
        if len(drawn.names) == 1 and name.startswith("KL["):
            continue  # it is `KL`
        columns[name] = ("datum", value.mean(0).cpu().numpy())
        error = value.std(0) / math.sqrt(len(value)) if len(value) > 1 else value[0] * math.nan
        columns[f"{name}_se"] = ("datum", error.cpu().numpy())
    return xr.Dataset(columns)


def _per_unit(drawn: Drawn) -> "xr.Dataset":
    import xarray as xr

    rows, found = drawn.rows, {}
    for name in drawn.names:
        dim = f"unit of {name}"
        if (kl := rows.get(f"unit KL[{name}]")) is not None:
            by_datum = kl[0].cpu()
            error = by_datum.std(0) / math.sqrt(len(by_datum))
            how = {"how": drawn.how[name]}
            found[f"KL[{name}]"] = (dim, by_datum.mean(0).numpy(), how)
            found[f"KL_se[{name}]"] = (dim, error.numpy(), how)
        if (halves := rows.get(f"mean[{name}]")) is not None:
            first, second = (halves - halves.mean(1, keepdim=True)).cpu()
            covariance = (first * second).sum(0) / (len(first) - 1)  # their noise cancels
            found[f"activity[{name}]"] = (dim, covariance.numpy(), {})
    return xr.Dataset(found)
