"""Log-weights: the one tensor that everything else in pvae is a function of.

    log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n),    z_kn ~ q(z | x_n),    shape (K, N), nats

The guide is traced under a plate of K particles, the model is replayed against it, and discrete
latents that the guide does not sample are enumerated and summed out. Scales (subsampling,
`poutine.scale`) are kept beside the weights, never inside them.

    model, guide, batch  --find_plates-->  Plates
    model, guide, batch, Plates  --draw-->  Particles (differentiable)

Cut particles hand each reparameterised draw on as a leaf, so that a gradient can tell what reaches
log w through the draws from what reaches it past them.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pvae.missing import Label
from pvae.plates import Plates, find_plates, samples

__all__ = ["Particles", "Program", "draw", "EnumerateAllBut", "guide_factors", "log_factor"]

Program = Callable[..., Any]


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
        score_sites: guide sites without reparameterisation.
        cuts: of cut particles, each reparameterised draw and the leaf that went on in its place, in
            the order of drawing.
        masks: `poutine.mask` of each site of the model, where it has one.
        guide_masks: the same for the guide.
        plates: where the data are.
        singles: of particles drawn one at a time, each alone: their distributions may differ.
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
    score_sites: tuple[str, ...] = ()
    cuts: tuple[tuple[Tensor, Tensor], ...] = ()
    masks: dict[str, Any] = field(default_factory=dict)
    guide_masks: dict[str, Any] = field(default_factory=dict)
    plates: Plates = field(default_factory=Plates)
    singles: tuple["Particles", ...] = ()

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), summed sites summed out: (K, N), nats."""
        return self.log_joint_of(self.log_p)

    def log_joint_of(self, names: Iterable[str]) -> Tensor:
        """Of some sites of the model: the product of their factors, summed sites summed out."""
        joint = sum((self.log_p[name] for name in names), torch.zeros(()))
        return _log_sum(joint, self.shape).expand(self.shape)

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x): (K, N), nats."""
        return sum(self.log_q.values(), torch.zeros(())).expand(self.shape)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), summed sites summed out: (K, N), nats."""
        total = _log_sum(self._joint(), self.shape)
        for log_q in self.log_q.values():
            total = total - log_q
        return total.expand(self.shape)

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

    def agrees(self, name: str) -> bool:
        """Whether a latent has the same scale and mask in the guide as in the model."""
        if name not in self.log_q or name not in self.log_p:
            return True
        same_scale = _same(self.scales[name], self.guide_scales[name])
        return same_scale and _same(self.masks.get(name), self.guide_masks.get(name))

    def seen(self, name: str) -> Tensor:
        """Of which data a latent's factors are not masked, (1 or K, 1 or N)."""
        mask = self.masks.get(name, True)
        if not isinstance(mask, Tensor):
            return torch.full((1, 1), bool(mask), device=self.log_weights.device)
        return _by_datum(mask.to(torch.get_default_dtype()), self.plates) > 0

    def analytic_kl(self, name: str) -> Tensor | None:
        """KL[q(z | ...) || p(z | ...)] of one latent in closed form, (K, N), nats, if it is known.

        Given the latents drawn before it, so it takes the place of log q - log p only where all
        that p(z | ...) depends on was drawn before z: where the guide draws in the model's order.
        """
        if self.singles:
            return _cat([single.analytic_kl(name) for single in self.singles])
        before = list(self.log_p)[: list(self.log_p).index(name)] if name in self.log_p else []
        drawn = list(self.log_q)[: list(self.log_q).index(name)]
        latent = [site for site in before if site not in self.observed]
        if name not in self.log_p or not set(latent) <= set(drawn):
            return None
        q, p = self.guide_sites[name], self.model_sites[name]
        try:
            kl = kl_divergence(q, p)
        except NotImplementedError:
            return None
        kl = scale_and_mask(kl, mask=self.masks.get(name))
        return _by_datum(kl, self.plates).expand(self.shape)

    def unit_kl(self, name: str, analytic: bool = False) -> Tensor | None:
        """KL by unit of a latent whose q and p both factorise, (K, N, *event), else None.

        Args:
            name: a latent that the guide draws, in no plate within the datum.
            analytic: in closed form; otherwise log q - log p at the values drawn.
        """
        if self.singles:
            return _cat([single.unit_kl(name, analytic) for single in self.singles])
        q, p = _each_unit(self.guide_sites[name]), _each_unit(self.model_sites[name])
        value = self.values[name]
        value = value if value.shape[:2] == self.shape else value.unsqueeze(0)
        if q.event_shape or p.event_shape or value.shape[:2] != self.shape:
            return None
        kl = kl_divergence(q, p) if analytic else q.log_prob(value) - p.log_prob(value)
        if kl.dim() > value.dim():  # it depends on a summed latent
            return None
        mask = self.masks.get(name)
        if isinstance(mask, Tensor):
            mask = mask.reshape(*mask.shape, *(1,) * (value.dim() - 2))
        return scale_and_mask(kl.expand(value.shape), mask=mask)

    def expected(self, values: Tensor, event_dim: int = 0) -> Tensor:
        """Mean over p(summed | x, z) of values (*enumerated, K, N, *event), (K, N, *event)."""
        event = values.shape[values.dim() - event_dim :]
        full = values.expand(*self._joint().shape[:-2], *self.shape, *event)
        if not self.summed:
            return full
        r = self.log_responsibilities().exp()
        full = full.reshape(-1, *self.shape, *event)
        return (r.reshape(*r.shape, *(1,) * event_dim) * full).sum(0)

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


