"""Rank models by log p(x) on the same data, with paired differences and their standard errors."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.evaluation.agreement import Agreement, counted, estimate, mean_and_error
from pvae.evaluation.comparable import check_comparable, why_other_model
from pvae.evaluation.result import Evaluation
from pvae.evaluation.rows import BITS, NATS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Models ranked by mean log p(x), best first.

    Args:
        table: one row a model: log p(x), its standard error over data, what it is, difference to
            the best, standard error of that difference over the same data, share of data with
            failing k-hat, active units.
        space: the observation space that all share.
        num_data: N.
        unit: of log p(x), "nats per datum" or "bits per dimension".
        caution: what the ranking does not say.
        of: what p is of, such as "x | y"; see `Evaluation`.
    """

    table: "pd.DataFrame"
    space: str
    num_data: int
    unit: str
    caution: str
    of: str = "x"

    def __repr__(self) -> str:
        table = self.table.to_string(float_format=self._format, na_rep="")
        return f"{self._title}\n{table}" + (f"\nNote: {self.caution}." if self.caution else "")

    def _repr_html_(self) -> str:
        table = self.table.to_html(float_format=self._format, na_rep="")
        note = f"<p>Note: {self.caution}.</p>" if self.caution else ""
        return f"<p>{self._title}</p>{table}{note}"

    @property
    def _format(self) -> Callable[[float], str]:
        return ("{:.2f}" if self.unit == NATS else "{:.4f}").format

    @property
    def _title(self) -> str:
        return f"log p({self.of}), {self.unit}, {counted(self.num_data, 'datum')} of {self.space}"


def compare(results: Mapping[str, Any], bits: bool = False) -> Comparison:
    """Compare evaluations of several models on the same data.

    Args:
        results: evaluations by the name to show; a deterministic autoencoder may stand in place of
            one, is shown last, and without a log p(x).
        bits: give log-probabilities in bits per dimension instead of nats per datum.

    Returns:
        Comparison. Differences are paired by datum, so that what makes a datum hard for all models
        cancels. A bound is put above an exact value only if the difference is beyond twice its
        standard error.

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
    whys = {name: result.why_no_log_p for name, result in results.items() if _is_silent(result)}
    results = {name: result for name, result in results.items() if name not in whys}
    if not results:
        raise ValueError("`compare` needs at least one evaluation: none of these has a p(x).")
    for name, result in results.items():
        if not isinstance(result, Evaluation):
            raise TypeError(
                f"`compare` takes what `evaluate` returns; {name!r} is {type(result).__name__}."
            )
    (first, one), *others = results.items()
    for name, other in others:
        check_comparable(first, one, name, other)
    import pandas as pd

    ranked = _ranked(results)
    best = next(iter(ranked.values()))
    factor = 1 / (math.log(2) * best.dimensions) if bits else 1.0
    rows = [{"model": name} | _row(result, best, factor) for name, result in ranked.items()]
    rows += [{"model": name, "what it is": why, "active units": ""} for name, why in whys.items()]
    return Comparison(
        table=pd.DataFrame(rows).set_index("model"),
        space=best.spec.space(),
        num_data=best.log_p.size,
        unit=BITS if bits else NATS,
        caution="; ".join(_notes(ranked)),
        of=best.of,
    )


def _is_silent(result: Any) -> bool:
    """Whether it is a deterministic baseline, which tells why it has no log p(x)."""
    return hasattr(result, "why_no_log_p")


def _ranked(results: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Best mean first; an exact value goes before bounds that lead by less than their error."""
    names = sorted(results, key=lambda name: -float(results[name].log_p.mean()))
    for place, name in enumerate(names):
        while (
            place
            and results[name].is_exact
            and not _leads(results[names[place - 1]], results[name])
        ):
            names[place - 1 : place + 1] = name, names[place - 1]
            place -= 1
    return {name: results[name] for name in names}


def _leads(one: Evaluation, exact: Evaluation) -> bool:
    """Whether an evaluation with the higher mean may be said to beat an exact value."""
    lead = Agreement.of((exact.log_p, np.zeros(exact.log_p.size)), estimate(one.per_datum))
    return one.is_exact or lead.mean[0] > 2 * lead.error_of_mean


def _row(result: Evaluation, best: Evaluation, factor: float) -> dict[str, Any]:
    mean, error = mean_and_error(result.log_p)
    difference, error_of_difference = mean_and_error(result.log_p - best.log_p)
    units = ", ".join(f"{count} of {unit}" for unit, count in result.active_units.items())
    return {
        f"log p({result.of})": factor * mean,
        "se": factor * error,
        "what it is": result.kind + _doubt(result),
        "difference": factor * difference,
        "se of difference": factor * error_of_difference,
        "k-hat too high (%)": math.nan if result.is_exact else 100 * result.failing,
        "active units": units,
    }


def _doubt(result: Evaluation) -> str:
    """What k-hat says against a bound, or that it says nothing for or against it."""
    if _doubted(result):
        return ", doubted by k-hat"
    unknown = not result.is_exact and math.isnan(result.failing)
    return ", k-hat unknown" if unknown else ""


def _doubted(result: Evaluation) -> bool:
    return not result.is_exact and result.failing > 0


def _notes(ranked: Mapping[str, Evaluation]) -> list[str]:
    """What the ranking does not say."""
    notes = []
    if len({result.is_exact for result in ranked.values()}) > 1:
        notes.append("a lower bound may be below its model's log p(x), an exact value is not")
    if any(map(_doubted, ranked.values())):
        notes.append("where k-hat is too high, log p(x) may lie well above the bound")
    pairs = [
        (f"{name!r} and its check", result, result.check)
        for name, result in ranked.items()
        if result.check is not None
    ]
    pairs += [
        (f"{name!r} and {other_name!r}{_if_of_one_model(one, other)}", one, other)
        for (name, one), (other_name, other) in itertools.combinations(ranked.items(), 2)
        if _may_be_one_model(one, other)
    ]
    for names, one, other in pairs:
        if not (agreement := Agreement.between(one, other)).agrees:
            notes.append(
                f"{names} disagree beyond error: the latter puts log p(x) {agreement.told()}, and "
                "of the two bounds the lower is loose"
            )
    return notes


def _may_be_one_model(one: Evaluation, other: Evaluation) -> bool:
    """As far as names, parameters and exact values tell; drawn from different proposals."""
    drawn = "bound" in one.per_datum and "bound" in other.per_datum
    return drawn and one.proposal != other.proposal and not why_other_model(one, other)


def _if_of_one_model(one: Evaluation, other: Evaluation) -> str:
    """The condition of what follows; none where parameters tell that it is met."""
    known = one.parameters and other.parameters
    return "" if known else ", if they are of one model,"
