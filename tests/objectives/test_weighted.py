"""The ELBO's KL terms: sampled or in closed form, weighted, above a floor; each written by hand."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pvae.objectives import ELBO, IWAE, Cyclical, WarmUp
from pvae.particles import draw
from tests.exact import LinearMixture
from tests.exact.parameters import normal

exactly = partial(assert_close, rtol=1e-10, atol=1e-10)

K, N = 5, 8
X = normal(N, 4, seed=1)


class Ladder(nn.Module):
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2, s^2 I), x | z1; the guide draws z2 first, or z1."""

    def __init__(self, top_down: bool, prior=dist.Normal):
        super().__init__()
        self.top_down, self.prior = top_down, prior
        sizes = {"A": (3, 2), "W": (4, 3), "low": (3, 4), "high": (2, 4), "down": (3, 2)}
        sizes |= {"up": (2, 3), "log_s": (3,)}
        for seed, (name, size) in enumerate(sizes.items()):
            self.register_parameter(name, nn.Parameter(0.4 * normal(*size, seed=seed)))

    def model(self, x):
        zero = x.new_zeros(2)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.prior(zero, 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.A.T, self.log_s[0].exp()).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.W.T, 0.7).to_event(1), obs=x)

    def guide(self, x):
        low, high = self.log_s[1].exp(), self.log_s[2].exp()
        with pyro.plate("data", len(x)):
            if self.top_down:
                z2 = pyro.sample("z2", dist.Normal(x @ self.high.T, high).to_event(1))
                loc = x @ self.low.T + z2 @ self.down.T
                pyro.sample("z1", dist.Normal(loc, low).to_event(1))
            else:
                z1 = pyro.sample("z1", dist.Normal(x @ self.low.T, low).to_event(1))
                pyro.sample("z2", dist.Normal(z1 @ self.up.T, high).to_event(1))


def normal_kl(q, p) -> Tensor:
    """KL of two Normals, by unit: log (s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / 2 s_p^2 - 1/2."""
    q, p = q.base_dist, p.base_dist
    squares = q.scale.square() + (q.loc - p.loc).square()
    return (p.scale / q.scale).log() + squares / (2 * p.scale.square()) - 0.5


def closed(particles, name: str) -> Tensor:
    """By unit, (K, N, size)."""
    kl = normal_kl(particles.guide_sites[name], particles.model_sites[name])
    return kl.expand(*particles.shape, -1)


def sampled(particles, name: str) -> Tensor:
    """By unit, at the values drawn."""
    q, p = particles.guide_sites[name].base_dist, particles.model_sites[name].base_dist
    value = particles.values[name]
    return q.log_prob(value) - p.log_prob(value)


def drawn(pair, num_particles: int = K, seed: int = 2):
    pyro.set_rng_seed(seed)
    return draw(pair.model, pair.guide, (X,), num_particles=num_particles)


def loss_and_gradients(objective, pair, seed: int = 2):
    """As at `drawn`'s draws."""
    objective.loss(pair.model, pair.guide, X)
    pyro.set_rng_seed(seed)
    pair.zero_grad()
    loss = objective.differentiable_loss(pair.model, pair.guide, X)
    loss.backward()
    zero = torch.zeros((), dtype=X.dtype)
    return loss.item(), [
        zero.expand(p.shape) if p.grad is None else p.grad for p in pair.parameters()
    ]


def assert_maximises(objective, pair, expected) -> None:
    """Value and gradient are those of `expected(particles)`, (K, N), at the same draws."""
    particles = drawn(pair, objective.num_particles)
    total = expected(particles).mean(0).sum()
    parameters = list(pair.parameters())
    gradients = torch.autograd.grad(-total, parameters, allow_unused=True)
    loss, found = loss_and_gradients(objective, pair)
    exactly(loss, -float(total.detach()))
    for own, gradient in zip(found, gradients, strict=True):
        assert_close(own, torch.zeros_like(own) if gradient is None else gradient)
    assert sum(float(own.abs().sum()) for own in found) > 1


def reconstruction(particles) -> Tensor:
    return particles.terms()["reconstruction[x]"]


# ------------------------------------------------------------------------------ closed forms


def test_closed_forms_are_those_of_two_normals():
    def expected(particles):
        kl = closed(particles, "z1").sum(-1) + closed(particles, "z2").sum(-1)
        return reconstruction(particles) - kl

    assert_maximises(ELBO(K, kl="analytic"), Ladder(top_down=True), expected)