def _cat(values: list[Tensor | None]) -> Tensor | None:
    found = [value for value in values if value is not None]
    return torch.cat(found) if found else None


def _each_unit(d: Distribution) -> Distribution:
    return d.base_dist if isinstance(d, Independent) else d


def _same(a: Any, b: Any) -> bool:
    """Whether scales are equal; while a graph is traced, which has no values, the same tensor."""
    if a is b or a is None or b is None:
        return a is b
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
    cut: bool = False,
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
        cut: hand reparameterised draws on as leaves, and keep both in `Particles.cuts`.

    Returns:
        Particles, differentiable in the parameters of both programs.

    Raises:
        ValueError: for a latent neither guided nor summable, or data without a plate.
    """
    kwargs = kwargs or {}
    check_count("num_particles", num_particles)
    plates = plates or find_plates(model, guide, args, kwargs)
    if not vectorize:
        each = range(num_particles)
        return _join([_draw(model, guide, args, kwargs, None, plates, cut) for _ in each])
    return _draw(model, guide, args, kwargs, num_particles, plates, cut)


def _draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int | None,
    plates: Plates,
    cut: bool,
) -> Particles:
    if num_particles is not None:
        particle_plate = pyro.plate("particles", num_particles, dim=-1 - plates.nesting)
        model, guide = particle_plate(model), particle_plate(guide)
    with _Cut() if cut else nullcontext() as cutter:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    enumerated = poutine.enum(
        poutine.infer_config(replayed, EnumerateAllBut(guide_trace)),
        first_available_dim=-2 - plates.nesting,
    )
    model_trace = poutine.trace(enumerated).get_trace(*args, **kwargs)
    cuts = () if cutter is None else tuple(cutter.cuts)
    return _collect(model_trace, guide_trace, num_particles or 1, plates, cuts)


class _Cut(Messenger):
    """Hands each reparameterised draw on as a leaf, and keeps both."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.requires_grad and msg["fn"].has_rsample:
            msg["value"] = value.detach().requires_grad_()
            self.cuts.append((value, msg["value"]))


