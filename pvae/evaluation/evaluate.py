"""Importance sampling of log p(x): one pass of weights, and everything that is a function of it.

pair, data  --weigh-->  (K, n) weights, block by block of data  --bounds-->  Evaluation
"""

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from pvae import exact
from pvae.declare import LatentModel
from pvae.evaluation.enough import Target, own_draws
from pvae.evaluation.kept import Kept, measure_of
from pvae.evaluation.quantity import quantity
from pvae.evaluation.result import Evaluation
from pvae.fence import evaluating, fenced, resolve_device
from pvae.pair import Pair, check_pair, placed
from pvae.particles import check_count
from pvae.passes import How, Proposal, speed_for
from pvae.refinement import ALONE

__all__ = ["evaluate"]

GRID = (1, 5, 50, 500, 5000, 50_000)


def evaluate(
    model: Pair,
    data: Any,
    num_particles: int = 5000,
    *,
    grid: Sequence[int] | None = None,
    proposal: Proposal | None = None,
    points: Literal["random", "sobol"] = "random",
    target_se: float | None = None,
    max_particles: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> Evaluation:
    """Evaluate log p(x): ELBO and IWAE bounds on a grid of K, k-hat, ESS, KL and active units.

    One matrix of weights serves the whole grid: L_k is averaged over its disjoint blocks of k rows.
    Where log p(x) is exact in closed form (`exact.method` "enumeration" or "linear-Gaussian") it is
    reported beside the bounds; where every latent is summed out, instead of them. So it is by
    quadrature, where that begins with no more points than K: 2,049 for one latent dimension, 16,641
    for two. With fewer particles it is left to `exact.log_prob`. The model is left as it was, and
    so is the caller's random state.

    Args:
        model: `LatentModel` or `PyroPair`.
        data: (N, *event), or columns by name; noise of a training split is drawn once.
        num_particles: K, drawn exactly, in memory that does not grow with it up to four million,
            the weights of a single datum that are held at once.
        grid: sizes k <= K of the bounds; 1, 5, 50, ... and K where left out.
        proposal: "guide" (default); "prior" for naive Monte Carlo, whose k-hat says why not;
            "defensive", nine parts of the one and one of the other: its weights are bounded by
            10 p(x | z), so that a mode which the guide misses shows; or "refined", the guide after
            fifty steps of Adam on each datum's own variational parameters. `Refine` has other
            settings; `Refine(200, 8, 0.1, "ELBO")` is the default where the guide is "per-datum".
        points: "random"; or "sobol" for randomised quasi-Monte Carlo: eight sets of K / 8 Sobol
            points, each shifted at random, which fill space more evenly. They gain most where K / 8
            is a power of two and latents are few; each site needs a quantile function. Standard
            errors then rest on eight numbers: 95 % of a t distribution lie within 2.36 of them.
        target_se: standard error over draws that each datum's bound is to have, in nats. K
            particles then tell how many each datum needs, and so many are drawn afresh.
        max_particles: most of those, 100 K where left out. `Evaluation.not_reached` has the data
            for which they were not enough, or for which the first K told too small an error.
        seed: of the draws.
        device: where to run; "auto" is CUDA where there is one.
        compile: whether weights are drawn by a compiled graph, read once out of Pyro (`passes`).
            That takes some seconds on a CPU, and changes the last bits of results. "auto" compiles
            where ten million weights or more are drawn; where 400,000 are, it runs the graph that
            is read, whose results are Pyro's own to the last bit.
        progress: show a bar.

    Returns:
        Evaluation, in nats.

    Raises:
        ValueError: for data that do not fit the model, K below 1, a grid outside 1..K, or a
            proposal or points that the model's sites do not allow.
        FloatingPointError: where log p(x) comes out as NaN or infinite, naming the datum.
    """
    start = time.perf_counter()
    check_pair(model)
    check_count("num_particles", num_particles)
    drawn = How.of(proposal or (ALONE if model.per_datum else "guide"), points)
    target = None if target_se is None else Target(target_se, num_particles, max_particles)
    if target is not None and drawn.replicates and (most := target.most) % drawn.replicates:
        raise ValueError(
            f"`max_particles` must be a multiple of {drawn.replicates} with Sobol points, got "
            f"{most}."
        )
    if target is None and max_particles is not None:
        raise ValueError("`max_particles` is the limit of `target_se`; give that as well.")
    kept = Kept(_grid(grid, num_particles, drawn), drawn)
    place = resolve_device(device)
    columns = model.columns(data).realised()
    with placed(model, columns, place) as on_device:
        how = exact.method(model)
        more = _exact(model, data, how, num_particles)
        speed = speed_for(num_particles * len(columns), compile)
        with evaluating(model), fenced(seed, place):
            if how != "enumeration":
                kept.run(model, on_device, speed, progress)
                if target is not None:
                    needed = target.needed(kept.columns()["bound_se"][-1])
                    more |= own_draws(model, on_device, needed, drawn, compile, progress)
            first = on_device.rows(slice(0, 1))
            measure, dimensions = kept.measure or measure_of(model.draw(first))
    more |= columns.log_jacobian(model.given)
    per_datum, per_unit = kept.datasets(more)
    _check_finite(model, per_datum)
    return Evaluation(
        model=model.name,
        spec=columns.main.spec,
        measure=measure,
        **quantity(model, columns, dimensions),
        num_particles=0 if how == "enumeration" else num_particles,
        proposal=drawn.name,
        per_datum=per_datum,
        per_unit=per_unit,
        seconds=time.perf_counter() - start,
        target_se=target_se,
        parameters=model.fingerprint(),
        seed=seed,
    )


def _exact(model: Pair, data: Any, how: str | None, num_particles: int) -> dict[str, torch.Tensor]:
    """log p(x) itself, where it costs no more than about the draws do."""
    if how is None:
        return {}
    if how == "quadrature" and isinstance(model, LatentModel):
        if exact.quadrature_points(model) > num_particles:
            return {}
        try:
            return {"exact": exact.log_prob(model, data).double()}
        except exact.Intractable:  # it has not converged, which says nothing against the bounds
            return {}
    return {"exact": exact.log_prob(model, data).double()}


def _grid(grid: Sequence[int] | None, num_particles: int, how: How) -> list[int]:
    most = num_particles - 1
    if how.replicates is not None:
        most, rest = divmod(num_particles, how.replicates)
        if rest:
            raise ValueError(
                f"`num_particles` must be a multiple of {how.replicates} with Sobol points, best "
                f"{how.replicates} times a power of two; got {num_particles}."
            )
    if grid is None:
        return sorted({size for size in GRID if size <= most} | {num_particles})
    if bad := [size for size in grid if not 1 <= size <= num_particles]:
        raise ValueError(f"`grid` must lie in 1..{num_particles}, the particles drawn; got {bad}.")
    if how.replicates is not None and (bad := [k for k in grid if most < k < num_particles]):
        raise ValueError(f"With Sobol points `grid` must lie in 1..{most}, or be K; got {bad}.")
    return sorted({*grid, num_particles})


def _check_finite(model: Pair, per_datum: Any) -> None:
    for name in {"bound", "bound_own", "exact"} & set(per_datum):
        rows = per_datum[name].values.reshape(-1, per_datum.sizes["datum"])
        bad = (~(rows < math.inf).all(0)).nonzero()[0]  # a density of zero, -inf, is none of these
        if len(bad):
            raise FloatingPointError(
                f"log p(x) of {model.name!r} is NaN or infinite for {len(bad)} of {rows.shape[1]} "
                f"data, the first is datum {bad[0]}. Look at that datum, and whether the model's "
                "parameters are finite."
            )
