"""Rank models by log p(x) on the same data, with paired differences and their standard errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvae.evaluation.result import Evaluation, mean_and_error

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Models ranked by mean log p(x), best first.

    Args:
        table: one row a model: log p(x), its standard error over data, what it is, difference to
            the best, standard error of that difference over the same data, share of data with
            failing k-hat, active units; nats per datum.
        space: the observation space that all share.
        num_data: N.
    """

    table: "pd.DataFrame"
    space: str
    num_data: int

    @property
    def caution(self) -> str:
        """What the ranking does not say."""
        notes = []
        if len(set(self.table["what it is"])) > 1:
            notes.append("a lower bound may be below its model's log p(x), an exact value is not")
        if (self.table["k-hat too high (%)"] > 0).any():
            notes.append("where k-hat is too high, log p(x) may lie well above the bound")
        return "; ".join(notes)

    def __repr__(self) -> str:
        table = self.table.to_string(float_format="{:.2f}".format, na_rep="")
        return f"{self._title}\n{table}" + (f"\nNote: {self.caution}." if self.caution else "")

    def _repr_html_(self) -> str:
        table = self.table.to_html(float_format="{:.2f}".format, na_rep="")
        note = f"<p>Note: {self.caution}.</p>" if self.caution else ""
        return f"<p>{self._title}</p>{table}{note}"

    @property
    def _title(self) -> str:
        return f"log p(x), nats per datum, {self.num_data} data of {self.space}"


def compare(results: Mapping[str, Evaluation]) -> Comparison:
    """Compare evaluations of several models on the same data.

    Args:
        results: evaluations by the name to show.

    Returns:
        Comparison. Differences are paired by datum, so that what makes a datum hard for all models
        cancels.

    Raises:
        ValueError: for no result, or results in different observation spaces or on different data,
            whose log-probabilities mean different things.
    """
    if not isinstance(results, Mapping):
        raise TypeError(
            "`compare` takes evaluations by name, such as {'VAE': a, 'mixture': b}; got "
            f"{type(results).__name__}."
        )
    if not results:
        raise ValueError("`compare` needs at least one evaluation, by name.")
    for name, result in results.items():
        if not isinstance(result, Evaluation):
            raise TypeError(
                f"`compare` takes what `evaluate` returns; {name!r} is {type(result).__name__}."
            )
    _check_same_data(results)
    ranked = sorted(results, key=lambda name: -float(results[name].log_p.mean()))
    best = results[ranked[0]]
    import pandas as pd

    rows = []
    for name in ranked:
        result = results[name]
        mean, error = mean_and_error(result.log_p)
        difference, error_of_difference = mean_and_error(result.log_p - best.log_p)
        units = ", ".join(f"{count} of {unit}" for unit, count in result.active_units.items())
        rows.append(
            {
                "model": name,
                "log p(x)": mean,
                "se": error,
                "what it is": result.kind,
                "difference": difference,
                "se of difference": error_of_difference,
                "k-hat too high (%)": math.nan if result.is_exact else 100 * result.failing,
                "active units": units,
            }
        )
    table = pd.DataFrame(rows).set_index("model")
    return Comparison(table, best.spec.space(), best.log_p.size)


def _check_same_data(results: Mapping[str, Evaluation]) -> None:
    (first, one), *others = results.items()
    for name, other in others:
        if one.spec.space() != other.spec.space():
            raise ValueError(
                f"{first!r} and {name!r} cannot be compared: they are evaluated in different "
                f"observation spaces, {one.spec.space()} against {other.spec.space()}. "
                "Probabilities of bits and densities of grey levels are different quantities; "
                "evaluate both on the same data."
            )
        if one.measure != other.measure:
            raise ValueError(
                f"{first!r} and {name!r} cannot be compared: p(x) is a {one.measure} under the one "
                f"and a {other.measure} under the other, and the two have different units. Declare "
                "observed sites that are both discrete, or both continuous."
            )
        if one.fingerprint != other.fingerprint:
            raise ValueError(
                f"{first!r} and {name!r} cannot be compared: they are evaluated on different data "
                f"({one.log_p.size} of split {one.spec.split!r} against {other.log_p.size} of "
                f"{other.spec.split!r}). Evaluate both on the same data."
            )