class EnumerateAllBut:
    """Marks each latent of the model that the guide does not draw, to be summed out."""

    def __init__(self, guide_trace: poutine.Trace):
        self.guided = set(guide_trace.nodes)

    def __call__(self, site: Any) -> Any:
        """For `poutine.infer_config`."""
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
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    num_particles: int,
    plates: Plates,
    cuts: tuple[tuple[Tensor, Tensor], ...],
) -> Particles:
    model_sites = {site["name"]: site for site in samples(model_trace)}
    guide_sites = {site["name"]: site for site in samples(guide_trace)}
    unknown = [
        name
        for name, site in guide_sites.items()
        if name not in model_sites and not site["infer"].get("is_auxiliary")
    ]
    if unknown:
        raise ValueError(f"The guide draws {unknown[0]!r}, which is no site of the model.")
    log_p = {name: log_factor(site, plates) for name, site in model_sites.items()}
    log_q = {name: log_factor(site, plates) for name, site in guide_sites.items()}
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
        observed=tuple(
            name
            for name, site in model_sites.items()
            if site["is_observed"] and not isinstance(site["fn"], Label)
        ),
        summed=tuple(sorted(summed, key=lambda n: -model_sites[n]["infer"]["_enumerate_dim"])),
        scales={name: _scale(site, plates) for name, site in model_sites.items()},
        guide_scales={name: _scale(site, plates) for name, site in guide_sites.items()},
        shape=(num_particles, num_data),
        score_sites=tuple(n for n, s in guide_sites.items() if not s["fn"].has_rsample),
        cuts=cuts,
        masks={n: s["mask"] for n, s in model_sites.items() if s["mask"] is not None},
        guide_masks={n: s["mask"] for n, s in guide_sites.items() if s["mask"] is not None},
        plates=plates,
    )


def guide_factors(trace: poutine.Trace, plates: Plates) -> list[Tensor]:
    """log q of each site of a guide's run, as in `Particles.log_q`."""
    return [log_factor(site, plates) for site in samples(trace)]


def _check_summed(site: Any, plates: Plates) -> None:
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    inner = [f.name for f in frames if -plates.nesting <= f.dim != plates.dim]
    if inner:
        raise ValueError(
            f"Latent {site['name']!r} cannot be summed out in plate {inner[0]!r}, inside that of "
            f"the data: each of its elements would need a sum of its own. Add {site['name']!r} to "
            "the guide."
        )


def _scale(site: Any, plates: Plates) -> Any:
    """The site's scale: a number, or a tensor (N,) if it has one for each datum.

    Raises:
        ValueError: for a scale that differs within a datum, or from particle to particle.
    """
    scale = site["scale"]
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    dims = range(-scale.dim(), 0)
    if any(scale.shape[dim] > 1 and dim != plates.dim for dim in dims):
        raise ValueError(
            f"The scale of site {site['name']!r} has shape {tuple(scale.shape)}, and differs "
            f"within a datum. Give one number for each datum, along dimension {plates.dim}."
        )
    return scale.reshape(-1)


def log_factor(site: Any, plates: Plates) -> Tensor:
    """The site's log-probability, unscaled and masked, inner plates summed: (*, K or 1, N or 1)."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return _by_datum(scale_and_mask(log_prob, mask=site["mask"]), plates)


def _by_datum(factor: Tensor, plates: Plates) -> Tensor:
    """(*, K or 1, *plates) -> (*, K or 1, N or 1), plates other than the data's summed."""
    missing = plates.nesting + 1 - factor.dim()
    factor = factor.reshape((1,) * max(missing, 0) + factor.shape)
    for dim in range(-plates.nesting, 0):
        if dim != plates.dim:
            factor = factor.sum(dim, keepdim=True)
    lead = factor.shape[: -plates.nesting]
    return factor.reshape(*lead, factor.shape[plates.dim])


def _join(single: list[Particles]) -> Particles:
    """Particles drawn one at a time, joined along K."""
    first = single[0]
    alike = {*first.summed, *first.observed}
    num_data = first.shape[1]

    def join(factors: list[Tensor]) -> Tensor:
        return torch.cat([f.expand(*f.shape[:-2], 1, num_data) for f in factors], dim=-2)

    return Particles(
        log_p={name: join([p.log_p[name] for p in single]) for name in first.log_p},
        log_q={name: join([p.log_q[name] for p in single]) for name in first.log_q},
        values={
            name: value if name in alike else torch.stack([p.values[name] for p in single])
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
        cuts=tuple(cut for particles in single for cut in particles.cuts),
        masks=first.masks,
        guide_masks=first.guide_masks,
        plates=first.plates,
        singles=tuple(single),
    )
