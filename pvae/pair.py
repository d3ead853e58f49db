"""What `fit`, `evaluate` and every sampler take: a model and a guide over one batch of data.

`Pair` is an `nn.Module` with two Pyro programs, `model(batch)` and `guide(batch)`. It is made by a
declaration (`LatentModel`) or by wrapping hand-written Pyro (`PyroPair`). Sampling is written here
once, on the programs:

    prior -> prior_predictive;   data -> posterior -> reconstruct, interpolate
"""

import hashlib
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pvae.data import Data
from pvae.fence import evaluating, module_device
from pvae.graph import hint
from pvae.missing import Label
from pvae.particles import Particles, Program, check_count
from pvae.plates import Plates, samples
from pvae.programs import Places, Programs, Unobserved
from pvae.proposals import defensive, prior

PROPOSALS = ("guide", "prior", "defensive")

__all__ = ["Batch", "Columns", "Pair", "announce"]

Batch = Tensor | Mapping[str, Tensor]


class Columns:
    """The data of one run: one `Data`, or several by name with as many rows each.

    Args:
        data: `Data`, tensor or array (N, *event), or a mapping from names to these.
        missing: names of columns in which NaN is allowed, and marks what was not seen.

    Raises:
        ValueError: if the columns have different numbers of rows.
    """

    def __init__(self, data: Any, missing: Collection[str] = ()):
        self.named = isinstance(data, Mapping)
        columns = data if self.named else {"": data}
        self.columns: dict[str, Data] = {
            name: _column(name, column, name in missing) for name, column in columns.items()
        }
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"All columns of data need as many rows as each other, got {lengths}.")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def tensors(self) -> list[Tensor]:
        """Stored values of each column, in order: grey levels where noise is drawn anew."""
        return [column.values for column in self.columns.values()]

    def batch(self, index: Tensor) -> Batch:
        """Rows at an index tensor, noise drawn afresh where the data say so."""
        return self.observed([values[index] for values in self.tensors()])

    def observed(self, tensors: Sequence[Tensor]) -> Batch:
        """A batch of rows of `tensors`, noise drawn afresh where the data say so."""
        columns = zip(self.columns.items(), tensors, strict=True)
        batch = {name: column.observed(rows) for (name, column), rows in columns}
        return batch if self.named else batch[""]

    def rows(self, rows: slice) -> Batch:
        """Rows of a slice, as they are."""
        if not self.named:
            return self.columns[""][rows]
        return {name: column[rows] for name, column in self.columns.items()}

    def _each(self, method: str, *args: Any) -> "Columns":
        columns = {name: getattr(column, method)(*args) for name, column in self.columns.items()}
        return Columns(columns if self.named else columns[""])

    def to(self, device: torch.device) -> "Columns":
        """The same columns on another device."""
        return self._each("to", device)

    def subset(self, index: Tensor) -> "Columns":
        """Some rows, by their numbers."""
        return self._each("subset", index)

    def realised(self) -> "Columns":
        """Noise drawn once, as evaluation needs it."""
        return self._each("realised")

    def log_jacobian(self, given: Collection[str] = ()) -> dict[str, Tensor]:
        """`Data.log_jacobian` over all columns but those `given`, (N,), by that name.

        Empty where all values are stored as measured.
        """
        own = [column for name, column in self.columns.items() if name not in given]
        found = [column.log_jacobian() for column in own if column.spec.is_scaled]
        return {"log_jacobian": torch.stack(found).sum(0)} if found else {}

    @property
    def main(self) -> Data:
        """The first column, whose specification names the run's data."""
        return next(iter(self.columns.values()))

    def fingerprint(self, without: Collection[str] = ()) -> str:
        """Of all values, but of columns `without`; see `Data.fingerprint`."""
        own = [column for name, column in self.columns.items() if name not in without]
        return "-".join(column.fingerprint() for column in own)


def _column(name: str, column: Any, missing: bool) -> Data:
    try:
        return Data.of(column, missing=missing)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Column {name!r}: {error}" if name else str(error)) from None


