"""The rows of an evaluation's table: name, value, errors over data and draws, unit, meaning."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.bounds import khat_threshold
from pvae.evaluation.agreement import (
    Agreement,
    estimate,
    mean_and_error,
    nats_apart,
    pooled_error,
)

if TYPE_CHECKING:
    from pvae.evaluation.result import Evaluation

__all__ = ["BITS", "COLUMNS", "NATS", "Row", "rows_of"]

Row = tuple[str, float, float, float, str, str]
NATS, BITS = "nats per datum", "bits per dimension"
COLUMNS = ["", "value", "se (data)", "se (draws)", "unit", "what it is"]


def rows_of(result: "Evaluation", bits: bool) -> list[Row]:
    """Every row, as means over data; log-probabilities in bits per dimension or nats per datum."""
    rows = [*_bounds(result), *_check(result)]
    parts = _parts(result)
    if bits:
        rows, parts = ([_in_bits(row, result.dimensions) for row in some] for some in (rows, parts))
    return [*rows, *_draws(result), *_khats(result), *parts, *_units(result)]


def _in_bits(row: Row, dimensions: float) -> Row:
    name, value, of_data, of_draws, unit, what = row
    if unit != NATS:
        return row
    factor = 1 / (math.log(2) * dimensions)
    return (name, factor * value, factor * of_data, factor * of_draws, BITS, what)


def _mean(name: str, values: Any, what: str, errors: Any = None) -> Row:
    """Of log-probabilities by datum; `errors` are over draws."""
    of_draws = math.nan if errors is None else pooled_error(errors)
    return (name, *mean_and_error(values), of_draws, NATS, what)


def _plain(name: str, value: float, unit: str, what: str) -> Row:
    return (name, value, math.nan, math.nan, unit, what)


def _bounds(result: "Evaluation") -> list[Row]:
    found, rows = result.per_datum, []
    if "bound" in found:
        for size in found.particles.values:
            bound, errors = (found[name].sel(particles=size) for name in ("bound", "bound_se"))
            rows.append(_mean(result.label(size), bound, "lower bound", errors))
    if "bound_own" in found:
        what = "lower bound from all draws of each datum"
        rows.append(_mean("L_K", found["bound_own"], what, found["bound_own_se"]))
    if "psis" in found and not math.isnan(result.failing):
        rows.append(_mean("PSIS", found["psis"], "estimate, largest weights smoothed (PSIS)"))
    if "cubo" in found and not math.isnan(result.failing):
        rows.append(_mean("CUBO", found["cubo"], _warning(result)))
    if result.is_exact:
        rows.append(
            _mean(f"log p({result.of})", found["exact"], "exact", np.zeros_like(found["exact"]))
        )
    return [*rows, *_as_measured(result)]


def _as_measured(result: "Evaluation") -> list[Row]:
    """The best statement as a density of values before they were scaled, where they were."""
    shift = result.per_datum.get("log_jacobian")
    if shift is None or result.measure == "probability":
        return []
    what = f"{result.kind}, in units of the data as measured: {float(shift.mean()):+.2f} nats"
    return [_mean("as measured", result.log_p + shift, what)]


def _warning(result: "Evaluation") -> str:
    """What CUBO is: its weights are squared, so that it exists only where k-hat is below 1/2."""
    what = "upper bound in the limit of draws, its estimate errs downward"
    infinite = 100 * float((~(result.per_datum["khat"] <= 0.5)).mean())
    return (
        f"{what}; says nothing for {infinite:.3g} % of data (k-hat > 0.5: second moment infinite)"
    )


def _check(result: "Evaluation") -> list[Row]:
    """The other estimate, and how far it and the exact value are from the bound."""
    if result.is_exact and "bound" in result.per_datum:
        return [*_other(result), *_differences("exact", Agreement.with_exact(result))]
    return _other(result)


def _other(result: "Evaluation") -> list[Row]:
    if (check := result.check) is None:
        return []
    value, errors = estimate(check.per_datum)
    doubt = f", k-hat too high for {100 * check.failing:.3g} %" if check.failing > 0 else ""
    rows = [_mean("check", value, f"lower bound, {check.how}{doubt}", errors)]
    return rows + _differences("check", Agreement.between(result, check))


def _differences(name: str, agreement: Agreement) -> list[Row]:
    rows: list[Row] = [(f"{name} less bound", *agreement.mean, NATS, "paired by datum")]
    for word, where in (("above", agreement.higher), ("below", agreement.lower)):
        what = f"share of data {word} the bound by over 4 standard errors"
        if where.any():
            what += f", {nats_apart(agreement.difference[where].mean())}"
        rows.append(_plain(f"{name} {word}", 100 * where.mean(), "%", what))
    return rows


def _draws(result: "Evaluation") -> list[Row]:
    """Of data with draws of their own number."""
    if (draws := result.per_datum.get("draws")) is None:
        return []
    what = f"median over data; most: {int(draws.max()):,}"
    rows = [_plain("draws", float(draws.median()), result.sampler, what)]
    if result.target_se is not None:
        what = f"of {result.log_p.size}: se over draws above {result.target_se:g} nats"
        rows.append(_plain("target not reached", len(result.not_reached), "data", what))
    return rows


def _khats(result: "Evaluation") -> list[Row]:
    if "khat" not in result.per_datum:
        return []
    khat, ess = result.per_datum["khat"], result.per_datum["ess"]
    rows = [_plain("ESS", float(ess.median()), result.sampler, "median over data")]
    if math.isnan(result.failing):
        return rows
    own = "draws" in result.per_datum
    limit = "that of its own K" if own else f"{khat_threshold(result.num_particles):.2f}"
    what = f"share of data with k-hat above {limit}"
    return [
        _plain("k-hat", float(khat.median()), "", "median over data"),
        _plain("k-hat too high", 100 * result.failing, "%", what),
        *rows,
    ]


def _parts(result: "Evaluation") -> list[Row]:
    rows = []
    if "acceptance" in result.per_datum:
        accepted = float(result.per_datum["acceptance"].mean())
        rows.append(_plain("acceptance", accepted, "", "of proposals, mean over data"))
    whose = "" if result.proposal.startswith("guide") else f" of the {result.proposal}"
    for name in map(str, result.per_datum.data_vars):
        if name.startswith(("KL[", "reconstruction[")):
            rows.append(_mean(name, result.per_datum[name], f"part of the ELBO{whose}, few draws"))
    return rows


def _units(result: "Evaluation") -> list[Row]:
    rows = []
    for name, active in result.active_units.items():
        total = result.per_unit[f"activity[{name}]"].size
        what = f"of {total}: variance over data of E_q[{name} | x] > 0.01"
        rows.append(_plain(f"active units of {name}", active, "units", what))
    return rows
