"""Whether two evaluations speak of the same data, so that their difference means something."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.evaluation.agreement import estimate

if TYPE_CHECKING:
    from pvae.evaluation.result import Evaluation

__all__ = ["check_checkable", "check_comparable", "why_other_model"]


def check_comparable(first: str, one: "Evaluation", name: str, other: "Evaluation") -> None:
    """Raise unless both, of these names, are of the same data in the same observation space."""
    if _parts(one.of) != _parts(other.of):
        raise ValueError(
            f"{first!r} and {name!r} cannot be compared: log p({one.of}) and log p({other.of}) are "
            "different quantities. Evaluate both of the same: a label that may be missing is "
            "summed out where it is NaN for all data, which leaves log p(x)."
        )
    space, its_space = one.spec.space(), other.spec.space()
    if space != its_space:
        raise ValueError(
            f"{first!r} and {name!r} cannot be compared: they are evaluated in different "
            f"observation spaces, {space} against {its_space}. {_way_out(one, other)}"
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
    if one.dimensions != other.dimensions:
        raise ValueError(
            f"{first!r} and {name!r} cannot be compared: p(x) is of {one.dimensions:g} numbers a "
            f"datum under the one and of {other.dimensions:g} under the other. Declare models that "
            "observe the same columns."
        )


def _parts(of: str) -> tuple[list[str], int]:
    """What is observed, in any order, and how many columns are given, under whatever name."""
    observed, _, given = of.partition(" | ")
    return sorted(observed.split(", ")), len(given.split(", ")) if given else 0


def _way_out(one: "Evaluation", other: "Evaluation") -> str:
    if (one.spec.name == "tensor") != (other.spec.name == "tensor"):
        return (
            "A slice such as `digits.test[:100]` is bare values, which do not tell what they are; "
            "take `digits.test.subset(slice(100))`, which keeps its specification, for both."
        )
    if replace(one.spec, seed=other.spec.seed).space() == other.spec.space():
        what = "noise" if one.spec.binarisation == "none" else "bits"
        return f"These are other draws of the {what}: evaluate both on the same."
    return (
        "Probabilities of bits and densities of grey levels are different quantities; evaluate "
        "both on the same data."
    )


def check_checkable(one: "Evaluation", other: Any) -> None:
    """Raise unless the other is of the same model and data by other draws, both with errors."""
    if not isinstance(other, type(one)):
        raise TypeError(
            f"`checked_by` takes what `evaluate` or `ais` returns, got {type(other).__name__}."
        )
    if "bound" not in one.per_datum:
        raise ValueError(
            f"log p(x) of {one.model!r} is exact, by summing out every latent: it has no draws "
            "that another evaluation could check."
        )
    check_comparable("the evaluation", one, "its check", other)
    if reason := why_other_model(one, other):
        raise ValueError(
            f"An evaluation is checked by another of the same model; {reason}. `compare` ranks "
            "different models."
        )
    if one.proposal == other.proposal and one.seed == other.seed is not None:
        raise ValueError(
            f"The evaluation and its check are not of independent draws: both are from the "
            f"{one.proposal} with seed {one.seed}. Check by another proposal, or at least another "
            "seed."
        )
    for result in (one, other):
        if np.isnan(estimate(result.per_datum)[1]).all():
            raise ValueError(
                f"A check needs standard errors over draws, and none come with {result.how}: "
                f"evaluate with more {result.sampler}."
            )


def why_other_model(one: "Evaluation", other: "Evaluation") -> str:
    """What shows that two evaluations of the same data are not of one model; "" if nothing does."""
    if one.model != other.model:
        return f"these are of {one.model!r} and {other.model!r}"
    if one.parameters and other.parameters and one.parameters != other.parameters:
        return "the parameters of these two differ"
    if one.is_exact and other.is_exact:
        exact, its_exact = (result.per_datum["exact"].values for result in (one, other))
        if not np.allclose(exact, its_exact, rtol=1e-5, atol=1e-4):
            return f"the exact log p(x) of these two differs, so that {one.model!r} has changed"
    return ""
