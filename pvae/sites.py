"""Sites of a declared model: a distribution class, an event shape, and its parameters.

    Latent(Normal, 50)                                        N(0, I)
    Observed(Bernoulli, 784, given="z", net=MLP(200, 200))    logits are outputs of the net
    Observed(Normal, 64, given="z", net=Linear(), scale=Learned(0.1))
    Latent(Normal, 50, given="x", net=MLP(200, 200), flow=IAF(64))    its draws pass through a flow

Each parameter named in the distribution's own `arg_constraints` is one of: a constant, a free
parameter (`Learned`), an output of the site's net or of a net of its own (`Predicted`), or, with
none of these, the image of zero. Free and predicted ones are mapped into the parameter's support by
`torch.distributions.transform_to`: exp for a scale, the identity for logits, softmax for a simplex.
So N(0, I) and the uniform Categorical are what zeros mean, and any distribution works.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import pyro.distributions as pyro_distributions
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, transform_to

from pvae.flows import Flow, Flows
from pvae.nets import Input, Lookup, Net, Shape
from pvae.priors import AtPseudoInputs

__all__ = ["Given", "Latent", "Learned", "Observed", "Predicted", "Site", "SiteModule"]

# Parametrisations of one thing, the preferred first: torch takes one of each group.
ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
)


def as_shape(shape: int | tuple[int, ...] | list[int], whose: str) -> Shape:
    """A size or a shape as a shape; raises ValueError where it is neither."""
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{whose} needs a shape of positive whole numbers, got {shape!r}.")
    return sizes


@dataclass(frozen=True)
class Learned:
    """A free parameter of a distribution, trained with the nets.

    Args:
        init: value it starts from, in the parameter's own support: number, list or tensor.
        shape: its shape, the parameter's if left out for tensors and lists, one number otherwise.
            `Learned(0.1)` is one scale for all pixels, `Learned(0.1, 784)` one for each.
    """

    init: Any = 0.0
    shape: int | Shape | None = None

    def value(self) -> Tensor:
        """The initial value, in the parameter's support."""
        init = torch.as_tensor(self.init, dtype=torch.get_default_dtype())
        if self.shape is None:
            return init.clone()
        return init.expand(as_shape(self.shape, "Learned")).clone()


@dataclass(frozen=True)
class Predicted:
    """A parameter of a distribution with a net of its own, fed the site's parents.

    Args:
        net: the net.
        shape: what the net puts out, the parameter's shape if left out. `Predicted(Table(), 1)` as
            a scale gives each component of a mixture one scale for all dimensions.
    """

    net: Net
    shape: int | Shape | None = None


@dataclass(frozen=True)
class Given:
    """An input that is conditioned on, not modelled, such as the labels of a conditional VAE.

    Args:
        shape: event shape of one value.
        categories: number of categories if values are indices; nets then read them one-hot.
    """

    shape: int | Shape = ()
    categories: int | None = None


@dataclass(frozen=True, init=False)
class Site:
    """A distribution class with an event shape, its parents, and its parameters.

    Args:
        distribution: a Pyro or torch distribution class.
        shape: shape of one draw, or its size. Where a draw is an index (Categorical), the last
            number counts the categories: `Latent(Categorical, 10)` is one index in 0..9.
        given: names of the parents, one or several.
        net: the net that maps their values to those parameters not given by keyword.
        **parameters: constants, `Learned` or `Predicted`, by the distribution's own names.

    Raises:
        TypeError: if `distribution` is not a distribution class or has no such parameter.
        ValueError: for a parameter that needs a value, or a shape that cannot fit.
    """

    distribution: Any
    shape: Shape
    given: tuple[str, ...] = ()
    net: Net | nn.Module | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        distribution: type[Distribution],
        shape: int | Shape = (),
        *,
        given: str | tuple[str, ...] | list[str] = (),
        net: Net | nn.Module | None = None,
        **parameters: Any,
    ):
        if not (inspect.isclass(distribution) and issubclass(distribution, Distribution)):
            raise TypeError(
                f"{type(self).__name__} needs a distribution class such as "
                f"pyro.distributions.Normal, got {distribution!r}."
            )
        known = inspect.signature(distribution.__init__).parameters
        for name in parameters:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{distribution.__name__} has no parameter {name!r}.{hint}")
        own = (given,) if isinstance(given, str) else tuple(given)
        if inspect.isclass(net):
            raise TypeError(
                f"`net` is the class {net.__name__}: give it sizes, as in MLP(200, 200)."
            )
        if net is not None and not own:
            raise ValueError(f"A net needs parents: give {distribution.__name__} `given=` as well.")
        if own and net is None and not any(isinstance(p, Predicted) for p in parameters.values()):
            raise ValueError(
                f"{distribution.__name__} is given {', '.join(own)}, but nothing reads it: add "
                "`net=`, or `Predicted(net)` for one of its parameters."
            )
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "distribution", _pyro_class(distribution))
        set_field(self, "shape", as_shape(shape, distribution.__name__))
        set_field(self, "given", own)
        set_field(self, "net", net)
        set_field(self, "parameters", parameters)

    @property
    def title(self) -> str:
        """Name of the distribution."""
        return self.distribution.__name__


