"""A site with its sizes known, as a module: values of the parents -> distribution over the event.

    Site, shapes of its parents  --SiteModule-->  nets, free parameters and constants, by parameter

A net's outputs and free parameters are unconstrained, and mapped into each parameter's support by
`torch.distributions.transform_to`.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, transform_to

from pvae.flows import Flow, Flows
from pvae.nets import Input, Lookup, Net, Shape
from pvae.priors import AtPseudoInputs
from pvae.sites import Latent, Learned, Predicted, Site, as_shape

__all__ = ["ALTERNATIVES", "SiteModule", "split_parameters"]

# Parametrisations of one thing, the preferred first: torch takes one of each group.
ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
)


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
        self.prior: tuple[SiteModule, ...] = ()  # a tuple, so that its parameters stay the model's

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

    def multiply(self, prior: "SiteModule") -> None:
        """Make a guide's entry the product of itself and the model's prior.

        Raises:
            ValueError: unless that is a Normal of the same shape.
        """
        plain = prior.pseudo_inputs is None and prior.flow is None
        kinds = [(site.distribution, site.shape) for site in (self.site, prior.site)]
        if not plain or kinds[0] != kinds[1]:
            raise ValueError(
                f"Guide entry {self.name!r} multiplies the prior, which must be a Normal of shape "
                f"{self.site.shape} without flow or PseudoInputs; it is {prior.site.title} of "
                f"shape {prior.site.shape}."
            )
        self.prior = (prior,)

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
        for prior in self.prior:
            own: Any = prior(values)
            parameters = _product(parameters, own.base_dist if self.event_dims else own)
        d = self._distribution(parameters).to_event(self.event_dims)
        return d if self.flow is None else self.flow(d, context)


def _product(own: Mapping[str, Tensor], prior: Any) -> dict[str, Tensor]:
    """Of two Normals: means weighted by precisions, which add up.

    Written by ratios of scales, none above one: precisions themselves overflow.
    """
    both = torch.hypot(own["scale"], prior.scale)
    of_prior, of_own = own["scale"] / both, prior.scale / both
    loc = of_own.square() * own["loc"] + of_prior.square() * prior.loc
    return {"loc": loc, "scale": own["scale"] * of_own}


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
