"""Log-weights: the one tensor that everything else in pvae is a function of.

    log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n),    z_kn ~ q(z | x_n),    shape (K, N), nats

The guide is traced under a plate of K particles, the model is replayed against it, and discrete
latents that the guide does not sample are enumerated and summed out. Scales (subsampling,
`poutine.scale`) are kept beside the weights, never inside them.

    model, guide, batch  --find_plates-->  Plates
    model, guide, batch, Plates  --draw-->  Particles (differentiable)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["Particles", "Plates", "draw", "find_plates"]

Program = Callable[..., Any]

PLATE_TO_WRITE = """
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(len(x), 50), 1).to_event(1))
            pyro.sample("x", dist.Bernoulli(decoder(z)).to_event(1), obs=x)"""


@dataclass(frozen=True)
class Plates:
    """Where a program keeps its data: name and dim of their plate, number of plate dims in all."""

    name: str = "data"
    dim: int = -1
    nesting: int = 1


@dataclass(frozen=True)
class Particles:
    """One draw of K particles for each of N data, and every factor of their weights.

    Args:
        log_p: factors of log p(x, z), by site, each broadcastable to (*enumerated, K, N), in nats.
        log_q: factors of log q(z | x), by site, each broadcastable to (K, N), in nats.
        values: drawn values by latent site, (K, N, *event); of summed sites, all their values,
            along their own enumerated dimension.
        model_sites: distribution of each site of the model, given the values drawn.
        guide_sites: the same for the guide.
        observed: names of the observed sites.
        summed: names of the sites summed out, in the order of their dimensions from the right.
        scales: scale of each factor of log p in the objective: 1 unless a plate is subsampled or
            `poutine.scale` is used.
        guide_scales: the same for the factors of log q.
        shape: (K, N).
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    values: dict[str, Tensor]
    model_sites: dict[str, Distribution]
    guide_sites: dict[str, Distribution]
    observed: tuple[str, ...]
    summed: tuple[str, ...]
    scales: dict[str, Any]
    guide_scales: dict[str, Any]
    shape: tuple[int, int]
    score_sites: tuple[str, ...] = field(default=())

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), summed sites summed out: (K, N), nats."""
        total = _log_sum(self._joint(), self.shape)
        for log_q in self.log_q.values():
            total = total - log_q
        return total.expand(self.shape)

    @property
    def score(self) -> Tensor | None:
        """Sum of log q over guide sites without reparameterisation, (K, N), or None."""
        if not self.score_sites:
            return None
        parts = [self.log_q[name].expand(self.shape) for name in self.score_sites]
        return torch.stack(parts).sum(0)

    @property
    def scale(self) -> Any:
        """The one scale of all factors, multiplying the bound of each datum.

        Raises:
            ValueError: if the factors have different scales, which has no meaning inside a log.
        """
        if not self.has_one_scale:
            raise ValueError(
                "This objective needs one scale for all sites of a datum, got different ones "
                f"(model {self.scales}, guide {self.guide_scales}). poutine.scale on a single "
                "site (KL annealing, say) has a meaning for pvae.ELBO only."
            )
        return next(iter(self.scales.values()))

    @property
    def has_one_scale(self) -> bool:
        """Whether all factors have the same scale."""
        first, *others = *self.scales.values(), *self.guide_scales.values()
        return all(_same(first, other) for other in others)

    def _joint(self) -> Tensor:
        return sum(self.log_p.values(), torch.zeros(()))

    def log_responsibilities(self) -> Tensor:
        """log p(summed sites | x, z), (categories together, K, N), nats."""
        joint = _flat(self._joint(), self.shape)
        return joint - joint.logsumexp(0)

    def terms(self) -> dict[str, Tensor]:
        """What adds up to log w: "reconstruction[x]" less each "KL[z]", all (K, N), in nats.

        Terms under summed sites are expectations over p(summed | x, z), and each summed site has
        its KL[p(c | x, z) || p(c)] as well; their sum is log w still.
        """
        expected, entropy = self.log_p, torch.zeros(())
        if self.summed:
            log_r = self.log_responsibilities()
            r = log_r.exp()
            full = self._joint().shape
            # 0 x -inf: a category of no probability adds nothing
            expected = {
                name: (r * _flat(log_p.expand(full), self.shape)).nan_to_num(0.0).sum(0)
                for name, log_p in self.log_p.items()
            }
            entropy = -(r * log_r).nan_to_num(0.0).sum(0)
        terms = {f"reconstruction[{name}]": expected[name] for name in self.observed}
        for name, log_q in self.log_q.items():
            terms[f"KL[{name}]"] = log_q - expected[name] if name in expected else log_q
        if self.summed:
            name = ", ".join(self.summed)
            terms[f"KL[{name}]"] = -entropy - sum(expected[site] for site in self.summed)
        return {name: term.expand(self.shape) for name, term in terms.items()}

    def posterior_values(self) -> dict[str, Tensor]:
        """Drawn values of every latent, (K, N, *event), summed ones drawn from p(c | x, z)."""
        drawn = {name: self.values[name] for name in self.log_q}
        if not self.summed:
            return drawn
        probs = self.log_responsibilities().exp().movedim(0, -1)
        flat = torch.distributions.Categorical(probs=probs).sample()
        for name in self.summed:  # the first has the rightmost, fastest running dimension
            event = self.model_sites[name].event_shape
            support = self.values[name].reshape(-1, *event)
            drawn[name] = support[flat % len(support)]
            flat = flat // len(support)
        return drawn


def _same(a: Any, b: Any) -> bool:
    """Whether scales are equal; while a graph is traced, which has no values, the same tensor."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if get_proxy_mode() is not None:
            return False
        return bool(torch.as_tensor(a == b).all())
    return bool(a == b)


