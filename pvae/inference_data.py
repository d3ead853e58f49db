"""Results as ArviZ takes them: an `xarray.DataTree` of labelled groups, or an `ELPDDataLOO`.

    pair, data  --to_datatree-->    posterior, log_likelihood, log_weights, prior, predictive groups
    Evaluation  --to_elpd-->        log p(x) and k-hat by datum, for az.plot_khat and az.compare

Draws have the dimensions chain (of one), draw, datum, then those of the event. A tree is kept by
`tree.to_netcdf(file)` and read by `xarray.open_datatree(file)`; nothing in it is code. Sources: the
InferenceData schema (Kumar et al. 2019); sampling importance resampling (Rubin 1988).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae import bounds
from pvae.datatree import (
    Groups,
    Values,
    is_factor,
    log_prob_of,
    tree_of,
    versions,
)
from pvae.fence import evaluating, fenced, module_device
from pvae.pair import Batch, Columns, Pair
from pvae.particles import check_count
from pvae.passes import MAX_ROWS, MAX_ROWS_CUDA, MAX_WEIGHTS, blocks
from pvae.plates import Plates, samples
from pvae.programs import Unobserved, is_deterministic

if TYPE_CHECKING:
    import xarray as xr

    from pvae.evaluation import Evaluation
    from pvae.svi import Fit

__all__ = [
    "evaluation_to_datatree",
    "fit_to_datatree",
    "to_datatree",
    "to_elpd",
]

LARGE = 1_000_000  # draws, for which the threshold of k-hat is at its most
CANDIDATES = 10  # weighed draws of the guide for each draw that resampling keeps


# ------------------------------------------------------------------------- a model and its data


def to_datatree(
    model: Pair,
    data: Any = None,
    num_samples: int = 200,
    *,
    num_prior: int | None = None,
    weights: Literal["resample"] | None = None,
    seed: int = 0,
) -> "xr.DataTree":
    """Draw from a model and its guide, and label what was drawn for ArviZ.

    Each datum has latents of its own, so that draws are many: S draws for N data of D numbers take
    S N D numbers in each predictive group. Pass as many rows of data as are to be looked at.

    Args:
        model: `LatentModel` or `PyroPair`.
        data: (N, *event), or columns by name; left out, the tree has prior draws alone.
        num_samples: S, posterior draws for each datum.
        num_prior: prior draws for each datum, S where left out, 0 for none; without data, draws.
        weights: None for draws from the guide as they are; "resample" for draws chosen among ten
            times as many by their importance weights (Rubin 1988), which nears p(z | x) where k-hat
            is low.
        seed: of the draws. The caller's random state stays as it was.

    Returns:
        DataTree with, in nats and with dimensions (chain, draw, datum, ...):
        `posterior`: z ~ q(z | x), summed latents from p(c | x, z), deterministic sites.
        `log_likelihood`: log p(x | z) of each observed site, given the draws in `posterior`.
        `log_weights`: log w of each draw, or of each `candidate`, with `khat` and `ess` by datum.
        `posterior_predictive`, `prior`, `prior_predictive`, `observed_data`, and `constant_data`,
        columns that the model is given. Attributes tell the model, the data and their
        specification (JSON), versions and the seed.

    Raises:
        TypeError: for a model that is no `LatentModel` or `PyroPair`.
        ValueError: for numbers of draws or `weights` without meaning, or data that do not fit.
        FloatingPointError: where weights are NaN or infinite, or none is left to resample by.
    """
    if not isinstance(model, Pair):
        raise TypeError(
            f"`model` must be a LatentModel or a PyroPair, got {type(model).__name__}. Results "
            "have a method to_datatree() of their own; runs of pyro.infer.SVI have from_pyro_svi."
        )
    check_count("num_samples", num_samples)
    num_prior = num_samples if num_prior is None else num_prior
    if num_prior != 0:
        check_count("num_prior", num_prior)
    if weights not in (None, "resample"):
        raise ValueError(f"`weights` must be None or 'resample', got {weights!r}.")
    attrs = {"model": model.name, "seed": seed, "num_samples": num_samples}
    if data is None:
        return tree_of(_prior_alone(model, num_prior, seed), {}, attrs | {"num_samples": 0})
    device = module_device(model)
    columns = model.columns(data).realised().to(device)
    model.prepare(columns.rows(slice(0, 13)))
    with evaluating(model), fenced(seed, device):
        found = _Draws(model, columns, num_samples, num_prior, weights == "resample").groups()
    attrs |= {"draws_from": "guide, resampled by weight" if weights else "guide"}
    attrs |= _data_attributes(columns)
    variables = {name for group in found.values() for name in group}
    return tree_of(found, {name: ["datum"] for name in variables}, attrs)


def _prior_alone(model: Pair, num_prior: int, seed: int) -> Groups:
    """Draws of every site, of one datum each."""
    if num_prior == 0:
        raise ValueError("Without `data` and with `num_prior=0` there is nothing to draw.")
    try:
        arguments = model._to_draw(num_prior, None)
    except ValueError as error:
        raise ValueError(
            f"Without data {model.name!r} cannot draw from its prior either: pass `data`. ({error})"
        ) from error
    with evaluating(model), fenced(seed, module_device(model)):
        trace = poutine.trace(Unobserved()(model.model)).get_trace(*arguments)
    found: Groups = {"prior": {}, "prior_predictive": {}}
    for site in samples(trace):
        if not is_factor(site):
            seen = site["infer"].get("was_observed") or site["name"] in model.observed
            found["prior_predictive" if seen else "prior"][site["name"]] = site["value"]
    return found


def _data_attributes(columns: Columns) -> dict[str, Any]:
    specs = {name: column.spec.to_json() for name, column in columns.columns.items()}
    return {
        "data": columns.main.spec.space(),
        "data_split": columns.main.spec.split,
        "data_spec": json.dumps(specs if columns.named else specs[""]),
        "data_fingerprint": columns.fingerprint(),
        "num_data": len(columns),
    }


class _Draws:
    """All draws of a tree, made block by block of data.

    Values are kept as (K, n, *inner plates, *event), whatever the order of the program's plates.
    """

    def __init__(
        self, pair: Pair, columns: Columns, num_samples: int, num_prior: int, resample: bool
    ):
        self.pair, self.columns = pair, columns
        self.num_samples, self.num_prior, self.resample = num_samples, num_prior, resample

    def groups(self) -> Groups:
        """Every group, (K, N, ...); of data and diagnostics (N, ...)."""
        on_cuda = self.columns.main.values.device.type == "cuda"
        max_rows = max(1, (MAX_ROWS_CUDA if on_cuda else MAX_ROWS) // self.pair.categories)
        parts: dict[str, dict[str, list[Tensor]]] = {}
        for rows, passes in blocks(len(self.columns), self.num_samples, max_rows, MAX_WEIGHTS):
            for group, values in self._block(rows, passes[0]).items():
                for name, value in values.items():
                    parts.setdefault(group, {}).setdefault(name, []).append(value.cpu())
        whole = {
            group: {name: torch.cat(values, 1) for name, values in named.items()}
            for group, named in parts.items()
        }
        inner = tuple(range(2, self.pair.plates.nesting + 1))
        drawn = {"posterior", "posterior_predictive", "prior", "prior_predictive", "observed_data"}
        for group in drawn & set(whole):  # one element, for sites outside of plates in the datum
            whole[group] = {name: value.squeeze(inner) for name, value in whole[group].items()}
        for group in {"observed_data", "constant_data", "diagnostics"} & set(whole):
            whole[group] = {name: value[0] for name, value in whole[group].items()}
        return whole

    def _block(self, rows: slice, together: int) -> Groups:
        batch = self.columns.rows(rows)
        z, log_w = self._posterior(batch, together)
        _check_weights(self.pair, log_w, rows.start, self.resample)
        if self.resample:
            z = _resampled(z, log_w, self.num_samples)
        found: Groups = {"posterior": z}
        for group, values in self._given(batch, z, together).items():
            found.setdefault(group, {}).update(values)
        if self.num_prior:
            found |= self._prior(batch, together, found["observed_data"])
        found["constant_data"] = _constants(self.pair, self.columns, rows, batch)
        found["candidates" if self.resample else "log_weights"] = {"log_weights": log_w}
        found["diagnostics"] = {
            "khat": bounds.pareto_khat(log_w)[None],
            "ess": bounds.effective_sample_size(log_w.double())[None],
        }
        return found

    def _posterior(self, batch: Batch, together: int) -> tuple[Values, Tensor]:
        """Latents from the guide and their log-weights."""
        total = self.num_samples * (CANDIDATES if self.resample else 1)
        z: list[Values] = []
        log_w = []
        for size in _portions(total, together):
            particles = self.pair.guided(batch, size)
            log_w.append(particles.log_weights)
            each = {}
            for name, value in particles.posterior_values().items():
                if name not in particles.model_sites:  # of the guide alone
                    continue
                event = len(particles.model_sites[name].event_shape)
                if name in particles.summed:  # (K, N, *event), and in no other plate
                    ones = (1,) * (self.pair.plates.nesting - 1)
                    each[name] = value.reshape(*value.shape[:2], *ones, *value.shape[2:])
                else:
                    draws = [value] if self.pair.vectorize_particles else list(value)
                    each[name] = torch.cat([self._arranged(d, event, size) for d in draws])
            z.append(each)
        return _joined(z), torch.cat(log_w)

    def _given(self, batch: Batch, z: Values, together: int) -> Groups:
        """Of observed sites given latents: log-likelihood, predictive draws, the data."""
        found: list[Groups] = []
        done = 0
        for size in _portions(self.num_samples, together):
            some = {name: value[done : done + size] for name, value in z.items()}
            done += size
            likely = self._run(self.pair.model, batch, some, size)
            seen = {n: s for n, s in likely.items() if n not in z and not s.is_deterministic}
            program = Unobserved()(self.pair.model)
            drawn = self._run(program, batch, some, size)
            found.append(
                {
                    "posterior": {n: s.value for n, s in likely.items() if s.is_deterministic},
                    "log_likelihood": {name: site.log_prob for name, site in seen.items()},
                    "posterior_predictive": {name: drawn[name].value for name in seen},
                    "observed_data": {name: site.value[:1] for name, site in seen.items()},
                }
            )
        joined = {group: _joined([each[group] for each in found]) for group in found[0]}
        return joined | {"observed_data": found[0]["observed_data"]}

    def _prior(self, batch: Batch, together: int, observed: Iterable[str]) -> Groups:
        program = Unobserved()(self.pair.model)
        portions = _portions(self.num_prior, together)
        found = _joined(
            [
                {name: site.value for name, site in self._run(program, batch, {}, size).items()}
                for size in portions
            ]
        )
        return {
            "prior": {name: value for name, value in found.items() if name not in observed},
            "prior_predictive": {name: found[name] for name in observed},
        }

    def _run(
        self, program: Callable[..., Any], batch: Batch, z: Values, size: int
    ) -> dict[str, "_Site"]:
        """The sites of `size` runs at latents z."""
        plates = self.pair.plates
        axis = plates.nesting + 1 + plates.dim
        z = {name: value.movedim(1, axis) for name, value in z.items()}
        if self.pair.vectorize_particles:
            plate = pyro.plate("particles", size, dim=-1 - plates.nesting)
            traces = [poutine.trace(plate(poutine.condition(program, z))).get_trace(batch)]
        else:
            each = ({name: value[k] for name, value in z.items()} for k in range(size))
            traces = [
                poutine.trace(poutine.condition(program, one)).get_trace(batch) for one in each
            ]
        runs = [self._sites(trace, size) for trace in traces]
        return {name: _Site.joined([run[name] for run in runs]) for name in runs[0]}

    def _sites(self, trace: poutine.Trace, size: int) -> dict[str, "_Site"]:
        found = {}
        batch_dim = self.pair.plates.nesting + self.pair.vectorize_particles
        for site in samples(trace):
            if is_factor(site):
                continue
            event = len(site["fn"].event_shape)
            if is_deterministic(site):  # of which Pyro takes all dimensions for the event's
                event = max(0, site["value"].dim() - batch_dim)
            log_prob = self._arranged(log_prob_of(site), 0, size)
            found[site["name"]] = _Site(
                self._arranged(site["value"], event, size),
                log_prob.reshape(*log_prob.shape[:2], -1).sum(-1),
                is_deterministic(site),
            )
        return found

    def _arranged(self, value: Tensor, event_dim: int, size: int) -> Tensor:
        """(*plates, *event), particles among the plates or K = 1, to (K, n, *inner, *event)."""
        plates: Plates = self.pair.plates
        size = size if self.pair.vectorize_particles else 1
        missing = plates.nesting + 1 - (value.dim() - event_dim)
        value = value.reshape((1,) * missing + value.shape)
        value = value.movedim(plates.nesting + 1 + plates.dim, 1)
        return value.expand(size, *value.shape[1:])


class _Site:
    """A sample site of several runs: value (K, n, ...) and log-probability (K, n)."""

    def __init__(self, value: Tensor, log_prob: Tensor, is_deterministic: bool):
        self.value, self.log_prob, self.is_deterministic = value, log_prob, is_deterministic

    @classmethod
    def joined(cls, runs: Sequence["_Site"]) -> "_Site":
        """Runs one after the other."""
        value = torch.cat([run.value for run in runs])
        log_prob = torch.cat([run.log_prob for run in runs])
        return cls(value, log_prob, runs[0].is_deterministic)


def _portions(total: int, most: int) -> list[int]:
    rest = total % most
    return [most] * (total // most) + ([rest] if rest else [])


def _joined(parts: Sequence[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_weights(pair: Pair, log_w: Tensor, first: int, resample: bool) -> None:
    bad = ~(log_w < math.inf).all(0)
    if bool(bad.any()):
        datum = first + int(bad.nonzero()[0])
        raise FloatingPointError(
            f"Weights of {pair.name!r} are NaN or infinite for datum {datum}. "
            "Look at that datum, and whether the model's parameters are finite."
        )
    none = (log_w == -math.inf).all(0)
    if resample and bool(none.any()):
        datum = first + int(none.nonzero()[0])
        raise FloatingPointError(
            f"Every draw for datum {datum} has weight zero under {pair.name!r}, so that none can "
            "be resampled. Leave out `weights`, or train the guide."
        )


def _resampled(z: Values, log_w: Tensor, num_samples: int) -> Values:
    """Draws chosen by their weights, with replacement and for each datum alone."""
    index = torch.multinomial(log_w.double().softmax(0).T, num_samples, replacement=True).T
    data = torch.arange(index.shape[1], device=index.device)
    return {name: value[index, data] for name, value in z.items()}


def _constants(pair: Pair, columns: Columns, rows: slice, batch: Batch) -> Values:
    """Columns that no site observes, with a leading dimension as draws have."""
    if isinstance(batch, Tensor):
        return {}
    places = pair.places(batch)
    used = (
        set(pair.observed)
        if places is None
        else {place[-1] for each in places.values() for place in each}
    )
    return {name: value[None] for name, value in batch.items() if name not in used}


# ------------------------------------------------------------------------------------- results


def fit_to_datatree(fit: "Fit", data: Any = None, num_samples: int = 200, **how: Any) -> Any:
    """`to_datatree` of the trained model, with the fit's history and settings; see there."""
    import xarray as xr

    tree = to_datatree(fit.model, data, num_samples, **how)
    if len(fit.history):
        tree["history"] = xr.DataTree(xr.Dataset.from_dataframe(fit.history))
    tree.attrs |= {
        "objective": fit.settings["objective"],
        "settings": json.dumps(fit.settings),
        "trained_on": fit.settings["data"],
        "fit_seed": fit.settings["seed"],
        "stopped": fit.stopped,
        "best_epoch": fit.best_epoch,
    }
    return tree


