"""log p(x) where it is tractable, in nats: what every bound can be held against.

    enumeration       every latent is discrete and summable
    linear-Gaussian   Normal sites, means affine in their parents, scales that depend on none;
                      where some latents are summable, given each of their values in turn
    quadrature        at most two real latent dimensions, discrete latents summed out

`log_prob` takes the first that applies, and refuses otherwise.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, constraints

from pvae.declare import LatentModel
from pvae.fence import evaluating, fenced, module_device
from pvae.nets import Linear
from pvae.pair import Batch, Columns, Pair, check_pair
from pvae.particles import draw
from pvae.passes import blocks
from pvae.site_module import SiteModule
from pvae.sites import Predicted

__all__ = [
    "Intractable",
    "completed",
    "linear_gaussian",
    "log_prob",
    "method",
    "posterior",
    "quadrature",
    "quadrature_points",
]

POINTS = {1: 2049, 2: 129}  # of each latent dimension, to begin with
MOST_POINTS = {1: 2**17 + 1, 2: 2**11 + 1}
CONVERGED = 1e-3  # nats between a grid and each of those of every second point of it
MAX_ROWS = 100_000  # rows of a site's distribution in memory at once
NEGLIGIBLE = 35.0  # nats below the largest value of the integrand


class Intractable(ValueError):
    """log p(x) of the model has no exact value here; use `pvae.evaluate` for bounds."""


def method(model: Pair) -> str | None:
    """How `log_prob` would compute: "enumeration", "linear-Gaussian", "quadrature" or None."""
    if not isinstance(model, LatentModel):
        return None
    continuous = [name for name in model.latents if not model.module_of(name).summable]
    if not continuous:
        return "enumeration"
    summed = {name for name in model.latents if name not in continuous}
    if all(_is_linear_gaussian(module, summed) for module in _modules(model)):
        return "linear-Gaussian"
    real = all(_is_real(model.module_of(name).prototype.support) for name in continuous)
    size = sum(math.prod(model.inputs[name].shape) for name in continuous)
    return "quadrature" if real and size <= 2 else None


def quadrature_points(model: LatentModel) -> int:
    """How many values of the latents `quadrature` begins with for each datum."""
    names = [name for name in model.latents if not model.module_of(name).summable]
    dims = sum(math.prod(model.inputs[name].shape) for name in names)
    return POINTS[dims] ** dims


def log_prob(model: Pair, data: Any) -> Tensor:
    """log p(x) of each datum, exactly.

    Args:
        model: a declared model.
        data: (N, *event), or columns by name.

    Returns:
        (N,), nats.

    Raises:
        Intractable: where none of the methods applies.
        ValueError: for data that do not fit the model.
    """
    check_pair(model)
    how = method(model)
    if how is None or not isinstance(model, LatentModel):
        raise Intractable(
            f"log p(x) of {model.name!r} is not tractable: it has latents that cannot be "
            "enumerated, it is not linear-Gaussian, and quadrature takes at most two real latent "
            "dimensions of a declared model. Use pvae.evaluate for bounds and estimates."
        )
    if how == "linear-Gaussian":
        return _given_each(model, data).logsumexp(0)
    return enumeration(model, data) if how == "enumeration" else quadrature(model, data)


def _columns(model: LatentModel, data: Any) -> Columns:
    return model.columns(data).realised().to(module_device(model))


def _modules(model: LatentModel) -> list[SiteModule]:
    return [model.module_of(name) for name in (*model.latents, *model.observed)]


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _nothing(batch: Batch) -> None:
    """A guide that draws nothing, so that discrete latents are summed out."""


# ------------------------------------------------------------------------------ enumeration


def enumeration(model: LatentModel, data: Any) -> Tensor:
    """log sum_c p(c) p(x | c), (N,), nats, for a model all of whose latents are summable."""
    columns = _columns(model, data)
    values = []
    with evaluating(model), fenced(None, module_device(model)):
        for rows, _ in blocks(len(columns), 1, MAX_ROWS // model.categories, MAX_ROWS):
            batch = columns.rows(rows)
            values.append(draw(model.model, _nothing, (batch,), plates=model.plates).log_weights[0])
    return torch.cat(values)


# ------------------------------------------------------------------------------ linear-Gaussian


def _is_linear_gaussian(module: SiteModule, summed: set[str]) -> bool:
    """Whether it is, given the latents that are summed out."""
    site = module.site
    only_summed = set(site.given) <= summed
    if module.name in summed:
        return only_summed
    if site.title not in ("Normal", "MultivariateNormal") or module.flow is not None:
        return False
    if only_summed:
        return True
    predicted = [key for key, value in site.parameters.items() if isinstance(value, Predicted)]
    if predicted or site.net is None:
        return not predicted
    filled = [key for key in module.shapes if key not in site.parameters]
    return isinstance(site.net, Linear) and filled == ["loc"]


def _given_each(model: LatentModel, data: Any) -> Tensor:
    """log p(c) p(x | c) for each value c of the summed latents together, (C, N)."""
    joint = []
    with evaluating(model):
        for c in _summed_values(model):
            log_p = sum(model.module_of(name)(c).log_prob(c[name]) for name in c)
            joint.append(log_p + _observed(linear_gaussian(model, data, c), data, model))
    return torch.stack(joint)


def _summed_values(model: LatentModel) -> Iterator[dict[str, Tensor]]:
    """Each value of the summed latents together, (1,) by name."""
    names = [name for name in model.latents if model.module_of(name).summable]
    supports = [model.module_of(name).prototype.enumerate_support() for name in names]
    for values in product(*(support.unsqueeze(1) for support in supports)):
        yield dict(zip(names, values, strict=True))


def linear_gaussian(
    model: LatentModel, data: Any, summed: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every site as offset + A eps, eps ~ N(0, I) shared by all sites.

    Args:
        model: a model whose method is "linear-Gaussian".
        data: columns; only those that are conditioned on matter.
        summed: the value of each latent that is summed out, (1,).

    Returns:
        By site the offset (N or 1, d) and A (d, size of eps), in float64.
    """
    batch = _columns(model, data).rows(slice(None))
    given = {name: batch[name] for name in model.given} if isinstance(batch, dict) else {}
    given |= summed or {}
    noise_size = sum(math.prod(model.inputs[n].shape) for n in (*model.latents, *model.observed))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    start = 0
    with evaluating(model):
        for module in _modules_in_order(model):
            if module.name in given:
                continue
            shape, size = module.event_shape, math.prod(module.event_shape)
            at_offset = module(_parents(module, found, given, None, model))
            moved = module(_parents(module, found, given, noise_size, model))
            offset = at_offset.mean.reshape(-1, size).double()
            A = (moved.mean.reshape(-1, size).double() - offset[:1]).T
            A = A.expand(size, noise_size).clone()
            A[:, start : start + size] += _noise(at_offset, size)
            start += size
            found[module.name] = (offset.reshape(-1, *shape), A)
    return found


