"""Every objective's gradient has, over many draws, the expectation that its paper states.

The expectation is a sum over all values of K draws (see `small_models`), differentiated. Where the
gradient is that of the objective's own expectation, `expectation_of` says of which; the others
(sticking the landing, wake-sleep, TVO) are written out from their paper's equation.
"""

import copy
import itertools
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pvae import CIWAE, CUBO, ELBO, IWAE, MIWAE, PIWAE, TVO, ForwardKL, Renyi, ReweightedWakeSleep
from tests.objectives.small_models import (
    Chain,
    Coins,
    Gaussian,
    Mixed,
    Summed,
    drawn_gradients,
    parameters,
)

BETAS = (0.0, 0.3, 0.6)
ALL = (Gaussian, Chain, Coins, Mixed, Summed)
REPARAMETERISED = (Gaussian, Chain, Summed)


# ------------------------------------------------------------------------------ what is expected


class Grid(NamedTuple):
    """All values of K draws together: their chance (P,), and each draw's factors, (K, P)."""

    chance: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor

    @property
    def log_p(self) -> Tensor:
        return self.log_likelihood + self.log_prior

    @property
    def log_w(self) -> Tensor:
        return self.log_p - self.log_q

    @property
    def share(self) -> Tensor:
        """w~, each draw's part of all weights, without a gradient."""
        return self.log_w.softmax(0).detach()


def mean(toy, K: int, value, p, drawn, q, nodes: int | None = None) -> Tensor:
    """E[value] over K draws made with the parameters `drawn` and weighed with `p` and `q`."""
    points = toy.points(p, drawn, q, nodes or toy.nodes[K])
    which = torch.cartesian_prod(*[torch.arange(len(points.chance))] * K).reshape(-1, K).T
    chance, *factors = (factor[which] for factor in points)
    grid = Grid(chance.prod(0), *factors)
    return (grid.chance * value(grid)).sum()


def without_gradient(q) -> SimpleNamespace:
    return SimpleNamespace(**{name: value.detach() for name, value in vars(q).items()})


def expectation_of(K: int, value, K_of_guide: int | None = None, guides=None):
    """What both programs' gradients are of; or the guide's is of another."""

    def rule(toy, p, q):
        for_guide = mean(toy, K_of_guide or K, guides or value, p, q, q)
        return mean(toy, K, value, p, q, q), for_guide

    return rule


def elbo(grid: Grid, beta: float = 1.0) -> Tensor:
    return (grid.log_likelihood + beta * (grid.log_prior - grid.log_q)).mean(0)


def iwae(grid: Grid) -> Tensor:
    return grid.log_w.exp().mean(0).log()


def renyi(alpha: float):
    """Li & Turner 2016, eq. 9."""
    return lambda grid: (grid.log_w * (1 - alpha)).exp().mean(0).log() / (1 - alpha)


def largest(K: int):
    """Renyi's bound of order -inf, VR-max: its kink needs many nodes."""

    def rule(toy, p, q):
        nodes = 1000 if toy.reparameterised else None
        value = mean(toy, K, lambda grid: grid.log_w.max(0).values, p, q, q, nodes)
        return value, value

    return rule


def ciwae(beta: float):
    return lambda grid: beta * elbo(grid) + (1 - beta) * iwae(grid)


def sticking_the_landing(toy, p, q):
    """Roeder et al. 2017, eq. 7: sum_k w~_k (d log w_k / d z_k) (d z_k / d phi), K = 2."""
    for_guide = mean(
        toy, 2, lambda grid: (grid.share * grid.log_w).sum(0), p, q, without_gradient(q)
    )
    return mean(toy, 2, iwae, p, q, q), for_guide


def wake(toy, p, q):
    """Bornschein & Bengio 2015, eqs. 6 and 9: sum_k w~_k d log p and sum_k w~_k d log q, K = 2."""
    drawn = without_gradient(q)
    for_model = mean(toy, 2, lambda grid: (grid.share * grid.log_p).sum(0), p, drawn, drawn)
    return for_model, mean(toy, 2, lambda grid: (grid.share * grid.log_q).sum(0), p, drawn, q)


