"""Whether two peers did the same work: their results, compared before their times are.

    check of pvae, check of a peer  -->  (equal or not, in words)

Noise differs between libraries, so losses and bounds are equal in law only: the mean of their
paired differences lies within 4.5 standard errors of zero.
"""

import math
import statistics
from typing import Any

__all__ = ["compare"]

STANDARD_ERRORS = 4.5
PARTS = 8  # losses of neighbouring steps depend on each other, the means of so many parts hardly
RELATIVE = 1e-4  # of log-likelihoods, which have no noise


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[bool, str]:
    """Compare what `check` of two jobs returned. What has nothing to compare is equal."""
    for name, unit in (("losses", "nats per datum"), ("bounds", "nats")):
        if name in ours and name in theirs:
            return _paired(ours[name], theirs[name], f"{name}, {unit}")
    if "log_likelihood" in ours and "log_likelihood" in theirs:
        a, b = ours["log_likelihood"], theirs["log_likelihood"]
        equal = math.isclose(a, b, rel_tol=RELATIVE)
        return equal, f"log-likelihoods {a:.6g} and {b:.6g}"
    return True, "nothing to compare"


def _paired(ours: list[float], theirs: list[float], what: str) -> tuple[bool, str]:
    differences = [a - b for a, b in zip(ours, theirs, strict=False)]
    if not all(map(math.isfinite, differences)):
        return False, f"{what}: not finite"
    if len(differences) > PARTS:
        differences = _means_of_parts(differences)
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    text = f"{what}: {statistics.fmean(ours):.3f}, difference {mean:.3f} ± {error:.3f}"
    return abs(mean) <= STANDARD_ERRORS * error, text


def _means_of_parts(values: list[float]) -> list[float]:
    size = len(values) // PARTS
    return [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(PARTS)]
