"""As many particles as each datum needs for a standard error that is asked for.

    standard errors of a pilot  --needed-->  K of each datum  --own_draws-->  bounds of fresh draws

The pilot's own draws are not used again: stopping as soon as draws look good enough favours those
which lack the large weights, and the bound would be low for it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pvae.evaluation.kept import Kept
from pvae.pair import Columns, Pair
from pvae.particles import check_count
from pvae.passes import How, speed_for

__all__ = ["Target", "own_draws"]

MOST = 100  # times the pilot's particles
MARGIN = 1.5  # of particles, since the pilot's error is an estimate


@dataclass(frozen=True)
class Target:
    """A standard error over draws to reach, and what it may cost.

    Args:
        se: nats.
        num_particles: K of the pilot, and the fewest of each datum.
        max_particles: most of each datum; 100 K where left out.

    Raises:
        ValueError: for an error that is not above zero, or a limit below K.
    """

    se: float
    num_particles: int
    max_particles: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.se < math.inf:
            raise ValueError(f"`target_se` must be above zero, in nats; got {self.se}.")
        if self.max_particles is not None:
            check_count("max_particles", self.max_particles)
            if self.max_particles < self.num_particles:
                raise ValueError(
                    f"`max_particles` must be at least `num_particles`, {self.num_particles}, with "
                    f"which all data begin; got {self.max_particles}."
                )

    @property
    def most(self) -> int:
        """Particles of a datum."""
        return self.max_particles or MOST * self.num_particles

    def needed(self, se: Tensor) -> Tensor:
        """Particles of each datum, (N,): K times a power of two, or the most.

        Errors fall as K^-1/2.
        """
        ratio = (MARGIN * (se / self.se).square()).nan_to_num(math.inf, math.inf)
        found = self.num_particles * 2.0 ** ratio.log2().ceil().clamp(min=0)
        return found.clamp(max=self.most).long()


def own_draws(
    model: Pair,
    columns: Columns,
    needed: Tensor,
    how: How,
    compile: bool | Literal["auto"],
    progress: bool,
) -> dict[str, Tensor]:
    """Bounds and diagnostics of each datum from so many draws of its own, (N,) each."""
    found: dict[str, Any] = {"draws": needed}
    for size in needed.unique().tolist():
        index = (needed == size).nonzero()[:, 0]
        some = columns.subset(index.to(columns.tensors()[0].device))
        kept = Kept([size], how).run(model, some, speed_for(size * len(some), compile), progress)
        for name, value in kept.columns().items():
            key = {"bound": "bound_own", "bound_se": "bound_own_se"}.get(name, name)
            if key in ("bound_own", "bound_own_se", "ess", "khat", "psis", "cubo"):
                whole = found.setdefault(key, value.new_zeros(len(needed)))
                whole[index] = value.reshape(-1)
    return found