def chi(order: float):
    """-grad CUBO_n = (1 - 1/n) E_q[w^n grad log q] / E_q[w^n], both means over the same K = 2."""

    def rule(toy, p, q):
        def scores(grid: Grid) -> Tensor:
            w = grid.log_w.detach().exp() ** order
            return (1 - 1 / order) * (w * grid.log_q).sum(0) / w.sum(0)

        return wake(toy, p, q)[0], mean(toy, 2, scores, p, without_gradient(q), q)

    return rule


def sleep(toy, p, q):
    """The same, eq. 10."""
    return wake(toy, p, q)[0], toy.log_q_of_dreams(without_gradient(p), q)


def wake_and_sleep(toy, p, q):
    for_model, awake = wake(toy, p, q)
    return for_model, (awake + sleep(toy, p, q)[1]) / 2


def covariances(betas):
    """Masrani et al. 2019, eq. 11: E_pi[d log w] + Cov_pi[d log pi~, log w], K = 2.

    The covariance is that of a sample, with K / (K - 1): then one interval is the ELBO.
    """

    def value(grid: Grid) -> Tensor:
        total = torch.zeros_like(grid.chance)
        for beta, above in itertools.pairwise([*betas, 1.0]):
            s = (beta * grid.log_w).softmax(0).detach()
            f = grid.log_w.detach()
            log_pi = (1 - beta) * grid.log_q + beta * grid.log_p
            covariance = 2 * (s * (f - (s * f).sum(0)) * log_pi).sum(0)
            total = total + (above - beta) * ((s * grid.log_w).sum(0) + covariance)
        return total

    def rule(toy, p, q):
        found = mean(toy, 2, value, p, without_gradient(q), q)
        return found, found

    return rule