def _modules_in_order(model: LatentModel) -> Iterator[SiteModule]:
    return (model.module_of(name) for name in model.sites if name not in model.given)


def _parents(
    module: SiteModule,
    found: dict[str, tuple[Tensor, Tensor]],
    given: dict[str, Tensor],
    noise_size: int | None,
    model: LatentModel,
) -> dict[str, Tensor]:
    """Parents' values at eps = 0, (N or 1, ...), or at each unit vector eps_j, of one datum."""
    values = {}
    for name in module.site.given:
        if name in given:
            values[name] = given[name] if noise_size is None else given[name][:1]
            continue
        offset, A = found[name]
        if noise_size is not None:
            offset = offset[:1] + A.T.reshape(noise_size, *model.inputs[name].shape)
        values[name] = offset.to(next(model.parameters()).dtype)
    return values


def _noise(d: Distribution, size: int) -> Tensor:
    if isinstance(d, MultivariateNormal):
        return d.scale_tril.reshape(-1, size, size)[0].double()
    return d.stddev.reshape(-1, size)[0].double().diag()


def _joint(
    found: dict[str, tuple[Tensor, Tensor]], data: Any, model: LatentModel
) -> tuple[Tensor, Tensor, Tensor]:
    """x - its mean (N, D), NaN where missing, A of x (D, size of eps), and its covariance."""
    batch = _columns(model, data).rows(slice(None))
    named: Any = batch if isinstance(batch, dict) else {model.observed[0]: batch}
    x = torch.cat([named[n].flatten(1).double() for n in model.observed], 1)
    mean = [found[n][0].flatten(1).expand(len(x), -1) for n in model.observed]
    A = torch.cat([found[n][1] for n in model.observed])
    return x - torch.cat(mean, 1), A, A @ A.T


