"""The VampPrior: a prior made of the guide itself (Tomczak & Welling 2018).

    p(z) = 1/K sum_k q(z | u_k),    u_k learned pseudo-inputs, of the data's shape

The prior that maximises the ELBO is the aggregate posterior, 1/N sum_n q(z | x_n); K pseudo-inputs
stand for the N data. Declared, it is a latent k that is summed out, and a net for z given k:

    k=Latent(Categorical, 500),
    z=Latent(Normal, 40, given="k", net=PseudoInputs()),    p(z | k) = q(z | u_k)
    ...
    guide={"z": Latent(Normal, 40, given="x", net=MLP(300, 300))},
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pvae.nets import Input, Net, Shape

__all__ = ["AtPseudoInputs", "PseudoInputs"]


@dataclass(frozen=True)
class PseudoInputs(Net):
    """The guide's distribution of the same latent, at one pseudo-input for each category.

    Pseudo-inputs start as standard Normal draws, mapped to where the data lie: into (0, 1) for
    Bernoulli pixels.
    """

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`.

        Raises:
            ValueError: unless there is one parent, a single index.
        """
        shapes = [i.shape for i in inputs]
        if shapes != [()] or inputs[0].categories is None:
            raise ValueError(
                "PseudoInputs needs one Categorical parent (event shape ()), whose categories "
                f"number them, got parents of event shapes {shapes}."
            )
        return AtPseudoInputs(inputs[0].categories)


class AtPseudoInputs(nn.Module):
    """What `PseudoInputs` builds: k -> q(z | u_k), once the guide is there.

    Args:
        count: K.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        self.raw = nn.ParameterDict()
        self.ranges: dict[str, Any] = {}
        self.guide: tuple[nn.Module, ...] = ()  # a tuple, so that its parameters stay the guide's

    def connect(self, guide: nn.Module, parents: Mapping[str, tuple[Input, Any]]) -> None:
        """Make the pseudo-inputs.

        Args:
            guide: q(z | ...) as a function of its parents' values.
            parents: for each of them its shape, and the support of its values.

        Raises:
            ValueError: for a parent whose values are indices.
        """
        self.guide = (guide,)
        for name, (parent, support) in parents.items():
            if parent.categories is not None:
                raise ValueError(
                    f"The guide reads {name!r}, which is an index: pseudo-inputs are real numbers."
                )
            self.ranges[name] = _hull(support)
            self.raw[name] = nn.Parameter(torch.randn(self.count, *parent.shape))

    def values(self) -> dict[str, Tensor]:
        """The pseudo-inputs u, (K, *event) for each parent of the guide's entry."""
        return {name: transform_to(self.ranges[name])(raw) for name, raw in self.raw.items()}

    def forward(self, k: Tensor) -> Any:
        """q(z | u_k)."""
        (guide,) = self.guide
        return guide({name: u[k.long()] for name, u in self.values().items()})


def _hull(support: Any) -> Any:
    """Real numbers between the values of a discrete support; a continuous one as it is."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return constraints.unit_interval
    return constraints.nonnegative if support.is_discrete else support
