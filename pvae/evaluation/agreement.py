"""Two estimates of log p(x) of the same data: where one lies above the other beyond error.

A guide that misses a mode of the posterior has perfect weights wherever it draws. Only another
proposal shows it, by a log p(x) that differs by more than the draws explain. Both are lower bounds
in expectation, so that where they differ the lower one is loose.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

    from pvae.evaluation.result import Evaluation

__all__ = [
    "ROUNDING",
    "Agreement",
    "counted",
    "estimate",
    "mean_and_error",
    "nats_apart",
    "pooled_error",
    "sentences",
]

BEYOND = 4.0  # standard errors
CHANCE = 0.01  # share of data that are beyond it at times, where few draws have skewed weights
ROUNDING = 1e-6  # of log p(x), a sum in float32


@dataclass(frozen=True)
class Agreement:
    """How far a second estimate of log p(x) lies above a first one, datum by datum; in nats.

    Args:
        difference: second less first, (N,).
        error: its standard error over draws, by the delta method, of both estimates, (N,).
    """

    difference: Any
    error: Any

    @classmethod
    def between(cls, first: "Evaluation", second: "Evaluation") -> "Agreement":
        """Of what both estimate from draws."""
        return cls.of(estimate(first.per_datum), estimate(second.per_datum))

    @classmethod
    def with_exact(cls, result: "Evaluation") -> "Agreement":
        """Of an evaluation's bound with its exact value."""
        exact = result.per_datum["exact"]
        return cls.of(estimate(result.per_datum), (exact, np.zeros_like(exact)))

    @classmethod
    def of(cls, *estimates: tuple[Any, Any]) -> "Agreement":
        """Of two estimates with their standard errors."""
        (first, first_error), (second, second_error) = np.asarray(estimates)
        size = np.maximum(abs(first), abs(second))
        rounding = ROUNDING * np.where(size < math.inf, size, 0.0)
        with np.errstate(invalid="ignore"):  # both may be -inf
            difference = np.where(first == second, 0.0, second - first)
        error = (first_error**2 + second_error**2 + rounding**2) ** 0.5
        return cls(difference, error)

    @property
    def higher(self) -> Any:
        """Where the second is above the first beyond error, (N,)."""
        return (self.difference > BEYOND * self.error) | (self.difference == math.inf)

    @property
    def lower(self) -> Any:
        """Where it is below beyond error, (N,)."""
        return (self.difference < -BEYOND * self.error) | (self.difference == -math.inf)

    @property
    def mean(self) -> tuple[float, float, float]:
        """The difference in the mean over data, its paired error over data, and that over draws."""
        return *mean_and_error(self.difference), pooled_error(self.error)

    @property
    def error_of_mean(self) -> float:
        """The larger of both errors of the mean; infinite where none is known."""
        known = [error for error in self.mean[1:] if not math.isnan(error)]
        return max(known, default=math.inf)

    @property
    def in_the_mean(self) -> int:
        """1 where the mean of the second is higher beyond error, -1 lower, 0 neither."""
        mean = self.mean[0]
        told = math.isinf(mean) or abs(mean) > BEYOND * self.error_of_mean
        return (1 if mean > 0 else -1) if told else 0

    @property
    def agrees(self) -> bool:
        """Whether no more data differ beyond error than by chance, nor does the mean."""
        shares = (self.higher.mean(), self.lower.mean())
        return max(shares) <= CHANCE and not self.in_the_mean

    def told(self) -> str:
        """Where the second is higher or lower, "higher for 3 of 10 data (by 0.69 nats) and ..."."""
        apart = nats_apart(self.mean[0], self.error_of_mean, places=3)
        if self.agrees:
            within = (~(self.higher | self.lower)).sum()
            return (
                f"within {BEYOND:.0f} standard errors for {within} of {self.higher.size} data and "
                f"in the mean over data ({apart.removeprefix('by ')} apart)"
            )
        parts = []
        for word, where in (("higher", self.higher), ("lower", self.lower)):
            if where.any():
                by = nats_apart(self.difference[where].mean())
                parts.append(f"{word} for {where.sum()} of {where.size} data ({by})")
        if self.in_the_mean:
            word = "higher" if self.in_the_mean > 0 else "lower"
            parts.append(f"{word} in the mean over data ({apart})")
        return " and ".join(parts)


def estimate(per_datum: "xr.Dataset") -> tuple[Any, Any]:
    """The largest bound of each datum with its standard error over draws; else the exact value."""
    if "bound_own" in per_datum:
        return per_datum["bound_own"], per_datum["bound_own_se"]
    if "bound" in per_datum:
        return per_datum["bound"][-1], per_datum["bound_se"][-1]
    return per_datum["exact"], np.zeros_like(per_datum["exact"])


def mean_and_error(values: Any) -> tuple[float, float]:
    """Mean over data and its standard error, NaN for a single datum or an infinite mean."""
    mean, size = float(values.mean()), values.size
    if size == 1 or math.isinf(mean):
        return mean, math.nan
    return mean, float(values.std(ddof=1)) / math.sqrt(size)


def pooled_error(errors: Any) -> float:
    """Standard error over draws of a mean over data, whose draws are independent."""
    return float(np.sqrt((np.asarray(errors) ** 2).sum()) / errors.size)


def nats_apart(difference: float, error: float = math.inf, places: int = 2) -> str:
    """By how much two log-probabilities differ, and its error where that is known: in words."""
    if math.isinf(difference):
        return "infinitely"
    known = "" if math.isinf(error) else f" +- {error:.{places}f}"
    return f"by {abs(difference):.{places}f}{known} nats"


def counted(number: int, noun: str) -> str:
    """Such as "1 particle" and "2 data"."""
    several = f"{noun[:-2]}a" if noun.endswith("datum") else f"{noun}s"
    return f"{number} {noun if number == 1 else several}"


def sentences(result: "Evaluation") -> list[str]:
    """What a checked evaluation says of its draws, against the check and the exact value."""
    if result.check is None:
        return []
    found = [_of_check(result, result.check)]
    if result.is_exact:
        exact = Agreement.with_exact(result)
        bound = f"the bound of {result.how}"
        found.append(
            f"The exact log p(x) agrees with {bound}, {exact.told()}."
            if exact.agrees
            else f"The exact log p(x) is {exact.told()} than {bound}."
        )
    return found


def _of_check(result: "Evaluation", check: "Evaluation") -> str:
    agreement = Agreement.between(result, check)
    if agreement.agrees:
        return f"{check.how} agree, {agreement.told()}; what both miss would not show."
    said = f"But {check.how} put log p(x) {agreement.told()}"
    if agreement.higher.mean() > CHANCE:
        return f"{said}; {_looseness(result, agreement.higher)}."
    if agreement.in_the_mean > 0:
        return f"{said}; the bound of {result.how} is loose, by less than single data tell."
    return f"{said}; the looser bound is that of the check."


def _looseness(result: "Evaluation", where: Any) -> str:
    """Why the bound is loose there: k-hat cannot see a mode that is never visited."""
    bound = f"the bound of {result.how} is loose there"
    if math.isnan(result.failing):
        return f"{bound}, and draws are too few for k-hat to say so"
    doubted = int((where & result.fails.values).sum())
    if doubted == where.sum():
        return f"{bound}, as k-hat says"
    if doubted:
        return (
            f"k-hat doubts {doubted} of these data; for the others {result.how} miss part of the "
            "posterior, and their bound is loose"
        )
    return (
        f"k-hat doubts none of these data, so {result.how} miss part of the posterior there, and "
        "their bound is loose"
    )
