"""Between two bounds: log p(x) of data that the model itself has drawn, by annealing both ways.

    z*, x ~ p(x, z);   forward chains to the posterior  -->  lower bound of log p(x)
                       chains back from z*              -->  upper bound of log p(x)

z* is an exact draw of p(z | x), which real data do not have. What the gap between the bounds is for
simulated data only suggests what forward annealing misses for real ones, as far as these are like
draws of the model. Source: Grosse, Ghahramani & Adams 2015 (bidirectional Monte Carlo).
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pvae import bounds, exact
from pvae.evaluation.agreement import ROUNDING, counted, mean_and_error
from pvae.evaluation.ais import Plan, ais
from pvae.evaluation.annealing import Schedule
from pvae.evaluation.latents import Start
from pvae.evaluation.result import Evaluation
from pvae.evaluation.shown import Shown
from pvae.fence import evaluating, fenced, resolve_device
from pvae.pair import Batch, Pair, check_pair
from pvae.particles import check_count

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Sandwich", "sandwich"]


@dataclass(frozen=True, repr=False)
class Sandwich(Shown):
    """Lower and upper bounds of log p(x) for simulated data, in nats.

    Args:
        model: name of the model.
        simulated: xarray Dataset over `datum`: `lower` and `upper`, bounds in expectation; and
            `exact`, where log p(x) is known in closed form.
        num_chains: C, chains each way.
        num_temperatures: T.
        real: lower bounds for data that were given, if any were.
        seconds: time it took.
    """

    model: str
    simulated: "xr.Dataset"
    num_chains: int
    num_temperatures: int
    real: Evaluation | None
    seconds: float

    @property
    def gap(self) -> tuple[float, float]:
        """Mean of upper less lower over simulated data, and its standard error."""
        return mean_and_error(self.simulated["upper"] - self.simulated["lower"])

    def summary(self) -> "pd.DataFrame":
        """Both bounds, their gap, and the bound of real data, one row each; means over data."""
        import pandas as pd

        rows = [
            ("lower", *mean_and_error(self.simulated["lower"]), "simulated data, lower bound"),
            ("upper", *mean_and_error(self.simulated["upper"]), "simulated data, upper bound"),
            ("gap", *self.gap, "simulated data, upper less lower"),
        ]
        if "exact" in self.simulated:
            exact = mean_and_error(self.simulated["exact"])
            rows.insert(1, ("log p(x)", *exact, "simulated data, exact"))
        if self.real is not None:
            rows.append(("real", *mean_and_error(self.real.log_p), f"given data, {self.real.kind}"))
        columns = ["", "value", "se (data)", "what it is"]
        return pd.DataFrame(rows, columns=columns).set_index("")

    @property
    def verdict(self) -> str:
        """How well log p(x) is known, in a sentence; or that the bounds cannot both be right."""
        gap, se = self.gap
        size = abs(float(self.simulated["lower"].mean()))
        error = math.hypot(se, ROUNDING * size) if size < math.inf else se
        if gap < -2 * error:
            return self._crossing(gap, error)
        said = f"On data of the model's own {self._apart(gap, se, error)}, in expectation"
        if self.real is None or not gap + 2 * error < math.inf:
            return f"{said}."
        mean, most = float(self.real.log_p.mean()), _rounded_up(gap + 2 * error)
        return (
            f"{said}; if the given data are like these, the lower bound of {mean:.2f} nats for "
            f"them misses no more than about {most} nats. It need not be so."
        )

    def _apart(self, gap: float, se: float, error: float) -> str:
        if math.isinf(gap):
            return "the bounds of log p(x) are infinitely far apart"
        if math.isnan(error):
            return f"the upper bound of log p(x) is {gap:+.2f} nats from the lower, error unknown"
        if gap <= 2 * error:
            return f"the bounds of log p(x) differ by less than {_rounded_up(gap + 2 * error)} nats"
        return f"log p(x) lies between bounds {gap:.2f} +- {se:.2f} nats apart"

    def _crossing(self, gap: float, error: float) -> str:
        said = (
            f"On data of the model's own the bounds of log p(x) cross: the upper one is below the "
            f"lower one by {-gap:.2f} +- {error:.2f} nats"
        )
        if gap < -4 * error:
            return (
                f"{said}, which chance does not explain. Something is wrong with the densities of "
                "the model, or with the support of one of them."
            )
        return f"{said}, more than chance often gives. Simulate more data."

    @property
    def title(self) -> str:
        """One line: model, data, and how they were looked at."""
        chains = counted(self.num_chains, "chain")
        temperatures = counted(self.num_temperatures, "temperature")
        data = counted(self.simulated.sizes["datum"], "simulated datum")
        return f"{self.model}: {chains} each way over {temperatures}, {data}; nats per datum"


def _rounded_up(nats: float) -> str:
    """To a hundredth, so that "no more than" stays true."""
    return f"{math.ceil(100 * nats - 1e-9) / 100:.2f}"


def sandwich(
    model: Pair,
    data: Any = None,
    num_data: int = 100,
    num_chains: int = 16,
    *,
    given: Batch | None = None,
    num_temperatures: int = 1000,
    start: Start = "prior",
    schedule: Schedule = "sigmoid",
    leapfrog_steps: int = 10,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> Sandwich:
    """Bracket log p(x) on simulated data from both sides (Grosse et al. 2015).

    Args:
        model: `LatentModel` or `PyroPair` with continuous latents; a pair must have seen data, or
            be shown them by `given`.
        data: real data, whose lower bound is computed as well, by the same annealing.
        num_data: N, simulated data.
        num_chains: C, chains each way.
        given: values that are conditioned on, if the model has any, (N, *event).
        num_temperatures: T.
        start: "prior" or "guide".
        schedule: "sigmoid", "linear" or "adaptive"; see `ais`.
        leapfrog_steps: L of each proposal.
        seed: of simulated data and draws.
        device: where to run; "auto" is CUDA where there is one.
        compile: see `ais`.
        progress: show a bar.

    Returns:
        Sandwich, in nats.

    Raises:
        ValueError: for data that do not fit the model, or latents that are not continuous.
    """
    import xarray as xr

    began = time.perf_counter()
    check_pair(model)
    check_count("num_data", num_data)
    plan = Plan(
        num_chains, num_temperatures, start, schedule, leapfrog_steps, seed, compile, progress
    )
    place = resolve_device(device)
    with evaluating(model), fenced(seed, place):
        drawn = model.prior_predictive(num_data, given)
    columns = model.columns(model.data_of(drawn, given)).realised()
    posterior = {name: value.unsqueeze(0) for name, value in drawn.items()}
    found, _ = plan.anneal(model, columns, place, posterior=posterior)
    log_w, back = found["log_w"], found["log_w_back"]
    upper = math.log(len(back)) - back.logsumexp(0)
    real = None
    if data is not None:
        settings = asdict(plan)
        real = ais(model, data, settings.pop("num_chains"), device=place, **settings)
    simulated = {
        "lower": (("datum",), bounds.iwae(log_w).numpy()),
        "upper": (("datum",), upper.numpy()),
    }
    if exact.method(model) == "linear-Gaussian":
        values = exact.log_prob(model, model.data_of(drawn, given))
        simulated["exact"] = (("datum",), values.double().cpu().numpy())
    return Sandwich(
        model=model.name,
        simulated=xr.Dataset(simulated),
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        real=real,
        seconds=time.perf_counter() - began,
    )