def test_closed_forms_are_chosen_by_latent():
    def expected(particles):
        kl = sampled(particles, "z1").sum(-1) + closed(particles, "z2").sum(-1)
        return reconstruction(particles) - kl

    for chosen in ({"z2": "analytic"}, {"z2": "analytic", "z1": "sampled"}):
        assert_maximises(ELBO(K, kl=chosen), Ladder(top_down=True), expected)


@pytest.mark.parametrize("num_particles", [1, K])
def test_closed_forms_are_those_of_trace_mean_field_elbo_draw_for_draw(num_particles):
    pair = Ladder(top_down=True)
    settings = {"max_plate_nesting": 1, "vectorize_particles": True}
    pyros = TraceMeanField_ELBO(num_particles, **settings)
    ours = loss_and_gradients(ELBO(num_particles, kl="analytic"), pair)
    exactly(ours[0], loss_and_gradients(pyros, pair)[0])
    exactly(ours[1], loss_and_gradients(pyros, pair)[1])


def test_a_latent_whose_prior_depends_on_a_later_draw_is_sampled_or_refused_by_name():
    """The guide draws z1, then z2 given z1; p(z1 | z2) is no distribution known before z2 is."""

    def expected(particles):
        kl = sampled(particles, "z1").sum(-1) + closed(particles, "z2").sum(-1)
        return reconstruction(particles) - kl

    pair = Ladder(top_down=False)
    assert_maximises(ELBO(K, kl="analytic"), pair, expected)
    with pytest.raises(ValueError, match=r"KL\[z1\] has no closed form here: .* draws later\. Use"):
        ELBO(K, kl={"z1": "analytic"}).loss(pair.model, pair.guide, X)


def test_divergences_that_torch_does_not_know_are_sampled_or_refused_by_name():
    pair = Ladder(top_down=True, prior=dist.Cauchy)

    def expected(particles):
        kl = closed(particles, "z1").sum(-1) + sampled(particles, "z2").sum(-1)
        return reconstruction(particles) - kl

    assert_maximises(ELBO(K, kl="analytic"), pair, expected)
    with pytest.raises(ValueError, match=r"KL\[z2\] has no closed form here: torch knows none"):
        ELBO(K, kl={"z2": "analytic"}).loss(pair.model, pair.guide, X)


@pytest.mark.parametrize("top_down", [True, False])
def test_closed_forms_have_the_samples_expectation_and_less_variance(top_down):
    pair, many = Ladder(top_down), 20_000
    particles = drawn(pair, many)
    with torch.no_grad():
        kinds = [ELBO(many, kl=kl)._integrand(particles, False) for kl in ("sampled", "analytic")]
    difference = (kinds[0] - kinds[1]).sum(1)
    error = float(difference.std()) / math.sqrt(many)
    assert abs(float(difference.mean())) < 4.5 * error
    assert error < 0.01 * float(closed(particles, "z1").sum(-1).mean(0).sum().detach())
    assert kinds[1].var(0).sum() < kinds[0].var(0).sum()


def test_closed_forms_carry_scales_and_masks():
    pair = Ladder(top_down=True)
    mask = torch.arange(N) < 3
    plain = ELBO(K, kl="analytic").bound(drawn(pair))
    for wrap, expected in (
        (partial(pyro.poutine.scale, scale=2.5), 2.5 * plain),
        (partial(pyro.poutine.mask, mask=mask), torch.where(mask, plain, 0.0)),
    ):
        pyro.set_rng_seed(2)
        particles = draw(wrap(pair.model), wrap(pair.guide), (X,), num_particles=K)
        exactly(ELBO(K, kl="analytic").bound(particles), expected)


# ------------------------------------------------------------------------------ beta


def weighted_by(beta: float, form=sampled):
    def expected(particles):
        kl = form(particles, "z1").sum(-1) + form(particles, "z2").sum(-1)
        return reconstruction(particles) - beta * kl

    return expected


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_multiplies_the_kl_terms(beta, kl):
    form = sampled if kl == "sampled" else closed
    assert_maximises(ELBO(K, beta=beta, kl=kl), Ladder(top_down=True), weighted_by(beta, form))


