"""`Evaluation`: what one pass of importance sampling says of log p(x), as labelled arrays."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from pvae.bounds import khat_threshold
from pvae.data import DataSpec
from pvae.evaluation.agreement import counted, estimate, mean_and_error, sentences
from pvae.evaluation.comparable import check_checkable
from pvae.evaluation.rows import COLUMNS, rows_of
from pvae.evaluation.shown import Shown
from pvae.inference_data import evaluation_to_datatree

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Evaluation", "mean_and_error"]


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """log p(x) of N data: bounds from K particles, or the exact value; all in nats.

    Args:
        model: name of the model.
        spec: what the data are.
        measure: what p(x) is: "probability" of discrete x, "density" of continuous x, or "both".
        dimensions: numbers in one x, of all observed sites together; where some were not seen, the
            mean of those that were.
        of: what p is of: "x", or by the sites' names "x, y" or "x | y".
        fingerprint: of the data's values; results are paired only where it is equal.
        num_particles: K; 0 where every latent is summed out and nothing is drawn.
        proposal: where draws are from, such as "guide"; see `evaluate`.
        per_datum: xarray Dataset over `datum`: `bound` and `bound_se` (standard error over draws)
            over `particles`, the grid of K; `khat`; `ess`; `psis`, the estimate from smoothed
            weights; `cubo`, an upper bound in the limit of draws; terms such as `KL[z]`; `exact`,
            where log p(x) is known; `log_jacobian`, what to add for a density of values as
            measured, where they are stored on another scale. Where data have draws of their own
            number, `draws`, and `bound_own` with `bound_own_se`, the bound from all of them.
        per_unit: xarray Dataset: `KL[z]` and `activity[z]`, the variance over data of E_q[z | x],
            for each unit of each guided latent.
        seconds: time it took.
        sampler: "particles" of importance sampling, or "chains" of annealing.
        target_se: standard error over draws that was to be reached for each datum, in nats.
        check: the evaluation that this one is `checked_by`.
        parameters: fingerprint of the model's parameters; "" where it is not known.
        seed: of the draws; None where it is not known.
    """

    model: str
    spec: DataSpec
    measure: str
    dimensions: float
    fingerprint: str
    num_particles: int
    proposal: str
    per_datum: "xr.Dataset"
    per_unit: "xr.Dataset"
    seconds: float
    sampler: Literal["particles", "chains"] = "particles"
    target_se: float | None = None
    check: "Evaluation | None" = None
    parameters: str = ""
    seed: int | None = None
    of: str = "x"

    @property
    def is_exact(self) -> bool:
        """Whether log p(x) is known exactly."""
        return "exact" in self.per_datum

    @property
    def log_p(self) -> "xr.DataArray":
        """The best statement on log p(x) of each datum, (datum,): exact, or the largest L_K."""
        if self.is_exact:
            return self.per_datum["exact"]
        own = self.per_datum.get("bound_own")
        return self.per_datum["bound"][-1] if own is None else own

    @property
    def kind(self) -> str:
        """What `log_p` is: "exact", or "lower bound L_K"."""
        return "exact" if self.is_exact else f"lower bound {self._best}"

    @property
    def fails(self) -> "xr.DataArray":
        """Whether k-hat of a datum is above the threshold of its K, (datum,); NaN is not good."""
        sizes = self.per_datum.get("draws", [self.num_particles])
        limits = np.array([khat_threshold(int(size)) for size in sizes])
        return ~(self.per_datum["khat"] <= limits)

    @property
    def failing(self) -> float:
        """Share of data whose k-hat is above its threshold: importance sampling fails there."""
        khat = self.per_datum.get("khat")
        if khat is None or bool(khat.isnull().all()):
            return math.nan
        return float(self.fails.mean())

    @property
    def not_reached(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Indices of data whose standard error over draws is above `target_se`, or unknown."""
        if self.target_se is None:
            return np.zeros(0, int)
        return (~(np.asarray(estimate(self.per_datum)[1]) <= self.target_se)).nonzero()[0]

    @property
    def active_units(self) -> dict[str, int]:
        """Units with Cov_x(E_q[u]) > 0.01 (Burda et al. 2016), by guided latent."""
        return {
            str(name)[9:-1]: int((value > 0.01).sum())
            for name, value in self.per_unit.items()
            if str(name).startswith("activity[")
        }

    def checked_by(self, other: "Evaluation") -> "Evaluation":
        """The same evaluation, checked by one of the same model and data from other draws.

        A guide that misses a mode of the posterior has good k-hats all the same. Another proposal,
        "defensive" or `ais`, shows it: `summary` and `verdict` then say where it finds log p(x)
        higher by more than four standard errors over draws of both, and what follows.

        Args:
            other: with at least two draws for each datum.

        Raises:
            ValueError: for another model, other data, the same draws, or estimates without an
                error over draws.
        """
        check_checkable(self, other)
        return replace(self, check=other)

    def summary(self, bits: bool = False) -> "pd.DataFrame":
        """Bounds, diagnostics and parts, one row each, as means over data.

        Args:
            bits: give log-probabilities in bits per dimension instead of nats per datum.

        Returns:
            Table with columns value, standard error over data, standard error over draws, unit,
            and what the row is.
        """
        import pandas as pd

        table = pd.DataFrame(rows_of(self, bits), columns=COLUMNS).set_index("")
        table.attrs["data"] = self.spec.space()
        return table

    def to_datatree(self) -> "xr.DataTree":
        """For ArviZ and netCDF; see `inference_data.evaluation_to_datatree`."""
        return evaluation_to_datatree(self)

    @property
    def how(self) -> str:
        """How log p(x) was found."""
        if not self.num_particles:
            return f"log p({self.of}) by summing out every latent"
        proposal = self.proposal.replace("defensive", "defensive mixture")
        fewest, most = self._sizes
        drawn = counted(most, self.sampler[:-1])
        if fewest < most:
            drawn = f"{fewest:,} to {most:,} {self.sampler}"
        return f"{drawn} from the {proposal}"

    @property
    def title(self) -> str:
        """One line: model, data, and how log p(x) was found."""
        data = counted(self.log_p.size, "datum")
        return f"{self.model} on {data} of {self.spec.space()}; {self.how}"

    @property
    def verdict(self) -> str:
        """What may be said of log p(x), in a sentence; and in more, what a check says of it."""
        return " ".join([self._claim(), *sentences(self)])

    def _claim(self) -> str:
        mean, se = mean_and_error(self.log_p)
        value = f"{mean:.2f}{'' if math.isnan(se) else f' +- {se:.2f}'} nats per datum"
        if self.is_exact:
            return f"log p({self.of}) = {value}, exactly computed."
        said = f"log p({self.of}) >= {value} ({self._best}, in expectation)"
        if len(self.not_reached):
            said += (
                f"; {len(self.not_reached)} of {self.log_p.size} data did not reach a standard "
                f"error of {self.target_se:g} nats"
            )
        if math.isnan(self.failing):
            return f"{said}; too few {self.sampler} for k-hat."
        if self.failing > 0:
            return (
                f"{said}; k-hat is too high for {100 * self.failing:.0f} % of the data, where log "
                f"p({self.of}) may lie well above."
            )
        return f"{said}; k-hat raises no doubt of the draws for any datum."

    @property
    def _sizes(self) -> tuple[int, int]:
        """The fewest draws and the most that a datum has."""
        draws = self.per_datum.get("draws", np.array(self.num_particles))
        return int(draws.min()), int(draws.max())

    @property
    def _best(self) -> str:
        fewest, most = self._sizes
        return (
            self.label(most) if fewest == most else f"L_K, K by datum from {fewest:,} to {most:,}"
        )

    def label(self, size: int) -> str:
        """What the bound of a number of draws is called."""
        if self.sampler == "chains":
            return f"AIS, {counted(size, 'chain')}"
        return "ELBO" if size == 1 and self.proposal == "guide" else f"L_{size}"