@dataclass(frozen=True, init=False)
class Latent(Site):
    """An unobserved variable, in the model its prior, in the guide its variational posterior.

    Args:
        flow: one step or several of a flow, through which the distribution's draws pass.

    Raises:
        TypeError: for a step that is none.
    """

    flow: tuple[Flow, ...] = ()

    def __init__(self, *args: Any, flow: Flow | Sequence[Flow] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        steps = (flow,) if isinstance(flow, Flow) else tuple(flow)
        for step in steps:
            if not isinstance(step, Flow):
                raise TypeError(f"`flow` takes steps such as pvae.flows.IAF(64), got {step!r}.")
        object.__setattr__(self, "flow", steps)

    @property
    def title(self) -> str:
        """Name of the distribution, told from the same one without a flow."""
        return f"{super().title} through flow" if self.flow else super().title


@dataclass(frozen=True, init=False)
class Observed(Site):
    """A variable that the data hold.

    Args:
        check_support: set to False to take data outside the distribution's support, such as grey
            levels under a Bernoulli, whose "log p(x)" is then no log-probability.
        missing: whether entries of the data may be missing, which NaN marks: log p(x) is then that
            of the entries that were seen. One discrete variable that other sites are given is
            summed out where it was not seen.
    """

    check_support: bool = True
    missing: bool = False

    def __init__(
        self, *args: Any, check_support: bool = True, missing: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "check_support", check_support)
        object.__setattr__(self, "missing", missing)

    def with_missing(self) -> "Observed":
        """The same site, of which entries may be missing."""
        other = copy.copy(self)
        object.__setattr__(other, "missing", True)
        return other


def _pyro_class(distribution: type[Distribution]) -> Any:
    """Pyro's class of the same name, which can be expanded in plates and enumerated."""
    if issubclass(distribution, TorchDistributionMixin):
        return distribution
    named = getattr(pyro_distributions, distribution.__name__, None)
    if named is None or not issubclass(named, distribution):
        raise TypeError(f"{distribution.__name__} is not among pyro.distributions.")
    return named


def _constraints(distribution: type[Distribution]) -> dict[str, Any]:
    """`arg_constraints` by name, but for those that depend on the values (all of a Uniform's)."""
    found = distribution.arg_constraints
    if not isinstance(found, Mapping):
        return {}
    return {name: c for name, c in found.items() if not constraints.is_dependent(c)}


def _continuous(constraint: Any) -> bool:
    if getattr(constraint, "is_discrete", False):
        return False
    try:
        transform_to(constraint)
    except NotImplementedError:
        return False
    return True


def _parameter_shapes(limits: Mapping[str, Any], shape: Shape) -> dict[str, Shape]:
    """Shapes of a site's parameters by name.

    A matrix repeats the last dimension; a number beside vectors, such as the degrees of freedom of
    a MultivariateStudentT, has none of it.
    """
    dims = {name: limit.event_dim for name, limit in limits.items()}
    if not any(dims.values()):
        return dict.fromkeys(dims, shape)
    return {name: shape[:-1] + shape[-1:] * dim for name, dim in dims.items()}


def split_parameters(site: Site) -> tuple[dict[str, Any], list[str]]:
    """The parameters given by keyword, and the names of those that a net, or zero, must fill."""
    d = site.distribution
    limits = _constraints(d)
    named = dict(site.parameters)
    known = inspect.signature(d.__init__).parameters
    left = [name for name in known if name in limits and name not in named]
    for group in ALTERNATIVES:
        chosen = [name for name in group if name in named]
        if len(chosen) > 1:
            raise ValueError(f"{site.title} takes one of {', '.join(chosen)}, got both.")
        keep = () if chosen else [name for name in group if name in left][:1]
        left = [name for name in left if name not in group or name in keep]
    fill = [name for name in left if _continuous(limits[name])]
    for name in known:
        needed = known[name].default is inspect.Parameter.empty and name not in ("self", "args")
        if needed and name not in named and name not in fill and name != "kwargs":
            raise ValueError(
                f"{site.title} needs `{name}` by keyword, as a constant: no net can predict it."
            )
    return named, fill


class SiteModule(nn.Module):
    """A site with its sizes known: values of the parents -> distribution over the event.

    Constants are buffers and free parameters are `nn.Parameter`, so both follow `.to(device)`.

    Args:
        name: the site's name, for error messages.
        site: its declaration.
        inputs: the parents' shapes, in the order of `site.given`.
    """

    def __init__(self, name: str, site: Site, inputs: list[Input]):
        super().__init__()
        self.name, self.site = name, site
        self.constraints = _constraints(site.distribution)
        named, fill = split_parameters(site)
        used = {key: self.constraints[key] for key in (*named, *fill) if key in self.constraints}
        self.shapes = _parameter_shapes(used, site.shape)
        self.options: dict[str, Any] = {}
        self.learned = nn.ParameterDict()
        self.nets = nn.ModuleDict()
        for key, value in named.items():
            self._add(key, value, inputs)
        steps = site.flow if isinstance(site, Latent) else ()
        context = {"context": steps[0].hidden[:1]} if steps and site.net is not None else {}
        if site.net is None:
            for key in fill:
                self._add(key, self._image_of_zero(key), inputs)
        elif not fill:
            raise ValueError(f"Site {name!r} has a net, and no parameter left for it to predict.")
        else:
            outputs = {key: self.shapes[key] for key in fill}
            self._add_net("", site.net, inputs, outputs | context)
        self._infer_event()
        self.flow = self._build_flow(steps, context) if steps else None

    def _add(self, key: str, value: Any, inputs: list[Input]) -> None:
        free = isinstance(value, Learned | Predicted)
        if free and not (key in self.constraints and _continuous(self.constraints[key])):
            raise ValueError(
                f"Site {self.name!r}: `{key}` of {self.site.title} must be a constant, got {value}."
            )
        if isinstance(value, Learned):
            start = value.value()
            self._check_fit(key, start)
            self.learned[key] = nn.Parameter(transform_to(self.constraints[key]).inv(start))
        elif isinstance(value, Predicted):
            shape = self.shapes[key] if value.shape is None else as_shape(value.shape, key)
            self._add_net(key, value.net, inputs, {key: shape})
        elif key not in self.constraints:
            self._add_option(key, value)
        else:
            constant = torch.as_tensor(value)
            if constant.is_floating_point() or not getattr(
                self.constraints[key], "is_discrete", False
            ):
                constant = constant.to(torch.get_default_dtype())
            self._check_fit(key, constant)
            self.register_buffer(f"constant_{key}", constant.clone(), persistent=False)

    def _add_option(self, key: str, value: Any) -> None:
        """A constant without a constraint: all of a Uniform's, a RelaxedBernoulli's temperature."""
        alone = not self.constraints and not isinstance(value, bool)
        if isinstance(value, float | Tensor) or (alone and isinstance(value, int)):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            if alone:
                value = value.expand(self.site.shape)
            self.register_buffer(f"constant_{key}", value.clone(), persistent=False)
        self.options[key] = value

    def _check_fit(self, key: str, value: Tensor) -> None:
        if self.constraints[key].event_dim > 1 and value.dim() > 1:  # may be of a lower rank
            self.shapes[key] = (*self.shapes[key][:-1], value.shape[-1])
        try:
            full = value.expand(self.shapes[key])
        except RuntimeError:
            raise ValueError(
                f"Site {self.name!r}: `{key}` has shape {tuple(value.shape)}, which does not fit "
                f"the shape {self.shapes[key]} that {self.site.title} needs here."
            ) from None
        if not bool(self.constraints[key].check(full).all()):
            raise ValueError(
                f"Site {self.name!r}: `{key}` must lie in {self.constraints[key]}, got {value}."
            )

    def _image_of_zero(self, key: str) -> Tensor:
        return transform_to(self.constraints[key])(torch.zeros(self.shapes[key]))

    def _add_net(
        self, key: str, net: Net | nn.Module, inputs: list[Input], outputs: dict[str, Shape]
    ) -> None:
        if isinstance(net, nn.Module):
            module: nn.Module = _Own(net, outputs)
        else:
            try:
                module = net.build(inputs, outputs)
            except ValueError as error:
                raise ValueError(f"Site {self.name!r}: {error}") from None
        self.nets[f"net_{key}" if key else "net"] = module

    def _infer_event(self) -> None:
        """Build the distribution once, to learn its event shape and support."""
        with torch.no_grad():
            parameters = {key: self._image_of_zero(key) for key in self.shapes if self._free(key)}
            parameters |= {key: self._fixed(key) for key in self.shapes if not self._free(key)}
            try:
                d = self._distribution(parameters)
            except Exception as error:
                raise ValueError(
                    f"Site {self.name!r}: {self.site.title} takes no parameters of shapes "
                    f"{self.shapes}: {error or type(error).__name__}"
                ) from error
        self.event_dims = len(d.batch_shape)
        self.prototype = d.to_event(self.event_dims)
        self.event_shape: Shape = tuple(self.prototype.event_shape)

    def _build_flow(self, steps: Sequence[Flow], context: Mapping[str, Shape]) -> Flows:
        try:
            return Flows(steps, self.prototype, math.prod(context["context"]) if context else 0)
        except ValueError as error:
            raise ValueError(f"Site {self.name!r}: {error}") from None

    @property
    def pseudo_inputs(self) -> AtPseudoInputs | None:
        """The net that has the guide's distribution in place of the site's own, if that is so."""
        return next((net for net in self.nets.values() if isinstance(net, AtPseudoInputs)), None)

    def _distribution(self, parameters: Mapping[str, Tensor]) -> Any:
        options = {
            key: getattr(self, f"constant_{key}") if isinstance(value, Tensor) else value
            for key, value in self.options.items()
        }
        return self.site.distribution(**parameters, **options)

    def _free(self, key: str) -> bool:
        return key not in self.learned and not hasattr(self, f"constant_{key}")

    def _fixed(self, key: str) -> Tensor:
        value = (
            transform_to(self.constraints[key])(self.learned[key])
            if key in self.learned
            else getattr(self, f"constant_{key}")
        )
        return value.expand(self.shapes[key])

    @property
    def categories(self) -> int | None:
        """Number of categories if values are indices, else None."""
        base: Any = self.prototype
        while hasattr(base, "base_dist"):
            base = base.base_dist
        return int(base._num_events) if isinstance(base, torch.distributions.Categorical) else None

    @property
    def summable(self) -> bool:
        """Whether the site can be summed out: finitely many values, one variable."""
        return self.event_dims == 0 and bool(self.prototype.has_enumerate_support)

    def assign(self, key: str, value: Tensor) -> None:
        """Set a free parameter, or the rows of a `Table`, to values in the parameter's support.

        Raises:
            ValueError: if the parameter is neither, or the value's shape does not fit.
        """
        tables = [net.rows for net in self.nets.values() if isinstance(net, Lookup)]
        home = next((rows for rows in (self.learned, *tables) if key in rows), None)
        if home is None:
            raise ValueError(
                f"Site {self.name!r} has no free parameter or table of {key!r} to assign to."
            )
        parameter = home[key]
        raw = transform_to(self.constraints[key]).inv(value).to(parameter)
        if raw.shape != parameter.shape:
            raise ValueError(
                f"Site {self.name!r}: {key!r} has shape {tuple(parameter.shape)}, "
                f"got {tuple(raw.shape)}."
            )
        with torch.no_grad():
            parameter.copy_(raw)

    def forward(self, values: Mapping[str, Tensor]) -> Distribution:
        """The distribution given its parents' values, batch dimensions leading in both."""
        parents = [values[name] for name in self.site.given]
        if self.pseudo_inputs is not None:
            return self.pseudo_inputs(*parents)
        raw: dict[str, Tensor] = {}
        for net in self.nets.values():
            raw |= net(*parents)
        raw = {key: _in_full(value) for key, value in raw.items()}
        context = raw.pop("context", None)
        parameters = {
            key: transform_to(self.constraints[key])(raw[key]) if key in raw else self._fixed(key)
            for key in self.shapes
        }
        d = self._distribution(parameters).to_event(self.event_dims)
        return d if self.flow is None else self.flow(d, context)


def _in_full(value: Tensor) -> Tensor:
    """Densities keep their precision where autocast has networks run with less."""
    low = value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low and torch.is_autocast_enabled(value.device.type) else value


class _Own(nn.Module):
    """A user's module as a net: its output, or outputs in the order of the parameters."""

    def __init__(self, module: nn.Module, outputs: Mapping[str, Shape]):
        super().__init__()
        self.module, self.outputs = module, dict(outputs)

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        out = self.module(*values)
        pieces = out if isinstance(out, tuple) else (out,)
        if len(pieces) != len(self.outputs):
            raise ValueError(
                f"{type(self.module).__name__} must return {len(self.outputs)} tensors, for "
                f"{', '.join(self.outputs)}, got {len(pieces)}."
            )
        for (name, shape), piece in zip(self.outputs.items(), pieces, strict=True):
            sizes = zip(reversed(piece.shape), reversed(shape), strict=False)
            if not all(size in (1, wanted) for size, wanted in sizes):
                raise ValueError(
                    f"{type(self.module).__name__} must return `{name}` of shape (*batch, "
                    f"{', '.join(map(str, shape))}), got {tuple(piece.shape)}."
                )
        return dict(zip(self.outputs, pieces, strict=True))