class Pair(nn.Module):
    """A model and a guide over a batch; see the module's docstring."""

    plates = Plates()
    vectorize_particles = True
    name = "model"

    per_datum = False  # whether the guide is nothing until it is refined for a datum
    categories = 1  # rows that summed latents make of each datum

    @property
    def summed(self) -> list[str]:
        """Names of the latents that are summed out, having no guide entry."""
        raise NotImplementedError

    def model(self, batch: Any = None) -> Any:
        """Pyro program: log p(x, z) with x from the batch."""
        raise NotImplementedError

    def guide(self, batch: Any = None) -> Any:
        """Pyro program: q(z | x)."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Make what depends on the data's shape. Called before the first use on new data."""

    def columns(self, data: Any) -> Columns:
        """Check data where they enter, and return them as columns."""
        return Columns(data)

    def blank(self, num_data: int, given: Batch | None) -> Any:
        """A batch without data, from which `model` can draw `num_data` of its own."""
        raise NotImplementedError

    def _to_draw(self, num_data: int, given: Batch | None) -> tuple[Any, ...]:
        return (self.blank(num_data, given),)

    def data_of(self, drawn: Mapping[str, Tensor], given: Batch | None = None) -> Batch:
        """What the model has drawn, as data for it, with values that are conditioned on."""
        observed = {name: drawn[name] for name in self.observed}
        return {**observed, **given} if isinstance(given, Mapping) else observed

    @property
    def observed(self) -> list[str]:
        """Names of the observed sites, where a declaration tells them."""
        return []

    @property
    def given(self) -> list[str]:
        """Names of the columns that are conditioned on, as far as they are known."""
        return []

    def draw(self, batch: Batch, num_particles: int = 1, proposal: str = "guide") -> Particles:
        """Draw and weigh particles for a batch; differentiable. See `particles.draw`.

        Args:
            batch: tensor (N, *event), or tensors by name.
            num_particles: K.
            proposal: "guide"; "prior" to draw z from p(z), naive Monte Carlo; or "defensive", nine
                parts of the one and one of the other, whose weights are bounded.

        Raises:
            ValueError: for another proposal.
        """
        return self.programs(batch, proposal).draw(num_particles)

    def guided(self, batch: Batch, num_particles: int = 1) -> Particles:
        """Particles of the guide, refined first where it is "per-datum"."""
        if not self.per_datum:
            return self.draw(batch, num_particles)
        from pvae.refinement import refined_programs

        return refined_programs(self, batch).draw(num_particles)

    def fingerprint(self, guide: bool = False) -> str:
        """Of the model's parameters and buffers, and the guide's if asked; "" if none are known."""
        tensors = self.state_dict() if guide else self._state_of_model()
        content = hashlib.sha256()
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            content.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16] if tensors else ""

    def _state_of_model(self) -> Mapping[str, Tensor]:
        """The state of what p(x, z) depends on; none where that cannot be told."""
        return {}

    def programs(self, batch: Batch, proposal: str = "guide") -> Programs:
        """The model and a proposal over a batch, prepared for it.

        Raises:
            ValueError: for an unknown proposal.
        """
        if proposal not in PROPOSALS:
            known = ", ".join(map(repr, PROPOSALS))
            raise ValueError(f"`proposal` must be one of {known}, got {proposal!r}.")
        self.prepare(batch)
        guide: Program = self.guide
        if proposal == "prior":
            guide = prior(self.model, self.summed)
        elif proposal == "defensive":
            guide = defensive(self.guide, self.model, self.summed, self.plates)
        return Programs(
            self.model,
            guide,
            (batch,),
            plates=self.plates,
            vectorize=self.vectorize_particles,
            places=self.places(batch),
        )

    def places(self, batch: Batch) -> Places | None:
        """Where in the batch, the programs' argument 0, the data of each observed site are."""
        if isinstance(batch, Tensor):
            return {name: [(0,)] for name in self.observed[:1]}
        return {name: [(0, name)] for name in self.observed}

    def prior_predictive(self, num_samples: int, given: Any = None) -> dict[str, Tensor]:
        """Draw from p(z) p(x | z), with torch's global random state.

        Args:
            num_samples: S, number of draws.
            given: values of the sites that are conditioned on, if the model has any, (S, *event),
                or a number that all draws share: `prior_predictive(16, given={"y": 3})`.

        Returns:
            Draws of every site, latent and observed, (S, *event).

        Raises:
            ValueError: for S below 1, or `given` missing or with another number of rows.
        """
        check_count("num_samples", num_samples)
        with evaluating(self):
            program = Unobserved()(self.model)
            trace = poutine.trace(program).get_trace(*self._to_draw(num_samples, given))
        sites: Any = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        sites |= {name: trace.nodes[name] for name in trace.observation_nodes}
        return {
            name: site["value"]
            for name, site in sites.items()
            if isinstance(site["fn"], Distribution)
        }

    def posterior(self, data: Any, num_samples: int = 1) -> dict[str, Tensor]:
        """Draw latents from q(z | x), summed ones from p(c | x, z).

        Args:
            data: (N, *event), or columns by name.
            num_samples: S, draws for each datum.

        Returns:
            Draws of every latent, (S, N, *event).

        Raises:
            ValueError: for S below 1, or data that do not fit the model.
        """
        check_count("num_samples", num_samples)
        batch = self._whole(data)
        with evaluating(self), pyro.validation_enabled(False):
            return self.guided(batch, num_samples).posterior_values()

    def encode(self, data: Any, num_samples: int = 16) -> dict[str, Tensor]:
        """Mean of q(z | x) of each latent that the guide draws, (N, *event).

        Args:
            data: (N, *event), or columns by name.
            num_samples: draws over which means are averaged, where the guide has several layers.
        """
        batch = self._whole(data)
        with evaluating(self), pyro.validation_enabled(False):
            particles = self.guided(batch, num_samples)
        return {
            name: guide_mean(particles, name).mean(0)
            for name in particles.log_q
            if name in particles.model_sites
        }

    def reconstruct(self, data: Any, num_samples: int = 1) -> dict[str, Tensor]:
        """Mean of p(x | z), averaged over draws of z from q(z | x).

        Args:
            data: (N, *event), or columns by name.
            num_samples: S, draws for each datum.

        Returns:
            For each observed site the mean (N, *event); for a site without one, its mode.
        """
        batch = self._whole(data)
        values = self.posterior(data, num_samples)
        return {name: _average(means) for name, means in self._decode(batch, values).items()}

    def decode(self, values: Mapping[str, Tensor], given: Any = None) -> dict[str, Tensor]:
        """Mean of p(x | z) at latents of your choosing, such as a grid over two dimensions.

        Args:
            values: for each latent (S, *event); latents left out are drawn from the prior.
            given: values of the sites that are conditioned on, if the model has any, (S, *event),
                or a number that all draws share.

        Returns:
            For each observed site the mean (S, *event); for a site without one, its mode.

        Raises:
            ValueError: for no values, a name that the model does not know, or another shape.
        """
        if not values:
            raise ValueError("`decode` needs values of a latent, got none: try `prior_predictive`.")
        first = next(iter(values.values()))
        args = self._to_draw(len(first) if first.dim() else 1, given)
        with evaluating(self), pyro.validation_enabled(False):
            program = Unobserved()(self.model)
            with torch.random.fork_rng():
                self._check_chosen(values, poutine.trace(program).get_trace(*args))
            trace = poutine.trace(poutine.condition(program, dict(values))).get_trace(*args)
        sites: Any = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        return {name: _centre(site["fn"]) for name, site in sites.items() if self._observes(site)}

    def _observes(self, site: Any) -> bool:
        """Whether a site that was drawn in place of data is observed otherwise."""
        return bool(site["infer"].get("was_observed")) or site["name"] in self.observed

    def _check_chosen(self, values: Mapping[str, Tensor], drawn: poutine.Trace) -> None:
        """Raise for values that cannot take the place of what the model has drawn."""
        known = {site["name"]: site for site in samples(drawn) if not site["is_observed"]}
        latents = [name for name, site in known.items() if not self._observes(site)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(
                    f"{self.name!r} has no latent {name!r} to decode; it has "
                    f"{', '.join(latents) or 'none'}.{hint(name, known)}"
                )
            expected, found = tuple(known[name]["value"].shape), tuple(value.shape)
            if found != expected:
                raise ValueError(
                    f"Values of {name!r} of {self.name!r} must have shape {expected}, (S, *event) "
                    f"with as many draws S as the others, got {found}."
                )

    def interpolate(self, start: Any, end: Any, steps: int = 10) -> dict[str, Tensor]:
        """Decode points on the line between the codes of two data, or of two batches pairwise.

        Args:
            start: (N, *event).
            end: (N, *event).
            steps: number of points, both ends included.

        Returns:
            For each observed site the means (steps, N, *event).

        Raises:
            ValueError: for fewer than 2 steps, or batches of different sizes.
        """
        if steps < 2:
            raise ValueError(f"`steps` must be at least 2, both ends included, got {steps}.")
        first, last = self.posterior(start), self.posterior(end)
        first = {name: value[0] for name, value in first.items()} | self.encode(start)
        last = {name: value[0] for name, value in last.items()} | self.encode(end)
        t = torch.linspace(0, 1, steps, dtype=torch.float64)
        for name, code in first.items():
            if len(code) != len(last[name]):
                raise ValueError(
                    f"`start` and `end` need as many data as each other, got {len(code)} and "
                    f"{len(last[name])}."
                )
        values = {name: _line(first[name], last[name], t) for name in first}
        return self._decode(self._whole(start), values)

    def _whole(self, data: Any) -> Batch:
        columns = self.columns(data).realised().to(module_device(self))
        batch = columns.rows(slice(None))
        self.prepare(batch)
        return batch

    def _decode(self, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means of p(x | z) at latents (S, N, *event): (S, N, *event) by observed site."""
        size = len(next(iter(values.values()))) if values else 1
        with evaluating(self), pyro.validation_enabled(False):
            if self.vectorize_particles:
                plate = pyro.plate("particles", size, dim=-1 - self.plates.nesting)
                traces = [self._trace(plate(poutine.condition(self.model, values)), batch)]
            else:
                draws = ({name: v[s] for name, v in values.items()} for s in range(size))
                traces = [self._trace(poutine.condition(self.model, v), batch) for v in draws]
        observed = [name for name in traces[0].observation_nodes if name not in values]
        means = {
            name: torch.stack([_centre(trace.nodes[name]["fn"]) for trace in traces])
            for name in observed
            if isinstance(traces[0].nodes[name]["fn"], Distribution)
            and not isinstance(traces[0].nodes[name]["fn"], Label)
        }
        return {name: m[0] if self.vectorize_particles else m for name, m in means.items()}

    @staticmethod
    def _trace(program: Any, batch: Batch) -> poutine.Trace:
        return poutine.trace(program).get_trace(batch)


def check_pair(model: Any) -> None:
    """Raise unless a model is one that can be evaluated."""
    if not isinstance(model, Pair):
        hint = ": pass its `model`" if hasattr(model, "model") else ""
        raise TypeError(
            f"`model` must be a LatentModel or a PyroPair, got {type(model).__name__}{hint}."
        )


@contextmanager
def placed(model: Pair, columns: Columns, device: torch.device) -> Iterator[Columns]:
    """The columns on a device, with the model prepared for them there, and back afterwards."""
    before = next(model.parameters(), torch.empty(0)).device
    model.to(device)
    try:
        on_device = columns.to(device)
        with torch.random.fork_rng():
            model.prepare(on_device.rows(slice(0, 13)))
        yield on_device
    finally:
        model.to(before)


def check_amortised(model: Pair, what: str) -> None:
    """Raise for a guide that is nothing until it is refined for a datum."""
    if model.per_datum:
        raise ValueError(
            f"{what} needs a guide that reads data, and that of {model.name!r} is 'per-datum': it "
            "is the prior until `evaluate` refines it. Declare a guide with nets."
        )


def announce(prefix: str, module: nn.Module) -> None:
    """Tell `pyro.infer.SVI` of a module's parameters, without Pyro's global param store.

    SVI optimises what it sees in `param` messages, which `pyro.param` would send by way of the
    global store. A message of the same form names the module's own tensors.
    """
    if not am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        alias = parameter.view_as(parameter)
        alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        _announced(alias, name=f"{prefix}.{name}", constraint=constraints.real)


@effectful(type="param")
def _announced(value: Tensor, constraint: constraints.Constraint = constraints.real) -> Tensor:
    return value


def _line(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    t = t.to(start.device).reshape(-1, *(1,) * start.dim())
    if not start.is_floating_point():
        return torch.where(t < 0.5, start, end)
    t = t.to(start)
    return (1 - t) * start + t * end


def _average(values: Tensor) -> Tensor:
    """Mean over draws (dimension 0), of indices the commonest."""
    return values.mean(0) if values.is_floating_point() else values.mode(0).values


def _centre(d: Any) -> Tensor:
    try:
        mean = d.mean
    except NotImplementedError:
        return d.mode
    return d.mode if bool(mean.isnan().any()) else mean


def guide_mean(particles: Particles, name: str) -> Tensor:
    """Mean of the guide's distribution at a site (K, N, *event), or the draws if it has none."""
    if particles.singles:
        return torch.stack([guide_mean(single, name) for single in particles.singles])
    value = particles.values[name]
    try:
        return particles.guide_sites[name].mean.expand(value.shape)
    except NotImplementedError:
        return value