def _by_pattern(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (n,) of which the same entries are seen, and the numbers of these entries."""
    patterns, which = torch.unique(~x.isnan(), dim=0, return_inverse=True)
    for number, seen in enumerate(patterns):
        yield (which == number).nonzero().squeeze(1), seen.nonzero().squeeze(1)


def _observed(found: dict[str, tuple[Tensor, Tensor]], data: Any, model: LatentModel) -> Tensor:
    centred, _, C = _joint(found, data, model)
    value = centred.new_zeros(len(centred))
    for rows, seen in _by_pattern(centred):
        if len(seen):
            x, L = centred[rows][:, seen], torch.linalg.cholesky(C[seen][:, seen])
            value[rows] = MultivariateNormal(torch.zeros_like(x[0]), scale_tril=L).log_prob(x)
    return value.to(next(model.parameters()).dtype)


def posterior(model: LatentModel, data: Any) -> dict[str, MultivariateNormal]:
    """p(z | x) of each latent of a linear-Gaussian model, events flattened (Bishop 2006, 2.116).

    Args:
        model: a declared model whose method is "linear-Gaussian".
        data: (N, *event), or columns by name.

    Returns:
        By latent a `MultivariateNormal` of batch shape (N,), in the model's dtype.

    Raises:
        Intractable: for any other model.
    """
    some_summed = any(model.module_of(name).summable for name in model.latents)
    if method(model) != "linear-Gaussian" or some_summed:
        raise Intractable(
            f"p(z | x) of {model.name!r} is known in closed form for linear-Gaussian models only: "
            "Normal sites, Linear nets for their means, scales that depend on no parent."
        )
    found = linear_gaussian(model, data)
    centred, A, C = _joint(found, data, model)
    dtype = next(model.parameters()).dtype
    result = {}
    for name in model.latents:
        offset, A_z = found[name]
        mean = offset.flatten(1).expand(len(centred), -1).clone()
        covariances: list[Tensor] = []
        which = torch.zeros(len(mean), dtype=torch.long, device=mean.device)
        for rows, seen in _by_pattern(centred):
            A_x, L = A[seen], torch.linalg.cholesky(C[seen][:, seen])
            gain = torch.cholesky_solve(A_x @ A_z.T, L).T
            mean[rows] += centred[rows][:, seen] @ gain.T
            which[rows] = len(covariances)
            covariances.append(A_z @ A_z.T - gain @ A_x @ A_z.T)
        S = torch.stack(covariances)
        S = S[which] if len(S) > 1 else S[0]
        S = (S + S.mT) / 2
        result[name] = MultivariateNormal(mean.to(dtype), S.to(dtype))
    return result


def completed(model: LatentModel, data: Any, num_samples: int) -> tuple[Tensor, Tensor]:
    """What was not seen given what was, of all observed sites in a row (Bishop 2006, 2.81, 2.82).

    Args:
        model: a model whose method is "linear-Gaussian".
        data: columns, NaN where entries are missing.
        num_samples: S.

    Returns:
        E[x | x_seen], (N, D), and draws of x given x_seen, (S, N, D), in float64.
    """
    log_p = _given_each(model, data)
    weights = log_p.double().softmax(0)
    chosen = torch.multinomial(weights.T, num_samples, replacement=True).T
    mean, drawn = torch.zeros(()), torch.zeros(())
    for number, c in enumerate(_summed_values(model)):
        found = linear_gaussian(model, data, c)
        centred, _, C = _joint(found, data, model)
        offset = torch.cat([found[n][0].flatten(1) for n in model.observed], 1)
        own, draws = _conditional(centred, C, num_samples)
        mean = mean + weights[number, :, None] * (offset + own)
        drawn = torch.where((chosen == number).unsqueeze(-1), offset + draws, drawn)
    return mean, drawn


def _conditional(x: Tensor, C: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """N(0, C) given what of x (N, D) is not NaN: the mean (N, D), and draws (S, N, D)."""
    mean, draws = x.clone(), x.expand(num_samples, *x.shape).clone()
    for rows, seen in _by_pattern(x):
        absent = x[rows[0]].isnan().nonzero().squeeze(1)
        L = torch.linalg.cholesky(C[seen][:, seen])
        gain = torch.cholesky_solve(C[seen][:, absent], L).T
        own = x[rows][:, seen] @ gain.T
        spread = torch.linalg.cholesky(C[absent][:, absent] - gain @ C[seen][:, absent])
        mean[rows[:, None], absent] = own
        noise = torch.randn(num_samples, *own.shape, dtype=x.dtype, device=x.device)
        draws[:, rows[:, None], absent] = own + noise @ spread.T
    return mean, draws


# ------------------------------------------------------------------------------ quadrature


def quadrature(model: LatentModel, data: Any) -> Tensor:
    """log of the integral of p(x | z) p(z) over z by the trapezoid rule on a box found per datum.

    The box starts at twelve standard deviations of the prior and shrinks to where the integrand
    lies within 35 nats of its largest value; the grid is refined until every second point of it
    would do. Modes narrower than a hundredth of the prior's width and far from the largest one may
    be missed.

    Args:
        model: a declared model with at most two real latent dimensions.
        data: (N, *event), or columns by name.

    Returns:
        (N,), nats.

    Raises:
        Intractable: for more dimensions, or where the rule has not converged.
    """
    if method(model) not in ("quadrature", "linear-Gaussian"):
        raise Intractable(f"Quadrature takes at most two real latent dimensions: {model.name!r}.")
    names = [name for name in model.latents if not model.module_of(name).summable]
    dims = sum(math.prod(model.inputs[name].shape) for name in names)
    if dims not in POINTS:
        raise Intractable(f"Quadrature takes at most two real latent dimensions, got {dims}.")
    columns = _columns(model, data)
    points = POINTS[dims] ** dims
    values = []
    with evaluating(model), fenced(0, module_device(model)):
        prior = model.model(_given_only(model, columns), 4096)
        z = torch.cat([prior[name].flatten(1) for name in names], 1)
        low, high = z.mean(0) - 12 * z.std(0), z.mean(0) + 12 * z.std(0)
        for rows, _ in blocks(len(columns), points, MAX_ROWS, MAX_ROWS // model.categories):
            batch = columns.rows(rows)
            values.append(_integrate(model, batch, names, low, high, POINTS[dims]))
    return torch.cat(values)


def _given_only(model: LatentModel, columns: Columns) -> dict[str, Tensor]:
    """Values that are conditioned on, of 4,096 rows of the data in turn."""
    index = torch.arange(4096) % len(columns)
    batch = columns.batch(index.to(module_device(model)))
    return {name: batch[name] for name in model.given} if isinstance(batch, dict) else {}


def _integrate(
    model: LatentModel, batch: Batch, names: list[str], low: Tensor, high: Tensor, points: int
) -> Tensor:
    """Shrink the box (dims,) to each datum's own, (N, dims), then apply the rule to it."""
    size = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
    low, high = low.expand(size, -1), high.expand(size, -1)
    for _ in range(20):
        step = (high - low) / (points - 1)
        first, last = _extent(_on_grid(model, batch, names, low, step, points))
        if bool(((last - first) > 0.4 * points).all()):
            break
        low, high = low + (first - 1) * step, low + (last + 1) * step
    return _rule(model, batch, names, low, high, points)


def _rule(
    model: LatentModel, batch: Batch, names: list[str], low: Tensor, high: Tensor, points: int
) -> Tensor:
    """log of the trapezoid sum, (N,), on a finer grid for those data that need one."""
    step = (high - low) / (points - 1)
    value = _on_grid(model, batch, names, low, step, points)
    fine = _trapezoid(value, step)
    halves = product((slice(0, None, 2), slice(1, None, 2)), repeat=low.shape[1])
    coarse = torch.stack([_trapezoid(value[half], 2 * step) for half in halves])
    again = (fine - coarse).abs().amax(0) > CONVERGED
    if bool(again.any()):
        if points >= MOST_POINTS[low.shape[1]]:
            raise Intractable(
                f"Quadrature has not converged with {points} points in each latent dimension: "
                "p(x, z) is too narrow in z. Use pvae.evaluate for bounds and estimates."
            )
        few = batch[again] if isinstance(batch, Tensor) else {k: v[again] for k, v in batch.items()}
        fine[again] = _rule(model, few, names, low[again], high[again], 2 * points - 1)
    return fine


def _on_grid(
    model: LatentModel, batch: Batch, names: list[str], low: Tensor, step: Tensor, points: int
) -> Tensor:
    """log p(x, z) on every datum's grid, (points, ..., N)."""
    dims = low.shape[1]
    axis = torch.arange(points, dtype=low.dtype, device=low.device)
    index = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, 1, dims)
    values = []
    for some in index.split(max(1, MAX_ROWS // (len(low) * model.categories))):
        z = _by_site(model, names, low + some * step)  # (some of points^dims, N, dims)
        program = poutine.condition(model.model, z)
        drawn = draw(program, _nothing, (batch,), num_particles=len(some), plates=model.plates)
        values.append(drawn.log_weights)
    return torch.cat(values).reshape(*[points] * dims, -1)


def _by_site(model: LatentModel, names: list[str], z: Tensor) -> dict[str, Tensor]:
    """(P, N, dims) -> the value of each named latent, (P, N, *event)."""
    shapes = [model.inputs[name].shape for name in names]
    parts = z.split([math.prod(shape) for shape in shapes], dim=-1)
    return {
        name: part.reshape(*z.shape[:2], *shape)
        for name, part, shape in zip(names, parts, shapes, strict=True)
    }


def _extent(value: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index along each axis where the integrand matters, each (N, dims)."""
    dims = value.dim() - 1
    keep = value > value.amax(tuple(range(dims)), keepdim=True) - NEGLIGIBLE
    first, last = [], []
    for axis in range(dims):
        others = tuple(d for d in range(dims) if d != axis)
        along = keep.any(others) if others else keep  # (points, N)
        order = torch.arange(len(along), device=keep.device).unsqueeze(1)
        first.append(torch.where(along, order, len(along)).amin(0))
        last.append(torch.where(along, order, -1).amax(0))
    return torch.stack(first, 1), torch.stack(last, 1)


def _trapezoid(value: Tensor, step: Tensor) -> Tensor:
    """log of the trapezoid sum; the integrand is negligible at the box's edge."""
    flat = value.reshape(-1, value.shape[-1])
    return flat.logsumexp(0) + step.log().sum(1)
