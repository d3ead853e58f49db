"""The sleep phase: the guide learns from data that the model has drawn."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pvae import Given, Latent, LatentModel, Observed, PyroPair
from pvae.nets import Linear
from pvae.objectives import ReweightedWakeSleep
from tests.exact import LinearGaussian
from tests.exact.parameters import normal
from tests.fitting import fit

TRUTH = LinearGaussian.drawn()
S2 = 0.8  # the guide's variance
ROUNDS, COPIES = 100, 50


class Amortised(nn.Module):
    """TRUTH, whose x may come as two columns, and q(z | x) = N(V x + c, S2 I)."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        self.b = nn.Parameter(TRUTH.b.clone())
        self.V = nn.Parameter(0.3 * normal(3, 5, seed=5))
        self.c = nn.Parameter(0.2 * normal(3, seed=6))

    def observed(self, batch):
        return torch.cat(list(batch), -1) if self.columns == 2 else batch[0]

    def model(self, *batch, **named):
        batch = batch or (named["first"], named["rest"])
        prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
        with pyro.plate("data", len(batch[0])):
            z = pyro.sample("z", prior)
            mean = z @ TRUTH.W.T + self.b
            if self.columns == 1:
                pyro.sample("x", dist.Normal(mean, TRUTH.sigma).to_event(1), obs=batch[0])
                return
            for name, part, x in zip(("x1", "x2"), mean.split((2, 3), -1), batch, strict=True):
                pyro.sample(name, dist.Normal(part, TRUTH.sigma).to_event(1), obs=x)

    def guide(self, *batch, **named):
        batch = batch or (named["first"], named["rest"])
        loc = self.observed(batch) @ self.V.T + self.c
        with pyro.plate("data", len(batch[0])):
            pyro.sample("z", dist.Normal(loc, S2**0.5).to_event(1))

    def expected(self) -> list[torch.Tensor]:
        """E_p[grad log q(z | x)] of V and c: x ~ N(b, C), E[z x'] = W'."""
        V, c = self.V.detach(), self.c.detach()
        C = TRUTH.W @ TRUTH.W.T + TRUTH.sigma**2 * torch.eye(5, dtype=torch.float64)
        second = C + torch.outer(TRUTH.b, TRUTH.b)
        of_V = TRUTH.W.T - V @ second - torch.outer(c, TRUTH.b)
        return [of_V / S2, -(V @ TRUTH.b + c) / S2]


def batches(columns: int, size: int = COPIES):
    """Far from what the model draws: data given must not matter to the sleep phase."""
    x = TRUTH.sample(size) + 10
    return (x,) if columns == 1 else tuple(x.split((2, 3), -1))


def assert_sleeps(gradients, expected, share: float = 1.0) -> None:
    """The mean over rounds is the expectation, within 4.5 standard errors."""
    for found, truth in zip(zip(*gradients, strict=True), expected, strict=True):
        values = torch.stack(found) / COPIES
        error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - share * truth).abs() < 4.5 * error).all()
        assert (4.5 * error).max() < 0.5 * share * truth.abs().max()


CASES = [("by position", 1), ("by position", 2), ("by keyword", 2), ("fitted", 1), ("fitted", 2)]


@pytest.mark.parametrize(("how", "columns"), CASES)
def test_the_guide_learns_from_what_the_model_draws(how, columns):
    pair, objective = Amortised(columns), ReweightedWakeSleep(2, "sleep")
    args = batches(columns)
    kwargs = dict(zip(("first", "rest"), args, strict=False)) if how == "by keyword" else {}
    gradients = []
    for _ in range(ROUNDS):
        if how == "fitted":
            wrapped = PyroPair(pair.model, pair.guide)
            names = ("first", "rest")
            batch = args[0] if columns == 1 else dict(zip(names, args, strict=True))
            total = objective.estimate(wrapped.programs(batch))[1]
        elif how == "by keyword":
            total = -objective.differentiable_loss(pair.model, pair.guide, **kwargs)
        else:
            total = -objective.differentiable_loss(pair.model, pair.guide, *args)
        gradients.append(torch.autograd.grad(total, [pair.V, pair.c]))
    assert_sleeps(gradients, pair.expected())