def expected_gradient(rule, toy) -> Tensor:
    """Of the model's parameters, then the guide's."""
    p, q = parameters(toy.theta), parameters(toy.phi)
    found = []
    for value, own in zip(rule(toy, p, q), (p, q), strict=True):
        leaves = list(vars(own).values())
        found += torch.autograd.grad(
            value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return torch.stack(found)


# ------------------------------------------------------------------------------ what is drawn


def mean_and_error(gradients: Tensor) -> tuple[Tensor, Tensor]:
    return gradients.mean(1), gradients.std(1) / math.sqrt(gradients.shape[1])


def assert_expected(gradients: Tensor, expected: Tensor) -> None:
    """Within 4.5 standard errors, all of them small against the gradient's length."""
    found, error = mean_and_error(gradients)
    assert ((found - expected).abs() <= 4.5 * error + 1e-6).all(), (found - expected) / error
    assert error.max() < 0.05 * expected.norm()


# ------------------------------------------------------------------------------ the table

L1, L2 = expectation_of(1, elbo), expectation_of(2, iwae)
THERMODYNAMIC = covariances([0.0, *(0.025 ** (1 - i / 19) for i in range(19))])
WITHOUT_SIGNALS = [  # in need of no signal from draws without reparameterisation
    (TVO(2), THERMODYNAMIC),
    (TVO(2, BETAS), covariances(BETAS)),
    (ReweightedWakeSleep(2), wake),
    (ForwardKL(2), wake),
    (CUBO(2), chi(2.0)),
    (CUBO(2, 3.0), chi(3.0)),
]
FOR_ALL = [
    (ELBO(), L1),
    (ELBO(3), L1),
    (ELBO(2, beta=0.4), expectation_of(1, lambda grid: elbo(grid, 0.4))),
    (ELBO(2, kl="analytic"), L1),
    (IWAE(2), L2),
    (MIWAE(2, 2), L2),
    (PIWAE(2, 1), expectation_of(2, iwae, 1, elbo)),
    (CIWAE(2, 0.3), expectation_of(2, ciwae(0.3))),
    (Renyi(2, 0.5), expectation_of(2, renyi(0.5))),
    (Renyi(2, 1.0), L1),
    (Renyi(2, 2.0), expectation_of(2, renyi(2.0))),
    (Renyi(2, -1.0), expectation_of(2, renyi(-1.0))),
    *WITHOUT_SIGNALS,
]
FOR_REPARAMETERISED = [
    (ELBO(2, gradient="stl"), L1),
    (ELBO(gradient="stl", beta=0.4), expectation_of(1, lambda grid: elbo(grid, 0.4))),
    (IWAE(2, "stl"), sticking_the_landing),
    (IWAE(2, "dreg"), L2),
    (ForwardKL(2, "dreg"), wake),
]
FOR_ONE_LATENT = [  # many nodes, or dreams that are known
    (PIWAE(2, 2), expectation_of(4, iwae, 2, iwae)),
    (Renyi(2, -math.inf), largest(2)),
    (ReweightedWakeSleep(2, "sleep"), sleep),
    (ReweightedWakeSleep(2, "both"), wake_and_sleep),
]
TABLE = [
    *itertools.product(ALL, FOR_ALL),
    *itertools.product(REPARAMETERISED, FOR_REPARAMETERISED),
    *itertools.product((Gaussian, Coins), FOR_ONE_LATENT),
]


def name(value) -> str:
    return value.__name__ if isinstance(value, type) else repr(value[0])


@pytest.mark.parametrize(("toy", "case"), TABLE, ids=name)
def test_the_mean_gradient_is_the_papers(toy, case):
    objective, rule = case
    gradients = drawn_gradients(copy.deepcopy(objective), toy())
    assert gradients.dtype == torch.float64
    assert_expected(gradients, expected_gradient(rule, toy()))


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_the_sums_give_the_gaussian_elbo_in_closed_form(beta):
    def closed_form(toy, p, q):
        return toy.elbo(p, q, beta), toy.elbo(p, q, beta)

    ours = expected_gradient(expectation_of(1, lambda grid: elbo(grid, beta)), Gaussian())
    assert_close(ours, expected_gradient(closed_form, Gaussian()))
    assert_expected(drawn_gradients(ELBO(2, beta=beta), Gaussian()), ours)


@pytest.mark.parametrize(
    ("objective", "rule"),
    [(IWAE(2, "stl"), sticking_the_landing), (ForwardKL(2), wake), (TVO(2), THERMODYNAMIC)],
)
def test_a_biased_gradient_is_told_from_the_bounds_own(objective, rule):
    """Else its agreement with the paper's expectation would say nothing."""
    _, error = mean_and_error(drawn_gradients(objective, Gaussian()))
    bias = expected_gradient(rule, Gaussian()) - expected_gradient(L2, Gaussian())
    assert (bias / error).abs().max() > 20


# ------------------------------------------------------------------------------ no path

BASELINES = ("none", "average", "learned", "leave-one-out", "vimco")
L3 = expectation_of(3, iwae)
SCORED = [
    (Coins, partial(ELBO, 3), L1),
    (Coins, partial(IWAE, 3), L3),
    (Coins, partial(MIWAE, 2, 3), L3),
    (Coins, partial(PIWAE, 2, 2), expectation_of(4, iwae, 2, iwae)),
    (Coins, partial(CIWAE, 3, 0.3), expectation_of(3, ciwae(0.3))),
    (Coins, partial(Renyi, 3, 0.5), expectation_of(3, renyi(0.5))),
    (Coins, partial(Renyi, 3, -math.inf), largest(3)),
    (Mixed, partial(ELBO, 2), L1),
    (Mixed, partial(IWAE, 2), L2),
]
OF_COINS = [*(make for toy, make, _ in SCORED if toy is Coins), partial(Renyi, 3, 1.0)]
SCORED_NAMES = [f"{toy.__name__}-{make()!r}" for toy, make, _ in SCORED]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("toy", "make", "rule"), SCORED, ids=SCORED_NAMES)
def test_a_baseline_leaves_the_expected_gradient_where_it_is(toy, make, rule, baseline):
    gradients = drawn_gradients(make(baseline=baseline), toy())
    assert_expected(gradients, expected_gradient(rule, toy()))