def test_beta_multiplies_the_kl_terms_of_terms():
    """Also of a site that is summed out."""
    truth = LinearMixture.drawn()
    particles = truth.pair().draw(truth.sample(N), K)
    terms = particles.terms()
    kl = terms["KL[z]"] + terms["KL[c]"]
    objective = ELBO(K, beta=0.3)
    found = objective.extras(particles)["weighted"]
    exactly(found, (terms["reconstruction[x]"] - 0.3 * kl).mean(0))
    exactly(objective.bound(particles), particles.log_weights.mean(0))
    exactly(objective.surrogate(particles), found.sum())


def test_beta_weighs_the_path_alone_where_the_guides_score_is_left_out():
    """Roeder et al. 2017, eq. 7: log q at the draws, its own parameters held fixed."""
    pair, beta = Ladder(top_down=True), 0.3
    held = copy.deepcopy(pair).requires_grad_(False)

    def expected(particles):
        z1, z2 = particles.values["z1"], particles.values["z2"]
        q2 = dist.Normal(X @ held.high.T, held.log_s[2].exp())
        q1 = dist.Normal(X @ held.low.T + z2 @ held.down.T, held.log_s[1].exp())
        log_q = q1.log_prob(z1).sum(-1) + q2.log_prob(z2).sum(-1)
        prior = particles.log_p["z1"] + particles.log_p["z2"]
        return particles.log_p["x"] + beta * (prior - log_q)

    assert_maximises(ELBO(K, beta=beta, gradient="stl"), pair, expected)
    plain = loss_and_gradients(ELBO(K, beta=beta), pair)[1]
    stuck = loss_and_gradients(ELBO(K, beta=beta, gradient="stl"), pair)[1]
    assert any(not torch.allclose(one, other) for one, other in zip(plain, stuck, strict=True))


@pytest.mark.parametrize(("schedule", "values"), [
    (WarmUp(4), [0, 0.25, 0.5, 0.75, 1, 1]),
    (WarmUp(2, start=0.5), [0.5, 0.75, 1, 1, 1, 1]),
    (Cyclical(6, cycles=2, rise=1.0), [0, 1 / 3, 2 / 3, 0, 1 / 3, 2 / 3, 1, 1]),
    (Cyclical(8, cycles=2, rise=0.5), [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1, 1]),
    (lambda step: 1 / (1 + step), [1, 1 / 2, 1 / 3, 1 / 4]),
])  # fmt: skip
def test_beta_follows_its_schedule(schedule, values):
    assert [schedule(step) for step in range(len(values))] == pytest.approx(values)
    pair, objective = Ladder(top_down=True), ELBO(K, beta=schedule)
    for step, beta in enumerate(values):
        for _ in range(2):  # losses without gradients take no step
            pyro.set_rng_seed(2)
            loss = objective.loss(pair.model, pair.guide, X)
            if step:
                before = weighted_by(values[step - 1])(drawn(pair)).mean(0).sum().detach()
                exactly(loss, -float(before))
        expected = -float(weighted_by(beta)(drawn(pair)).mean(0).sum().detach())
        pyro.set_rng_seed(2)
        exactly(objective.loss_and_grads(pair.model, pair.guide, X), expected)
        exactly(objective.bound(drawn(pair)), drawn(pair).log_weights.mean(0))


# ------------------------------------------------------------------------------ free bits