def evaluation_to_datatree(evaluation: "Evaluation") -> "xr.DataTree":
    """The groups `per_datum` and `per_unit` of an evaluation, which keeps no draws; in nats.

    Attributes tell the model with a fingerprint of its parameters, the data and their specification
    (JSON), how log p(x) was found, with the seed of the draws, and versions.
    """
    import xarray as xr

    groups = {"per_datum": evaluation.per_datum, "per_unit": evaluation.per_unit}
    if evaluation.check is not None:
        groups["check"] = evaluation.check.per_datum
    tree = xr.DataTree.from_dict({name: part for name, part in groups.items() if part.data_vars})
    tree.attrs = {
        "model": evaluation.model,
        "data": evaluation.spec.space(),
        "data_split": evaluation.spec.split,
        "data_spec": json.dumps(evaluation.spec.to_json()),
        "data_fingerprint": evaluation.fingerprint,
        "num_data": evaluation.log_p.size,
        "of": evaluation.of,
        "measure": evaluation.measure,
        "dimensions": evaluation.dimensions,
        "num_particles": evaluation.num_particles,
        "proposal": evaluation.proposal,
        "sampler": evaluation.sampler,
        "log_p": evaluation.kind,
        "verdict": evaluation.verdict,
        "seconds": evaluation.seconds,
        **versions(),
    }
    if evaluation.target_se is not None:  # netCDF has no None
        tree.attrs["target_se"] = evaluation.target_se
    if evaluation.parameters:
        tree.attrs["parameters"] = evaluation.parameters
    if evaluation.seed is not None:
        tree.attrs["seed"] = evaluation.seed
    if evaluation.check is not None:
        tree.attrs["check"] = evaluation.check.how
    return tree