def _flat(factor: Tensor, shape: tuple[int, int]) -> Tensor:
    """(*enumerated, K, N) -> (categories together, K, N)."""
    factor = factor.expand(*factor.shape[:-2], *shape)
    return factor.reshape(-1, *shape)


def _log_sum(joint: Tensor, shape: tuple[int, int]) -> Tensor:
    return joint if joint.dim() <= 2 else _flat(joint, shape).logsumexp(0)


def find_plates(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> Plates:
    """Run both programs once, and find the plate that holds the data.

    Raises:
        ValueError: where per-datum terms cannot be told apart; the message shows the plate.
    """
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    sites = [site for trace in (guide_trace, model_trace) for site in _samples(trace)]
    frames = [{f.name: f for f in site["cond_indep_stack"] if f.vectorized} for site in sites]
    common = set.intersection(*map(set, frames)) if frames else set()
    for site, own in zip(sites, frames, strict=True):
        _check_dims(site, {frame.dim for frame in own.values()})
        if not common and not own:
            raise ValueError(
                f"Site {site['name']!r} lies in no vectorised plate over the data, so its "
                f"log-probability cannot be told apart by datum. Write:\n{PLATE_TO_WRITE}"
            )
    size = len(next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), ()))
    if len(common) > 1:
        common = {name for name in common if frames[0][name].size == size}
    if len(common) != 1:
        raise ValueError(
            "Model and guide need one vectorised plate over the data that holds every sample site; "
            f"found {sorted({name for own in frames for name in own})} and "
            f"{len(common)} that fit. Write:\n{PLATE_TO_WRITE}"
        )
    (name,) = common
    nesting = max(-frame.dim for own in frames for frame in own.values())
    return Plates(name, frames[0][name].dim, nesting)


def _samples(trace: poutine.Trace) -> Iterable[Any]:
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield site


def _check_dims(site: Any, plate_dims: set[int]) -> None:
    shape = site["fn"].log_prob(site["value"]).shape
    loose = [d for d in range(-len(shape), 0) if shape[d] > 1 and d not in plate_dims]
    if loose:
        raise ValueError(
            f"Site {site['name']!r} has log-probabilities of shape {tuple(shape)}, of which "
            f"dimension {loose[0]} belongs to no plate. If these are parts of one datum, add "
            f"`.to_event({len(loose)})`; if they are data, write a plate:\n{PLATE_TO_WRITE}"
        )


