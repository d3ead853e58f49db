"""Flows: invertible maps that a latent's draws pass through, so that its density can take any form.

    z = f_T(... f_1(e)),    e ~ the latent's distribution
    log p(z) = log p(e) - sum_t log |det J_t|,    J_t the Jacobian of f_t

(Rezende & Mohamed 2015). A step is written without sizes, `IAF(64)`, like a net. A latent's net
puts out, besides the parameters, a `context` that every step reads (Kingma et al. 2016, algorithm
1): as many numbers as the first step's first layer has units. Without a net each step is one map
for all data. Between two steps the dimensions are reversed. The maps are Pyro's; they keep what
they have last computed, so each distribution gets maps of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.torch_transform import TransformModule
from pyro.distributions.transforms.spline import ConditionalSpline, ConditionedSpline
from pyro.nn import ConditionalAutoRegressiveNN
from pyro.nn.dense_nn import ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["IAF", "MAF", "Flow", "Flows", "SplineCoupling", "is_real"]

BINS, BOUND = 8, 3.0  # of a spline, in each dimension; outside of [-3, 3] it is the identity


@dataclass(frozen=True, init=False)
class Flow:
    """One step of a flow, yet without sizes.

    Args:
        hidden: sizes of the hidden layers of its network.

    Raises:
        ValueError: without layers, or for a size below one.
    """

    hidden: tuple[int, ...]

    def __init__(self, *hidden: int):
        if not hidden or not all(isinstance(size, int) and size > 0 for size in hidden):
            kind = type(self).__name__
            raise ValueError(f"{kind} takes sizes of layers, as in {kind}(64), got {hidden}.")
        object.__setattr__(self, "hidden", tuple(hidden))

    def network(self, size: int, context: int) -> nn.Module:
        """The network that one step needs, for vectors of a size and contexts of another."""
        raise NotImplementedError

    def transform(self, network: "_InContext") -> Any:
        """The step itself, of torch's type `Transform`, with new and empty caches."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The step as plain data."""
        return {"flow": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Flow":
        """Read back what `to_json` wrote, looking only among the flows of this module."""
        kinds = {kind.__name__: kind for kind in (IAF, MAF, SplineCoupling)}
        if data["flow"] not in kinds:
            raise ValueError(
                f"The declaration names the flow {data['flow']!r}, which is not one of pvae's "
                f"({', '.join(kinds)})."
            )
        return kinds[data["flow"]](*data["hidden"])


class _Autoregressive(Flow):
    def network(self, size: int, context: int) -> nn.Module:
        if min(self.hidden) < size:
            raise ValueError(
                f"{type(self).__name__} needs hidden layers of at least as many units as the "
                f"latent has dimensions, {size}; got {self.hidden}."
            )
        order: Any = torch.arange(size)
        network = ConditionalAutoRegressiveNN(size, context, list(self.hidden), permutation=order)
        del network.permutation  # a buffer of indices, for whose elements a graph cannot loop
        return network


@dataclass(frozen=True, init=False)
class IAF(_Autoregressive):
    """z_d = e_d sigma_d(e_<d, context) + mu_d(e_<d, context): for a guide (Kingma et al. 2016).

    To draw takes one pass of the network, and so does the density of what was just drawn; the
    density of any other value takes as many as there are dimensions.
    """

    def transform(self, network: "_InContext") -> Any:
        """See `Flow.transform`."""
        return transforms.AffineAutoregressive(network)


@dataclass(frozen=True, init=False)
class MAF(_Autoregressive):
    """e_d = z_d sigma_d(z_<d, context) + mu_d(z_<d, context): for a prior.

    The inverse of `IAF` (Papamakarios, Pavlakou & Murray 2017): the density of any value takes one
    pass of the network, to draw takes as many as there are dimensions.
    """

    def transform(self, network: "_InContext") -> Any:
        """See `Flow.transform`."""
        return transforms.AffineAutoregressive(network).inv


@dataclass(frozen=True, init=False)
class SplineCoupling(Flow):
    """The first half of e stays; the rest, by splines that depend on it (Durkan et al. 2019).

    Rational linear splines of eight bins on [-3, 3], the identity outside (Dolatabadi et al. 2020).
    One pass of the network in both directions.
    """

    def network(self, size: int, context: int) -> nn.Module:
        """See `Flow.network`."""
        rest = size - size // 2
        outputs = [rest * BINS, rest * BINS, rest * (BINS - 1), rest * BINS]
        return ConditionalDenseNN(size // 2, context, list(self.hidden), param_dims=outputs)

    def transform(self, network: "_InContext") -> Any:
        """See `Flow.transform`."""
        return _SplineCoupling(network)


class _SplineCoupling(transforms.SplineCoupling):
    """Pyro's, without the parameters that it would draw for the half which stays."""

    def __init__(self, network: "_InContext"):
        TransformModule.__init__(self, cache_size=1)
        self.split_dim, self.identity = network.size, True
        rest = network.network.param_dims[0] // BINS
        self.upper_spline = _Splines(network, rest, BINS, BOUND)


class _Splines(ConditionalSpline):
    def condition(self, context: Tensor) -> "_Spline":
        return _Spline(partial(self._params, context), self.bound, self.order)


class _Spline(ConditionedSpline):
    """Pyro's, which selects the values outside by a mask: their number would be part of a graph."""

    def spline_op(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y, log_det = super().spline_op(x.clamp(-self.bound, self.bound), **kwargs)
        inside = x.abs() <= self.bound
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)


class _Reverse(transforms.Transform):
    """Dimensions in the opposite order.

    Not Pyro's `Permute`: torch 2.15's inductor gets the gradient of its `index_select` wrong.
    """

    domain = codomain = constraints.real_vector
    bijective = volume_preserving = True

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.flip(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])


class _InContext:
    """A network of Pyro's with its context filled in."""

    def __init__(self, network: Any, context: Tensor):
        self.network, self.context, self.size = network, context, network.input_dim
        self.permutation = range(self.size)  # the order in which Pyro's maps are inverted

    def __call__(self, x: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):  # densities keep their precision
            return self.network(x.to(self.context), self.context)  # Pyro's zeros are of float32


def is_real(support: Any) -> bool:
    """Whether a support is all real numbers, or vectors or arrays of them."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


class Flows(nn.Module):
    """The steps of one latent, their sizes known.

    Args:
        steps: declared.
        base: a distribution of the kind that they will be given.
        context: size of what the steps read besides, 0 for nothing.

    Raises:
        ValueError: for draws that are no real vectors, or layers too small for them.
    """

    def __init__(self, steps: Sequence[Flow], base: Any, context: int):
        super().__init__()
        shape = tuple(base.event_shape)
        if len(shape) != 1 or shape[0] < 2 or not is_real(base.support):
            raise ValueError(
                "A flow maps real vectors of at least two dimensions, got draws of event shape "
                f"{shape} in {base.support}."
            )
        self.steps, (self.size,) = tuple(steps), shape
        self.networks = nn.ModuleList(step.network(self.size, context) for step in steps)

    def forward(self, base: Any, context: Tensor | None) -> Any:
        """The distribution of what draws from the base become."""
        if context is None:
            context = next(self.parameters()).new_empty(0)
        maps: list[Any] = []
        for step, network in zip(self.steps, self.networks, strict=True):
            maps += [_Reverse(cache_size=1)] if maps else []
            maps.append(step.transform(_InContext(network, context)))
        batch = torch.broadcast_shapes(base.batch_shape, context.shape[:-1])
        return _Flowed(base.expand(batch), maps)


class _Flowed(dist.TransformedDistribution):
    """Takes values of fewer batch dimensions, as where a parent is enumerated."""

    def log_prob(self, value: Tensor) -> Tensor:
        size = value.shape[-1:]
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + size)
        # A view of a draw is another tensor, and would be inverted anew.
        return super().log_prob(value if value.shape == shape else value.expand(shape))