def trained(objective, toy, steps: int = 100):
    """The objective after a learned baseline, if it has one, has met some rewards."""
    drawn_gradients(objective, toy, 10, 1)
    kept = list(objective.parameters())
    if kept:
        descent = torch.optim.Adam(kept, 0.05)
        p, x = parameters(toy.theta | toy.phi), torch.full((100,), toy.x, dtype=torch.float64)
        for _ in range(steps):
            descent.zero_grad()
            objective.loss_and_grads(toy.model, toy.guide, x, p)
            descent.step()
    return objective


@pytest.mark.parametrize("baseline", BASELINES[1:])
@pytest.mark.parametrize("make", OF_COINS, ids=lambda make: repr(make()))
def test_a_baseline_lowers_the_variance(make, baseline):
    """By nearly half at least, in sum over the guide's parameters."""
    toy, size = Coins(), len(Coins.phi)
    variances = [
        drawn_gradients(trained(make(baseline=b), toy), toy, 2000)[-size:].var(1).sum()
        for b in (baseline, "none")
    ]
    assert variances[0] < 0.6 * variances[1]


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (IWAE, lambda w: w.mean().log()),
        (partial(Renyi, alpha=0.5), lambda w: 2 * w.sqrt().mean().log()),
        (partial(Renyi, alpha=-math.inf), lambda w: w.max().log()),
    ],
)
def test_baselines_of_other_particles_are_as_published(make, value):
    """Mnih & Rezende 2016, eq. 10: the others' geometric mean stands for w_k; or they are alone."""
    w = torch.tensor([0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    for k in range(4):
        others = torch.cat([w[:k], w[k + 1 :]])
        filled = torch.cat([others, others.prod().reshape(1) ** (1 / 3)])
        for baseline, expected in (("leave-one-out", others), ("vimco", filled)):
            found = make(4).reward_without_each(w.log()[:, None], baseline)
            assert_close(found[k, 0], value(expected))


@pytest.mark.parametrize(
    ("of_z1", "of_z2"),
    [("vimco", "none"), ("average", "leave-one-out"), ("none", "learned"), ("learned", "vimco")],
)
def test_each_site_has_the_baseline_named_for_it(of_z1, of_z2):
    """Its own parameters' gradients are, draw for draw, those under that baseline everywhere."""

    def of_the_guide(baseline) -> Tensor:
        torch.manual_seed(5)
        return drawn_gradients(IWAE(3, baseline=baseline), Coins(), 50, 2)[-3:]

    each = of_the_guide({"z1": of_z1, "z2": of_z2})
    assert_close(each[:1], of_the_guide(of_z1)[:1])
    assert_close(each[1:], of_the_guide(of_z2)[1:])
    assert (of_the_guide(of_z1) != of_the_guide(of_z2)).any(1).all()


def test_a_site_that_is_not_named_has_the_automatic_baseline():
    found = []
    for baseline in ({"z2": "none"}, {"z1": "vimco", "z2": "none"}):
        torch.manual_seed(5)
        found.append(drawn_gradients(IWAE(3, baseline=baseline), Coins(), 50, 1))
    assert_close(*found)


@pytest.mark.parametrize("baselines", [("learned", "vimco"), ("average", "leave-one-out")], ids=str)
def test_baselines_by_name_leave_the_expected_gradient_where_it_is(baselines):
    by_site = dict(zip(("z1", "z2"), baselines, strict=True))
    gradients = drawn_gradients(IWAE(3, baseline=by_site), Coins())
    assert_expected(gradients, expected_gradient(L3, Coins()))


@pytest.mark.parametrize(("toy", "site"), [(Coins, "z1"), (Mixed, "c")])
@pytest.mark.parametrize(
    "objective",
    [ELBO(gradient="stl"), IWAE(2, "stl"), IWAE(2, "dreg"), ForwardKL(2, "dreg")],
    ids=repr,
)
def test_a_gradient_through_draws_is_refused_where_there_is_no_path(objective, toy, site):
    message = f"gradient='{objective.gradient}' goes .* those of '{site}' are not reparameterised"
    with pytest.raises(ValueError, match=message):
        drawn_gradients(objective, toy(), 10, 1)