def to_elpd(evaluation: "Evaluation") -> Any:
    """log p(x) of each datum and its k-hat, as `az.plot_khat` and `az.compare` take them.

    With parameters trained on other data, data are independent, so that log p(x) is the log
    predictive density of a datum left out. `az.loo` of a tree's `log_likelihood` estimates the same
    by the harmonic mean of p(x | z), whose variance is large or infinite where z is informed by x.

    Args:
        evaluation: of the data that models are compared on.

    Returns:
        `arviz_stats.ELPDDataLOO`: `elpd_i` log p(x), exact or a lower bound, (datum,), nats; `elpd`
        their sum; `pareto_k` the k-hat of the weights, and where that is unknown infinite for a
        bound, which ArviZ counts as bad and leaves out of the plot, and zero for an exact value;
        `p` NaN, since no effective number of parameters is known.
    """
    import numpy as np
    import xarray as xr
    from arviz_stats import ELPDDataLOO

    log_p = evaluation.log_p.reset_coords(drop=True).rename("elpd_i")
    log_p = log_p.assign_coords(datum=np.arange(log_p.size))
    unknown = xr.full_like(log_p, math.nan)
    khat = evaluation.per_datum.get("khat", unknown).assign_coords(datum=log_p.datum)
    khat = khat.fillna(0.0 if evaluation.is_exact else math.inf).rename("pareto_k")
    fewest = int(evaluation.per_datum.get("draws", torch.tensor(evaluation.num_particles)).min())
    judged = not math.isnan(evaluation.failing)
    good_k = bounds.khat_threshold(fewest if judged else LARGE)
    return ELPDDataLOO(
        elpd=float(log_p.sum()),
        se=math.sqrt(log_p.size) * float(log_p.std(ddof=1)) if log_p.size > 1 else math.nan,
        p=math.nan,
        n_samples=evaluation.num_particles,
        n_data_points=log_p.size,
        scale="log",
        warning=not evaluation.is_exact and evaluation.failing != 0,
        elpd_i=log_p,
        pareto_k=khat,
        good_k=good_k,
    )
