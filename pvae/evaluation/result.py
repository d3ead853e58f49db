"""`Evaluation`: what one pass of importance sampling says of log p(x), as labelled arrays."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pvae.bounds import khat_threshold
from pvae.data import DataSpec
from pvae.inference_data import evaluation_to_datatree

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """log p(x) of N data: bounds from K particles, or the exact value; all in nats.

    Args:
        model: name of the model.
        spec: what the data are.
        measure: what p(x) is: "probability" of discrete x, "density" of continuous x, or "both".
        dimensions: numbers in one x, of all observed sites together.
        fingerprint: of the data's values; results are paired only where it is equal.
        num_particles: K; 0 where every latent is summed out and nothing is drawn.
        proposal: "guide" or "prior".
        per_datum: xarray Dataset over `datum`: `bound` and `bound_se` (standard error over draws)
            over `particles`, the grid of K; `khat`; `ess`; `psis`, the estimate from smoothed
            weights; terms such as `KL[z]`; and `exact`, where log p(x) is known.
        per_unit: xarray Dataset: `KL[z]` and `activity[z]`, the variance over data of E_q[z | x],
            for each unit of each guided latent.
        seconds: time it took.
        sampler: "particles" of importance sampling, or "chains" of annealing.
    """

    model: str
    spec: DataSpec
    measure: str
    dimensions: int
    fingerprint: str
    num_particles: int
    proposal: str
    per_datum: "xr.Dataset"
    per_unit: "xr.Dataset"
    seconds: float
    sampler: Literal["particles", "chains"] = "particles"

    @property
    def is_exact(self) -> bool:
        """Whether log p(x) is known exactly."""
        return "exact" in self.per_datum

    @property
    def log_p(self) -> "xr.DataArray":
        """The best statement on log p(x) of each datum, (datum,): exact, or the largest L_K."""
        return self.per_datum["exact"] if self.is_exact else self.per_datum["bound"][-1]

    @property
    def kind(self) -> str:
        """What `log_p` is: "exact", or "lower bound L_K"."""
        return "exact" if self.is_exact else f"lower bound {self._label(self.num_particles)}"

    @property
    def failing(self) -> float:
        """Share of data whose k-hat is above its threshold: importance sampling fails there."""
        khat = self.per_datum.get("khat")
        if khat is None or bool(khat.isnull().all()):
            return math.nan
        return float((~(khat <= khat_threshold(self.num_particles))).mean())  # NaN is not good

    @property
    def active_units(self) -> dict[str, int]:
        """Units with Cov_x(E_q[u]) > 0.01 (Burda et al. 2016), by guided latent."""
        return {
            str(name)[9:-1]: int((value > 0.01).sum())
            for name, value in self.per_unit.items()
            if str(name).startswith("activity[")
        }

    def summary(self, bits: bool = False) -> "pd.DataFrame":
        """Bounds, diagnostics and parts, one row each, as means over data.

        Args:
            bits: give log-probabilities in bits per dimension instead of nats per datum.

        Returns:
            Table with columns value, standard error over data, standard error over draws, unit,
            and what the row is.
        """
        import pandas as pd

        unit = "bits per dimension" if bits else "nats per datum"
        factor = 1 / (math.log(2) * self.dimensions) if bits else 1.0
        rows = [
            *self._bound_rows(factor, unit),
            *self._diagnostic_rows(),
            *self._part_rows(factor, unit),
        ]
        columns = ["", "value", "se (data)", "se (draws)", "unit", "what it is"]
        table = pd.DataFrame(rows, columns=columns).set_index("")
        table.attrs["data"] = self.spec.space()
        return table

    def _bound_rows(self, factor: float, unit: str) -> list[tuple[Any, ...]]:
        rows = []
        if "bound" in self.per_datum:
            for size in self.per_datum.particles.values:
                bound = self.per_datum["bound"].sel(particles=size)
                draws = self.per_datum["bound_se"].sel(particles=size)
                error = float((draws**2).sum(skipna=False) ** 0.5 / len(draws))
                mean, se = mean_and_error(bound)
                rows.append(
                    (
                        self._label(size),
                        factor * mean,
                        factor * se,
                        factor * error,
                        unit,
                        "lower bound",
                    )
                )
        if "psis" in self.per_datum and not math.isnan(self.failing):
            mean, se = mean_and_error(self.per_datum["psis"])
            what = "estimate, largest weights smoothed (PSIS)"
            rows.append(("PSIS", factor * mean, factor * se, math.nan, unit, what))
        if self.is_exact:
            mean, se = mean_and_error(self.per_datum["exact"])
            rows.append(("log p(x)", factor * mean, factor * se, 0.0, unit, "exact"))
        return rows

    def _diagnostic_rows(self) -> list[tuple[Any, ...]]:
        if "khat" not in self.per_datum:
            return []
        khat, ess = self.per_datum["khat"], self.per_datum["ess"]
        rows = [("ESS", float(ess.median()), math.nan, math.nan, self.sampler, "median over data")]
        if math.isnan(self.failing):
            return rows
        failing = f"share of data with k-hat above {khat_threshold(self.num_particles):.2f}"
        return [
            ("k-hat", float(khat.median()), math.nan, math.nan, "", "median over data"),
            ("k-hat too high", 100 * self.failing, math.nan, math.nan, "%", failing),
            *rows,
        ]

    def _part_rows(self, factor: float, unit: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        if "acceptance" in self.per_datum:
            accepted = float(self.per_datum["acceptance"].mean())
            what = "of proposals, mean over data"
            rows.append(("acceptance", accepted, math.nan, math.nan, "", what))
        for name in self.per_datum.data_vars:
            if str(name).startswith(("KL[", "reconstruction[")):
                mean, se = mean_and_error(self.per_datum[name])
                row = (
                    name,
                    factor * mean,
                    factor * se,
                    math.nan,
                    unit,
                    "part of the ELBO, few draws",
                )
                rows.append(row)
        for name, active in self.active_units.items():
            total = self.per_unit[f"activity[{name}]"].size
            what = f"of {total}: variance over data of E_q[{name} | x] > 0.01"
            rows.append((f"active units of {name}", active, math.nan, math.nan, "units", what))
        return rows

    def to_datatree(self) -> "xr.DataTree":
        """For ArviZ and netCDF; see `inference_data.evaluation_to_datatree`."""
        return evaluation_to_datatree(self)

    @property
    def title(self) -> str:
        """One line: model, data, and how log p(x) was found."""
        how = "log p(x) by summing out every latent"
        if self.num_particles:
            how = f"{self.num_particles} {self.sampler} from the {self.proposal}"
        return f"{self.model} on {len(self.log_p)} data of {self.spec.space()}; {how}"

    @property
    def verdict(self) -> str:
        """One sentence on what may be said of log p(x)."""
        mean, se = mean_and_error(self.log_p)
        value = f"{mean:.2f}{'' if math.isnan(se) else f' +- {se:.2f}'} nats per datum"
        if self.is_exact:
            return f"log p(x) = {value}, exactly computed."
        said = f"log p(x) >= {value} ({self._label(self.num_particles)}, in expectation)"
        if math.isnan(self.failing):
            return f"{said}; too few {self.sampler} for k-hat."
        if self.failing > 0:
            return (
                f"{said}; k-hat is too high for {100 * self.failing:.0f} % of the data, where log "
                "p(x) may lie well above."
            )
        return f"{said}; k-hat raises no doubt of the draws for any datum."

    def _label(self, size: int) -> str:
        if self.sampler == "chains":
            return f"AIS, {size} chain{'s' if size > 1 else ''}"
        return "ELBO" if size == 1 and self.proposal == "guide" else f"L_{size}"

    def __repr__(self) -> str:
        table = self.summary().to_string(float_format="{:.3f}".format, na_rep="")
        return f"{self.title}\n{table}\n{self.verdict}"

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format="{:.3f}".format, na_rep="")
        return f"<p>{self.title}</p>{table}<p>{self.verdict}</p>"


def mean_and_error(values: "xr.DataArray") -> tuple[float, float]:
    """Mean over data and its standard error, NaN for a single datum or an infinite mean."""
    mean, size = float(values.mean()), values.size
    if size == 1 or math.isinf(mean):
        return mean, math.nan
    return mean, float(values.std(ddof=1)) / math.sqrt(size)