def check_count(name: str, value: Any) -> None:
    """Raise unless a number of particles, steps or draws is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def draw(
    model: Program,
    guide: Program,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    plates: Plates | None = None,
    vectorize: bool = True,
) -> Particles:
    """Draw K particles for each datum from the guide and weigh them by the model.

    Args:
        model: Pyro program over a batch.
        guide: Pyro program over the same batch.
        args: what both are called with.
        kwargs: the same, by keyword.
        num_particles: K.
        plates: where the data are; found by a run of both where left out.
        vectorize: one pass for all particles; False runs both programs K times, for networks that
            cannot take a leading particle dimension.

    Returns:
        Particles, differentiable in the parameters of both programs.

    Raises:
        ValueError: for a latent neither guided nor summable, or data without a plate.
    """
    kwargs = kwargs or {}
    check_count("num_particles", num_particles)
    plates = plates or find_plates(model, guide, args, kwargs)
    if not vectorize:
        single = [_draw(model, guide, args, kwargs, None, plates) for _ in range(num_particles)]
        return _join(single)
    return _draw(model, guide, args, kwargs, num_particles, plates)


def _draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int | None,
    plates: Plates,
) -> Particles:
    if num_particles is not None:
        particle_plate = pyro.plate("particles", num_particles, dim=-1 - plates.nesting)
        model, guide = particle_plate(model), particle_plate(guide)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    enumerated = poutine.enum(
        poutine.infer_config(replayed, _Enumerate(guide_trace)),
        first_available_dim=-2 - plates.nesting,
    )
    model_trace = poutine.trace(enumerated).get_trace(*args, **kwargs)
    return _collect(model_trace, guide_trace, num_particles or 1, plates)


class _Enumerate:
    """Marks each latent of the model that the guide does not draw, to be summed out."""

    def __init__(self, guide_trace: poutine.Trace):
        self.guided = set(guide_trace.nodes)

    def __call__(self, site: Any) -> Any:
        drawn = site["is_observed"] or site["name"] in self.guided
        if site["type"] != "sample" or drawn or site_is_subsample(site):
            return {}
        if not site["fn"].has_enumerate_support:
            raise ValueError(
                f"Latent {site['name']!r} ({type(site['fn']).__name__}) is neither drawn by the "
                "guide nor summable (one discrete variable of finite support). Add it to the guide."
            )
        return {"enumerate": "parallel"}


def _collect(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int, plates: Plates
) -> Particles:
    model_sites = {site["name"]: site for site in _samples(model_trace)}
    guide_sites = {site["name"]: site for site in _samples(guide_trace)}
    unknown = [
        name
        for name, site in guide_sites.items()
        if name not in model_sites and not site["infer"].get("is_auxiliary")
    ]
    if unknown:
        raise ValueError(f"The guide draws {unknown[0]!r}, which is no site of the model.")
    log_p = {name: _log_factor(site, plates) for name, site in model_sites.items()}
    log_q = {name: _log_factor(site, plates) for name, site in guide_sites.items()}
    num_data = max(factor.shape[-1] for factor in log_p.values())
    summed = [name for name, site in model_sites.items() if "_enumerate_dim" in site["infer"]]
    for name in summed:
        _check_summed(model_sites[name], plates)
    return Particles(
        log_p=log_p,
        log_q=log_q,
        values={name: site["value"] for name, site in {**model_sites, **guide_sites}.items()},
        model_sites={name: site["fn"] for name, site in model_sites.items()},
        guide_sites={name: site["fn"] for name, site in guide_sites.items()},
        observed=tuple(name for name, site in model_sites.items() if site["is_observed"]),
        summed=tuple(sorted(summed, key=lambda n: -model_sites[n]["infer"]["_enumerate_dim"])),
        scales={name: site["scale"] for name, site in model_sites.items()},
        guide_scales={name: site["scale"] for name, site in guide_sites.items()},
        shape=(num_particles, num_data),
        score_sites=tuple(n for n, s in guide_sites.items() if not s["fn"].has_rsample),
    )


def _check_summed(site: Any, plates: Plates) -> None:
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    inner = [f.name for f in frames if -plates.nesting <= f.dim != plates.dim]
    if inner:
        raise ValueError(
            f"Latent {site['name']!r} cannot be summed out in plate {inner[0]!r}, inside that of "
            f"the data: each of its elements would need a sum of its own. Add {site['name']!r} to "
            "the guide."
        )


def _log_factor(site: Any, plates: Plates) -> Tensor:
    """The site's log-probability, unscaled and masked, inner plates summed: (*, K or 1, N or 1)."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    log_prob = scale_and_mask(log_prob, mask=site["mask"])
    missing = plates.nesting + 1 - log_prob.dim()
    log_prob = log_prob.reshape((1,) * max(missing, 0) + log_prob.shape)
    for dim in range(-plates.nesting, 0):
        if dim != plates.dim:
            log_prob = log_prob.sum(dim, keepdim=True)
    lead = log_prob.shape[: -plates.nesting]
    return log_prob.reshape(*lead, log_prob.shape[plates.dim])


def _join(single: list[Particles]) -> Particles:
    """Particles drawn one at a time, joined along K."""
    first = single[0]
    num_data = first.shape[1]

    def join(factors: list[Tensor]) -> Tensor:
        return torch.cat([f.expand(*f.shape[:-2], 1, num_data) for f in factors], dim=-2)

    return Particles(
        log_p={name: join([p.log_p[name] for p in single]) for name in first.log_p},
        log_q={name: join([p.log_q[name] for p in single]) for name in first.log_q},
        values={
            name: value if name in first.summed else torch.stack([p.values[name] for p in single])
            for name, value in first.values.items()
        },
        model_sites=first.model_sites,
        guide_sites=first.guide_sites,
        observed=first.observed,
        summed=first.summed,
        scales=first.scales,
        guide_scales=first.guide_scales,
        shape=(len(single), num_data),
        score_sites=first.score_sites,
    )
