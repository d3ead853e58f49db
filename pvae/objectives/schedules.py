"""Schedules of the KL weight: functions from the number of steps taken to beta.

Any such function will do; these two are the ones in use. They print as they are written, so that a
run's settings tell how it was made.
"""

from dataclasses import dataclass

from pvae.particles import check_count

__all__ = ["Cyclical", "WarmUp"]


@dataclass(frozen=True)
class WarmUp:
    """From `start` to 1 in a straight line, then 1 (Bowman et al. 2016; Sønderby et al. 2016).

    Args:
        steps: in which it rises.
        start: where it begins.
    """

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if not 0 <= self.start <= 1:
            raise ValueError(f"`start` must be a weight in [0, 1], got {self.start}.")

    def __call__(self, step: int) -> float:
        """beta after this many steps."""
        return self.start + (1 - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Cyclical:
    """Several times from 0 to 1 in a straight line, and on at 1 (Fu et al. 2019, eq. 6); then 1.

    Args:
        steps: of all cycles together.
        cycles: M.
        rise: R, the share of each cycle in which it rises.
    """

    steps: int
    cycles: int = 4
    rise: float = 0.5

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("cycles", self.cycles)
        if not 0 < self.rise <= 1:
            raise ValueError(f"`rise` must be a share in (0, 1], got {self.rise}.")

    def __call__(self, step: int) -> float:
        """beta after this many steps."""
        if step >= self.steps:
            return 1.0
        within = step % (self.steps / self.cycles) / (self.steps / self.cycles)
        return min(1.0, within / self.rise)
