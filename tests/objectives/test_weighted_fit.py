"""Weighted and stateful objectives in `fit`: their history, at each speed, and after a kill."""

import copy

import pytest
import torch
from pyro.distributions import Bernoulli
from torch import nn

import pvae
import pvae.step
from pvae import Latent, LatentModel, Observed, PyroPair, bounds, checkpoint, log_weights
from pvae.fence import evaluating, fenced
from pvae.nets import MLP
from pvae.objectives import (
    CUBO,
    ELBO,
    IWAE,
    PIWAE,
    TVO,
    Cyclical,
    Renyi,
    ReweightedWakeSleep,
    WarmUp,
)
from tests.fitting import (
    assert_same_fit,
    binary,
    declare,
    fit,
    parameters,
    traced,
)
from tests.objectives.test_weighted import Coins
from tests.test_checkpoint import Killed, interrupt
from tests.test_lowering import needs_compiler

CPU = torch.device("cpu")
X, VALID = binary(), binary(30)[20:]
SETTINGS = {"batch_size": 8, "epochs": 3, "lr": 1e-2}  # 20 data: 3 steps an epoch


def halving(step: int) -> float:
    return 0.5**step


WEIGHTED = [
    ELBO(2, beta=4.0),
    ELBO(2, beta=WarmUp(10)),
    ELBO(2, beta=Cyclical(12)),
    ELBO(2, beta=halving),
    ELBO(2, free_bits=0.5),
    ELBO(2, free_bits=0.1, free_bits_per="unit", kl="analytic"),
]
BOUNDS_OF_THEIR_OWN = [CUBO(4), TVO(4), Renyi(4, alpha=-1.0)]


def coins() -> LatentModel:
    """A guide whose draws are not reparameterised."""
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(Bernoulli, 3),
        x=Observed(Bernoulli, 6, given="z", net=MLP(5)),
        guide={"z": Latent(Bernoulli, 3, given="x", net=MLP(5))},
    )


def vae() -> LatentModel:
    return declare("vae")


# ------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("objective", WEIGHTED, ids=repr)
def test_history_shows_the_weighted_objective_beside_the_bound(objective):
    fitted = fit(vae(), X, objective, validation=VALID, **SETTINGS)
    rows = fitted.summary().index
    assert {"train", "train weighted", "valid"} <= set(fitted.history)
    assert "train weighted (nats per datum)" in rows
    assert "valid weighted" not in fitted.history
    kl = fitted.history["train KL[z]"]
    sampled = fitted.history["train reconstruction[x]"] - kl
    if objective.kl == "sampled":
        assert fitted.history["train"].to_numpy() == pytest.approx(sampled.to_numpy(), abs=1e-5)
    if objective.beta == 4.0:
        weighted = fitted.history["train reconstruction[x]"] - 4 * kl
        found = fitted.history["train weighted"].to_numpy()
        assert found == pytest.approx(weighted.to_numpy(), abs=1e-5)


@pytest.mark.parametrize("objective", WEIGHTED, ids=repr)
def test_validation_is_unweighted(objective):
    """The plain ELBO of the weights after the last epoch, at the draws of validation."""
    model = vae()
    fitted = fit(model, X, objective, validation=VALID, patience=100, **SETTINGS)
    last = fit(vae(), X, objective, **SETTINGS).model  # its last weights, not the best
    plain = ELBO(2, kl=objective.kl)
    with evaluating(last), fenced(0, CPU):
        expected = plain.bound(last.draw(VALID, 2)).mean()
    assert fitted.history["valid"].iloc[-1] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(2), ELBO(2, kl="analytic")], ids=repr)
def test_what_is_a_bound_has_no_label(objective):
    fitted = fit(vae(), X, objective, **SETTINGS)
    assert not [name for name in fitted.history if "weighted" in name]


@pytest.mark.parametrize("objective", BOUNDS_OF_THEIR_OWN, ids=repr)
def test_what_is_no_lower_bound_stands_beside_l_k(objective):
    fitted = fit(vae(), X, objective, validation=VALID, **SETTINGS)
    name = f"train {type(objective).__name__}"
    assert {"train", name} <= set(fitted.history)
    assert f"{name} (nats per datum)" in fitted.summary().index
    last = fit(vae(), X, objective, **SETTINGS).model
    with evaluating(last), fenced(0, CPU):
        expected = bounds.iwae(last.draw(VALID, 4).log_weights).mean()
    assert fitted.history["valid"].iloc[-1] == pytest.approx(float(expected), abs=1e-5)


# ------------------------------------------------------------------------------ schedules


