"""Sites of a declared model: a distribution class, an event shape, and its parameters.

    Latent(Normal, 50)                                        N(0, I)
    Observed(Bernoulli, 784, given="z", net=MLP(200, 200))    logits are outputs of the net
    Observed(Normal, 64, given="z", net=Linear(), scale=Learned(0.1))
    Latent(Normal, 50, given="x", net=MLP(200, 200), flow=IAF(64))    its draws pass through a flow
    Latent(Normal, 50, given="x", net=MLP(200, 200), times_prior=True)    q(z | x) ~ p(z) N(z; ...)

Each parameter named in the distribution's own `arg_constraints` is one of: a constant, a free
parameter (`Learned`), an output of the site's net or of a net of its own (`Predicted`), or, with
none of these, the image of zero. Free and predicted ones are mapped into the parameter's support by
`torch.distributions.transform_to`: exp for a scale, the identity for logits, softmax for a simplex.
So N(0, I) and the uniform Categorical are what zeros mean, and any distribution works.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import pyro.distributions as pyro_distributions
import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from pvae.flows import Flow
from pvae.nets import Net, Shape

__all__ = ["Given", "Latent", "Learned", "Observed", "Predicted", "Site", "as_shape"]


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
        times_prior: in a guide, whether the Normal declared here is multiplied by the model's own
            Normal of the same latent, given what has been drawn above it: q(z | x, z') is
            proportional to p(z | z') N(z; m(x), s(x)^2) (Sønderby et al. 2016, eq. 11 to 13). The
            model's net for z then learns from both uses: where an objective has two goals (PIWAE,
            CUBO, ForwardKL, wake and sleep), from the model's in the one and the guide's in the
            other; and the bias of IWAE's "stl" reaches it.

    Raises:
        TypeError: for a step that is none.
        ValueError: for `times_prior` of a distribution other than Normal, or beside a flow.
    """

    flow: tuple[Flow, ...] = ()
    times_prior: bool = False

    def __init__(
        self,
        *args: Any,
        flow: Flow | Sequence[Flow] = (),
        times_prior: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if times_prior and (flow or self.distribution is not Normal):
            raise ValueError(
                "`times_prior` is for a Normal without a flow, whose product with another Normal "
                f"is known, got {self.distribution.__name__}{' through a flow' if flow else ''}."
            )
        steps = (flow,) if isinstance(flow, Flow) else tuple(flow)
        for step in steps:
            if not isinstance(step, Flow):
                raise TypeError(f"`flow` takes steps such as pvae.flows.IAF(64), got {step!r}.")
        object.__setattr__(self, "flow", steps)
        object.__setattr__(self, "times_prior", times_prior)

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