def floored(lowest: float, form, by_unit: bool, beta: float = 1.0):
    """Each term counts as lambda where its mean over particles and data is below."""

    def expected(particles):
        total = reconstruction(particles)
        for name in ("z1", "z2"):
            kl = form(particles, name)
            parts = [kl[..., i] for i in range(kl.shape[-1])] if by_unit else [kl.sum(-1)]
            for part in parts:
                total = total - beta * (part if part.detach().mean() > lowest else lowest)
        return total

    return expected


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
@pytest.mark.parametrize("per", ["site", "unit"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_free_bits_are_a_floor_under_each_term(per, kl, beta):
    """Lambda lies between the terms, so that one is floored and another is not."""
    pair, form = Ladder(top_down=True), sampled if kl == "sampled" else closed
    particles = drawn(pair)
    means = torch.cat([form(particles, name).detach().mean((0, 1)) for name in ("z1", "z2")])
    if per == "site":
        means = torch.stack([means[:3].sum(), means[3:].sum()])
    lowest = float(means.sort().values[:2].mean())
    assert means.min() < lowest - 0.01
    assert means.max() > lowest + 0.01
    objective = ELBO(K, kl=kl, free_bits=lowest, free_bits_per=per, beta=beta)
    assert_maximises(objective, pair, floored(lowest, form, per == "unit", beta))
    exactly(objective.bound(particles), ELBO(K, kl=kl).bound(particles))


@pytest.mark.parametrize("per", ["site", "unit"])
def test_terms_on_the_floor_have_no_gradient(per):
    pair = Ladder(top_down=True)
    _, gradients = loss_and_gradients(ELBO(K, free_bits=1e6, free_bits_per=per), pair)
    _, without = loss_and_gradients(ELBO(K, beta=0.0), pair)
    exactly(gradients, without)


def test_free_bits_per_unit_need_units():
    def guide(x):
        with pyro.plate("data", len(x)):
            covariance = torch.eye(2, dtype=x.dtype)
            pyro.sample("z2", dist.MultivariateNormal(x.new_zeros(2), covariance))
            pyro.sample("z1", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    objective = ELBO(K, free_bits=0.1, free_bits_per="unit")
    with pytest.raises(ValueError, match=r"need a guide and a prior of 'z2' that both factorise"):
        objective.loss(Ladder(True).model, guide, X)


# ------------------------------------------------------------------------------ baselines


class Coins(nn.Module):
    """z ~ Bernoulli(1/2) in 3 units, x | z ~ N(W z, 1); the guide's draws have no derivative."""

    def __init__(self):
        super().__init__()
        self.W, self.V = (
            nn.Parameter(normal(*size, seed=i)) for i, size in enumerate([(4, 3), (3, 4)])
        )

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ self.V.T).to_event(1))


def score_gradient(pair, particles, baseline) -> Tensor:
    """d/dV of sum_k,n (f - b) log q / K + f / K: f also depends on V past the draws."""
    f = particles.log_weights
    q = particles.log_q["z"]
    total = ((f.detach() - baseline) * q).mean(0).sum() + f.mean(0).sum()
    return -torch.autograd.grad(total, pair.V)[0]


def test_an_average_baseline_is_that_of_the_rewards_before():
    """Decay 0.9, free of the bias towards its start: 0; r1; (0.9 r1 + r2) / 1.9; ..."""
    pair, objective = Coins(), ELBO(1, baseline="average")
    objective.loss(pair.model, pair.guide, X)
    rewards: list[float] = []
    for seed in range(5):
        weights = [0.9 ** (len(rewards) - 1 - i) for i in range(len(rewards))]
        past = sum(w * r for w, r in zip(weights, rewards, strict=True))
        b = past / sum(weights) if rewards else 0.0
        particles = drawn(pair, 1, seed)
        expected = score_gradient(pair, particles, b)
        pyro.set_rng_seed(seed)
        pair.zero_grad()
        objective.loss_and_grads(pair.model, pair.guide, X)
        exactly(pair.V.grad, expected)
        rewards.append(float(particles.log_weights.detach().mean()))
    assert list(objective.kept) == ["of z"]
    assert not list(objective.parameters()), "it has a state, which is not trained"


def test_losses_without_gradients_leave_an_average_as_it_is():
    pair, objective = Coins(), ELBO(1, baseline="average")
    objective.loss_and_grads(pair.model, pair.guide, X)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.loss(pair.model, pair.guide, X)
    objective.bound(drawn(pair))
    assert before, "an average has a state"
    exactly(dict(objective.state_dict()), before)


def test_a_learned_baseline_goes_towards_the_reward_by_squared_error():
    pair = Coins()
    net = nn.Linear(4, 1).double()
    objective = ELBO(1, baseline={"z": net})
    objective.loss(pair.model, pair.guide, X)
    particles = drawn(pair, 1)
    predicted = net(X).squeeze(-1)
    reward = particles.log_weights.detach()[0]
    expected = torch.autograd.grad((reward - predicted).square().sum(), list(net.parameters()))
    guides = score_gradient(pair, particles, predicted.detach())
    pyro.set_rng_seed(2)
    pair.zero_grad()
    objective.loss_and_grads(pair.model, pair.guide, X)
    exactly(pair.V.grad, guides)
    exactly([p.grad for p in objective.parameters()], list(expected))


@pytest.mark.parametrize("kind", [ELBO, IWAE])
@pytest.mark.parametrize("baseline", ["vimco", "leave-one-out"])
def test_a_baseline_of_other_particles_needs_them(kind, baseline):
    pair = Coins()
    match = f"baseline '{baseline}' of 'z' comes from the other particles, and there is one only"
    with pytest.raises(ValueError, match=match):
        kind(1, baseline=baseline).loss(pair.model, pair.guide, X)