@pytest.fixture
def lowerings(monkeypatch) -> list:
    """Every graph that a step was read into."""
    made: list = []
    lowered = pvae.step.Lowered

    def counted(*args, **kwargs):
        made.append(lowered(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(pvae.step, "Lowered", counted)
    return made


@pytest.mark.parametrize("objective", WEIGHTED, ids=repr)
def test_a_schedule_is_followed_in_a_graph_that_is_read_once(objective, lowerings):
    eager = fit(vae(), X, objective, compile=False, **SETTINGS)
    assert not lowerings
    assert_same_fit(eager, traced(vae(), X, objective, **SETTINGS))
    assert len(lowerings) == 1


@needs_compiler
def test_a_schedule_is_followed_in_a_graph_that_is_compiled_once(lowerings):
    model, x, objective = vae().double(), X.double(), ELBO(2, beta=WarmUp(10))
    eager = fit(copy.deepcopy(model), x, objective, compile=False, **SETTINGS)
    compiled = fit(model, x, objective, compile=True, **SETTINGS)
    assert len(lowerings) == 1
    columns = [name for name in eager.history if name != "seconds"]
    difference = (eager.history[columns] - compiled.history[columns]).abs()
    assert float(difference.max().max()) < 1e-9


@pytest.mark.parametrize("how", [fit, traced])
def test_beta_is_that_of_the_steps_taken(how):
    """At a rate of 0 nothing changes but beta, which is 0 and 1 in the two steps of an epoch."""
    settings = {"batch_size": 10, "epochs": 2, "lr": 0.0}
    asked: list[int] = []

    def first(step):
        asked.append(step)
        return float(step % 2)

    def second(step):
        return 1.0 - step % 2

    history = how(vae(), X, ELBO(beta=first), **settings).history
    assert asked[-4:] == [0, 1, 2, 3]
    other = how(vae(), X, ELBO(beta=second), **settings).history
    plain = how(vae(), X, ELBO(), **settings).history
    assert history["train"].equals(plain["train"])
    both = (history["train weighted"] + other["train weighted"]).to_numpy()
    expected = 2 * plain["train reconstruction[x]"] - plain["train KL[z]"]
    assert both == pytest.approx(expected.to_numpy(), abs=1e-5)
    assert (history["train weighted"] != other["train weighted"]).all()


# ------------------------------------------------------------------------------ killed and resumed

RESUMED = [
    (vae, ELBO(2, beta=WarmUp(10))),
    (vae, ELBO(2, beta=Cyclical(12))),
    (coins, ELBO(1, baseline="average")),
    (coins, ELBO(2, baseline="learned", beta=WarmUp(10))),
    (coins, IWAE(1)),
]


@pytest.mark.parametrize(
    ("make", "objective"), RESUMED, ids=lambda value: getattr(value, "__name__", repr(value))
)
@pytest.mark.parametrize("how", [fit, traced])
def test_a_run_goes_on_to_the_same_numbers(tmp_path, make, objective, how):
    whole = how(make(), X, objective, **SETTINGS)
    how(make(), X, objective, folder=tmp_path, **{**SETTINGS, "epochs": 1})
    resumed = how(make(), X, objective, folder=tmp_path, **SETTINGS)
    assert_same_fit(whole, resumed)


@pytest.mark.parametrize("moment", [10, 23])
@pytest.mark.parametrize(("make", "objective"), [RESUMED[0], RESUMED[3]], ids=["beta", "average"])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, make, objective, moment):
    """The second and third checkpoints are cut short, as in `tests/test_checkpoint.py`."""
    with monkeypatch.context() as context:
        interrupt(context, moment, Killed())
        with pytest.raises(Killed):
            fit(make(), X, objective, folder=tmp_path, **SETTINGS)
    resumed = fit(make(), X, objective, folder=tmp_path, **SETTINGS)
    assert_same_fit(fit(make(), X, objective, **SETTINGS), resumed)


def test_an_average_that_is_not_resumed_would_be_seen():
    """With another baseline the weights are others."""
    one = fit(coins(), X, ELBO(1, baseline="average"), **SETTINGS)
    none = fit(coins(), X, ELBO(1, baseline="none"), **SETTINGS)
    assert not torch.equal(parameters(one.model), parameters(none.model))


def test_another_schedule_is_another_run(tmp_path):
    fit(vae(), X, ELBO(beta=WarmUp(10)), folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"holds another run \(objective: .*WarmUp\(steps=10"):
        fit(vae(), X, ELBO(beta=WarmUp(20)), folder=tmp_path, **SETTINGS)


# ------------------------------------------------------------------------------ objectives given


GIVEN = [
    *WEIGHTED[1:3],
    *BOUNDS_OF_THEIR_OWN[:1],
    PIWAE(2, 2),
    ReweightedWakeSleep(2, guide="both"),
    ELBO(1, baseline="average"),
    ELBO(2, baseline="learned"),
    IWAE(1, baseline={"z": nn.Linear(6, 1)}),
]


@pytest.mark.parametrize("objective", GIVEN, ids=repr)
def test_an_objective_that_is_given_stays_as_it_was(objective):
    own = copy.deepcopy(objective)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    title, kept, calls = repr(own), list(own.kept), own.calls
    networks = [p.clone() for b in _networks(own) for p in b.parameters()]
    first = fit(coins(), X, own, **SETTINGS)
    assert (repr(own), list(own.kept), own.calls) == (title, kept, calls)
    assert own.state_dict().keys() == before.keys()
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name])
    after = [p for b in _networks(own) for p in b.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, networks, strict=True))
    assert_same_fit(first, fit(coins(), X, own, **SETTINGS))


def _networks(objective) -> list[nn.Module]:
    by_site = objective.baseline if isinstance(objective.baseline, dict) else {}
    return [one for one in by_site.values() if isinstance(one, nn.Module)]


def test_a_learned_baseline_comes_to_predict_the_reward(tmp_path):
    """Of two kinds of data; an average's error would be at least the variance between them."""
    pair = Coins()
    pair.W.requires_grad_(False)
    x = torch.cat([torch.zeros(20, 4), 3 * torch.ones(20, 4)]).double()
    objective = ELBO(1, baseline={"z": nn.Linear(4, 1)})
    settings = {"batch_size": 40, "lr": 0.2, "epochs": 50, "folder": tmp_path}
    fitted = fit(PyroPair(pair.model, pair.guide), x, objective, **settings)
    meta, _, training = checkpoint.read(tmp_path)
    state = checkpoint.unpack(meta["state"], training)["objective"]
    net = nn.Linear(4, 1).double()
    net.load_state_dict({name.rsplit(".", 1)[1]: v for name, v in state.items() if "." in name})
    reward = log_weights(fitted.model, x, 200).mean(0)
    with torch.no_grad():
        error = (net(x).squeeze(-1) - reward).square().mean()
    assert error < 0.1 * reward.var()
    assert reward.var() > 1