def test_both_phases_are_half_of_each():
    """Draw for draw: the wake phase comes first, and the dreams after it."""
    pair, (x,) = Amortised(1), batches(1)
    gradients = {}
    for phase in ("wake", "sleep", "both"):
        objective = ReweightedWakeSleep(4, phase)
        objective.loss(pair.model, pair.guide, x)
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        gradients[phase] = torch.autograd.grad(loss, [pair.V, pair.c, pair.b])
    for wake, sleep, both in zip(*gradients.values(), strict=True):
        assert torch.allclose(both, (wake + sleep) / 2, atol=1e-9)
    model = [own[2] for own in gradients.values()]
    assert torch.allclose(model[0], model[1])
    assert not torch.allclose(gradients["wake"][0], gradients["sleep"][0])


def test_a_declared_model_dreams_of_its_columns_and_keeps_its_inputs():
    """x | z, y ~ N(W [z, y], s^2), q(z | x, y) = N(V [x, y], s^2): the labels y are given.

    E[d log q / d V] = (E[z r'] - V E[r r']) / s^2, with r = [x, y] what the guide reads.
    """
    torch.manual_seed(0)
    model = LatentModel(
        y=Given(categories=2),
        z=Latent(dist.Normal, 1),
        x=Observed(dist.Normal, 2, given=("z", "y"), net=Linear(), scale=0.5),
        guide={"z": Latent(dist.Normal, 1, given=("x", "y"), net=Linear(), scale=0.5)},
    ).double()
    label = torch.arange(COPIES) % 2
    programs = model.programs({"x": normal(COPIES, 2, seed=1) + 10, "y": label})
    W = model.module_of("x").nets["net"].body.weight.detach()
    V = model.guide_modules["z"].nets["net"].body.weight
    gradients = []
    for _ in range(4 * ROUNDS):
        total = ReweightedWakeSleep(2, "sleep").estimate(programs)[1]
        gradients.append(torch.autograd.grad(total, [V]))
    one_hot = torch.nn.functional.one_hot(label, 2).double()
    r = torch.cat([one_hot @ W[:, 1:].T, one_hot], 1)  # its mean
    second = r.T @ r / COPIES
    second[:2, :2] += W[:, :1] @ W[:, :1].T + 0.25 * torch.eye(2, dtype=torch.float64)
    cross = torch.cat([W[:, 0], torch.zeros(2, dtype=torch.float64)])
    assert_sleeps(gradients, [(cross - V.detach() @ second) / 0.25])


def test_sleep_trains_the_guide_to_the_posterior():
    model = LatentModel(
        z=Latent(dist.Normal, 3),
        x=Observed(dist.Normal, 5, given="z", net=Linear(), scale=0.5),
        guide={"z": Latent(dist.Normal, 3, given="x", net=Linear(), scale=0.5)},
    ).double()
    x = TRUTH.sample(50)
    fitted = fit(model, x, ReweightedWakeSleep(5, "sleep"), epochs=60, lr=0.03)
    assert fitted.history["train"].iloc[-1] > fitted.history["train"].iloc[0] + 5


@pytest.mark.parametrize("guide", ["sleep", "both"])
def test_data_subsampled_inside_the_model_are_refused(guide):
    x = TRUTH.sample(20)
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as index:
            z = pyro.sample("z", prior)
            mean = z @ TRUTH.W.T + TRUTH.b
            pyro.sample("x", dist.Normal(mean, TRUTH.sigma).to_event(1), obs=x[index])

    def posterior(x):
        mean, S = TRUTH.posterior(x)
        with pyro.plate("data", len(x), subsample_size=5) as index:
            pyro.sample("z", dist.MultivariateNormal(mean[index], S))

    match = r"sleep phase gives the guide data that the model has drawn, and cannot tell .* whole"
    with pytest.raises(ValueError, match=match):
        ReweightedWakeSleep(2, guide).differentiable_loss(model, posterior, x)
    loss = ReweightedWakeSleep(2, "wake").differentiable_loss(model, posterior, x)
    assert math.isfinite(float(loss.detach()))


def test_data_changed_within_the_model_are_refused():
    x = TRUTH.sample(6)

    def model(x):
        TRUTH.model(2 * x)

    match = "Pass them to model and guide as they are observed"
    with pytest.raises(ValueError, match=match):
        ReweightedWakeSleep(2, "sleep").differentiable_loss(model, TRUTH.guide, x)
