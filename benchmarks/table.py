"""Results as tables: medians, ratios, verdicts, and exponents of growing costs.

Results  --summary-->  plain data for JSON
         --rows-->  markdown, printed and put between two marks in README.md
"""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.driver import Result

__all__ = ["between_marks", "exponent", "growth", "markdown", "ratio", "summary"]

HEAD = ("work", "unit", "pvae", "peer", "peer's", "ratio", "target", "verdict")
SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def ratio(result: Result, peer: str) -> float:
    """Median over rounds of pvae's value to the peer's."""
    pairs = zip(result.values["pvae"], result.values[peer], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def verdict(result: Result, peer: str) -> str:
    """Met or missed, and whether the peer did the same work at all."""
    target = result.targets[peer]
    words = [] if target is None else ["met" if ratio(result, peer) <= target else "**missed**"]
    if not result.checks.get(peer, (True, ""))[0]:
        words.append("**results differ**")
    return ", ".join(words)


def shown(value: float, unit: str) -> str:
    """A value in three digits and a fitting unit."""
    if unit == "MB":
        return f"{value:.0f} MB"
    scale, name = next(((s, n) for s, n in SCALES if value >= s), SCALES[-1])
    digits = max(0, 2 - math.floor(math.log10(value / scale)))
    return f"{value / scale:.{digits}f} {name}"


def rows(result: Result) -> list[tuple[str, ...]]:
    """One row a peer."""
    found = []
    medians = {name: statistics.median(values) for name, values in result.values.items()}
    ours = shown(medians["pvae"], result.unit) if "pvae" in medians else "failed"
    for peer, target in result.targets.items():
        wanted = "" if target is None else f"{target:.3g}"
        row = (result.name, result.unit, ours, peer)
        if peer in medians and "pvae" in medians:
            compared = f"{ratio(result, peer):.2f}", wanted, verdict(result, peer)
            found.append((*row, shown(medians[peer], result.unit), *compared))
        else:
            why = result.failed.get(peer) or result.failed.get("pvae", "")
            found.append((*row, "", "", wanted, re.sub(r"\s+", " ", why).replace("|", "/")[:80]))
    return found


def markdown(results: Iterable[Result]) -> str:
    """The ratio table."""
    return lines(HEAD, [row for result in results for row in rows(result)])


def lines(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """A Markdown table of its cells."""
    rows = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def exponent(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The slope of log value over log size, by least squares: b where cost grows like size ** b."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def growth(series: Iterable[dict[str, Any]]) -> str:
    """The table of exponents."""
    found = list(series)
    peers = list(dict.fromkeys(peer for one in found for peer in one["exponents"]))
    body = []
    for one in found:
        sizes = ", ".join(f"{size:,}" for size in one["sizes"])
        exponents = (f"{one['exponents'][p]:.2f}" if p in one["exponents"] else "" for p in peers)
        body.append((one["name"], sizes, *exponents))
    return lines(("what grows", "sizes", *peers), body)


def summary(result: Result) -> dict[str, Any]:
    """A result with its medians, quartiles and ratios, as plain data."""
    compared = [peer for peer in result.targets if {peer, "pvae"} <= result.values.keys()]
    return {
        **asdict(result),
        "quartiles": {name: _quartiles(values) for name, values in result.values.items()},
        "ratios": {peer: ratio(result, peer) for peer in compared},
        "verdicts": {peer: verdict(result, peer).replace("*", "") for peer in compared},
    }


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def between_marks(text: str, name: str, new: str) -> str:
    """Put `new` between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: if the text does not have both, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"The text must have the lines {begin} and {end}, in this order.")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"
