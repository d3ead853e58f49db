"""The training loop, on models whose every step is known in closed form."""

import random
import re
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from torch import Tensor, nn

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed
from pvae.nets import MLP, Linear
from tests.exact import GaussianMixture
from tests.fitting import TRUTH, all_at, fit, gaussian, parameters, ppca, same

SGD = torch.optim.SGD


# ------------------------------------------------------------------------------ steps and batches


def test_the_number_of_steps_is_exact_and_the_last_batch_is_used():
    x = all_at(3.0, 50)
    x[::2] = -1.0
    fitted = fit(gaussian(), x, steps=7, lr=0.0, optimizer=SGD)  # batches of 20, 20 and 10
    assert fitted.history["step"].tolist() == [3, 6, 7]
    assert (fitted.stopped, len(fitted.history)) == ("steps", 3)
    log_p = Normal(0.0, 1.0).log_prob(x).mean()  # each datum once, whatever its batch's size
    np.testing.assert_allclose(fitted.history["train"][:2], float(log_p), rtol=1e-12)


def test_the_first_limit_reached_stops():
    assert fit(gaussian(), all_at(3.0), epochs=2, steps=5).stopped == "epochs"
    fitted = fit(gaussian(), all_at(3.0), epochs=9, steps=5)
    assert (fitted.stopped, fitted.history["step"].iloc[-1]) == ("steps", 5)
    assert len(fit(gaussian(), all_at(3.0)).history) == 100


def test_batches_are_shuffled_anew_in_each_epoch():
    """SGD forgets: where mu ends depends on the order of the data."""
    x = torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    means = {
        float(
            fit(gaussian(), x, batch_size=1, epochs=1, lr=0.5, optimizer=SGD, seed=seed)
            .history["train"]
            .iloc[0]
        )
        for seed in range(4)
    }
    assert len(means) == 4


def test_a_seed_gives_the_same_numbers_and_another_one_others():
    x, models = TRUTH.sample(50), [ppca() for _ in range(3)]
    torch.manual_seed(17)
    fit(models[0], x, epochs=2, seed=1)
    torch.manual_seed(18)
    fit(models[1], x, epochs=2, seed=1)
    fit(models[2], x, epochs=2, seed=2)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def flushes_denormals() -> bool:
    return bool(torch.tensor(torch.finfo(torch.float32).tiny) / 2 == 0)


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_global_state_is_left_alone(setting, fails):
    model, data = (poisoned("guide"), marked()) if fails else (ppca(), TRUTH.sample(50))
    outcome = pytest.raises(FloatingPointError) if fails else nullcontext()
    torch.set_flush_denormal(setting)
    pyro.enable_validation(setting)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with outcome:
        fit(model, data, epochs=2, validation=data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert flushes_denormals() is setting
    assert torch.distributions.Distribution._validate_args is setting
    assert pyro.infer.util.is_validation_enabled() is setting
    assert poutine.util.is_validation_enabled() is setting
    torch.set_flush_denormal(False)
    pyro.enable_validation(True)


# ------------------------------------------------------------------------------ validation

# mu after t epochs is 3 (1 - 0.9^t): 0.813, 1.032, 1.229 for t = 3, 4, 5. Validation data lie at 1.
PASSING_BY = {"lr": 0.1, "optimizer": SGD, "validation": all_at(1.0)}


@pytest.mark.parametrize(
    ("settings", "stopped", "epochs"),
    [({"patience": 3}, "patience", 7), ({"epochs": 10}, "epochs", 10)],
)
def test_the_weights_of_the_best_epoch_are_restored(settings, stopped, epochs):
    model = gaussian()
    fitted = fit(model, all_at(3.0), **PASSING_BY, **settings)
    assert (fitted.stopped, len(fitted.history), fitted.best_epoch) == (stopped, epochs, 4)
    assert parameters(model).item() == pytest.approx(3 * (1 - 0.9**4), abs=1e-12)
    valid = fitted.history["valid"]
    assert valid.idxmax() == 4
    mu = 3 * (1 - 0.9 ** valid.index.to_numpy())
    expected = Normal(torch.as_tensor(mu), 1.0).log_prob(torch.ones(epochs, dtype=torch.float64))
    np.testing.assert_allclose(valid, expected, rtol=1e-12)


def test_a_bound_that_is_only_as_good_does_not_keep_the_fit_going():
    standing = {**PASSING_BY, "lr": 0.0}
    fitted = fit(gaussian(), all_at(3.0), epochs=9, patience=2, **standing)
    assert (fitted.stopped, len(fitted.history), fitted.best_epoch) == ("patience", 3, 1)


def test_without_validation_the_last_weights_stay():
    model = gaussian()
    fitted = fit(model, all_at(3.0), epochs=10, lr=0.1, optimizer=SGD)
    assert fitted.best_epoch == 10
    assert parameters(model).item() == pytest.approx(3 * (1 - 0.9**10), abs=1e-12)


@pytest.mark.parametrize("objective", [pvae.IWAE(3), pyro.infer.Trace_ELBO()])
def test_validation_does_not_change_training(objective):
    x = TRUTH.sample(50)
    without = fit(ppca(), x, objective, epochs=4).history
    beside = fit(ppca(), x, objective, epochs=4, validation=TRUTH.sample(30, seed=5)).history
    columns = [name for name in without.columns if name != "seconds"]
    assert without[columns].equals(beside[columns])


def test_validation_has_the_same_draws_each_epoch():
    x = TRUTH.sample(50)
    frozen = fit(ppca(), x, epochs=3, lr=0.0, optimizer=SGD, validation=x[:30]).history
    assert frozen["valid"].nunique() == 1
    assert frozen["valid KL[z]"].nunique() == 1
    assert frozen["train"].nunique() == 3


# ------------------------------------------------------------------------------ history


def two_layers() -> LatentModel:
    return LatentModel(
        top=Latent(Normal, 2),
        low=Latent(Normal, 3, given="top", net=MLP(8)),
        x=Observed(Normal, 5, given="low", net=MLP(8), scale=Learned(1.0)),
        y=Observed(Normal, 1, given="low", net=Linear(), scale=1.0),
        guide={
            "low": Latent(Normal, 3, given=("x", "y"), net=MLP(8)),
            "top": Latent(Normal, 2, given="low", net=MLP(8)),
        },
    ).double()


@pytest.mark.parametrize("objective", [pvae.ELBO(), pvae.ELBO(3)])
def test_the_parts_of_the_history_add_up(objective):
    x = TRUTH.sample(50)
    data = {"x": x, "y": x[:, :1]}
    history = fit(two_layers(), data, objective, epochs=3, validation=data).history
    assert history.index.tolist() == [1, 2, 3]
    assert history.index.name == "epoch"
    parts = ["", " reconstruction[x]", " reconstruction[y]", " KL[low]", " KL[top]"]
    expected = [f"{split}{part}" for split in ("train", "valid") for part in parts]
    assert set(history.columns) == {"step", *expected, "lr", "seconds"}
    for split in ("train", "valid"):
        bound, x_part, y_part, low, top = (history[f"{split}{part}"] for part in parts)
        np.testing.assert_allclose(bound, x_part + y_part - low - top, rtol=1e-10)


def test_a_summed_site_has_its_part_of_the_history():
    truth = GaussianMixture.drawn()
    history = fit(truth.declared(), truth.sample(50), epochs=2).history
    kl = history["train KL[c]"]
    np.testing.assert_allclose(history["train"], history["train reconstruction[x]"] - kl)
    assert (kl > 0).all()


def test_pyros_objectives_have_their_parts_and_are_validated_as_they_are():
    """With RenyiELBO the validation bound is its own, above the ELBO that its parts add up to."""
    x = TRUTH.sample(20)
    objective = pyro.infer.RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True)
    row = fit(ppca(), x, objective, epochs=1, validation=x).history.iloc[0]
    for split in ("train", "valid"):
        elbo = row[f"{split} reconstruction[x]"] - row[f"{split} KL[z]"]
        assert elbo < row[split]


@pytest.mark.parametrize(
    "objective", [pvae.ELBO(), pyro.infer.Trace_ELBO()], ids=["ours", "Pyro's"]
)
def test_validation_that_is_not_finite_stops_the_fit(objective):
    x = torch.randn(20, 5)
    bad = x.clone()
    bad[4, 1] = 1e30  # finite, and its square is not
    match = (
        r"is -?(inf|nan) on validation data after epoch 1: first in site '[xz]', datum 4 of these"
    )
    with pytest.raises(FloatingPointError, match=match):
        pvae.fit(pvae.models.ppca(5, 2), x, objective, validation=bad, epochs=2, progress=False)


# ------------------------------------------------------------------------------ what goes wrong

POISON, WHERE = 7.0, 13


class Poisoned(nn.Module):
    """A linear net whose output is `bad` for each datum with the mark, the last input."""

    def __init__(self, inputs: int, outputs: int, bad: float):
        super().__init__()
        self.linear, self.bad = nn.Linear(inputs, outputs), bad

    def forward(self, *values: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
        x = torch.cat([value.expand(*batch, -1) for value in values], -1)
        return torch.where(x[..., -1:] == POISON, self.bad, self.linear(x))


class Steep(nn.Module):
    """A finite output, whose gradient is infinite at marked data."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(self.width * (x[..., -1:] != POISON)) * x[..., :1]


def marked(num_data: int = 60) -> dict[str, Tensor]:
    mark = torch.zeros(num_data, 1)
    mark[WHERE] = POISON
    return {"x": torch.randn(num_data, 2), "mark": mark}


def poisoned(where: str, bad: float = torch.nan) -> LatentModel:
    decoder = Poisoned(2, 2, bad) if where == "model" else MLP(4)
    encoder = {"guide": Poisoned(3, 1, bad), "gradient": Steep()}.get(where, MLP(4))
    return LatentModel(
        mark=Given(1),
        z=Latent(Normal, 1),
        x=Observed(Normal, 2, given=("z", "mark"), net=decoder, scale=1.0),
        guide={"z": Latent(Normal, 1, given=("x", "mark"), net=_joined(encoder), scale=0.5)},
    )


def _joined(net):
    return _Joined(net) if isinstance(net, Steep) else net


class _Joined(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *values: Tensor) -> Tensor:
        return self.net(torch.cat(values, -1))


def failing_step(model: LatentModel, data: dict[str, Tensor], objective, match: str) -> int:
    with pytest.raises(FloatingPointError, match=match) as caught:
        fit(model, data, objective, epochs=5, batch_size=10, seed=3)
    return int(re.search(r"at step (\d+), epoch 1", str(caught.value)).group(1))


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word on it
@pytest.mark.parametrize("objective", [pvae.ELBO(), pvae.IWAE(3), pyro.infer.Trace_ELBO()])
@pytest.mark.parametrize(
    ("where", "bad", "site"),
    [("guide", torch.nan, "z"), ("guide", torch.inf, "z"), ("model", -torch.inf, "x")],
)
def test_the_first_loss_that_is_not_finite_stops_the_fit(where, bad, site, objective):
    """The one datum with the mark is met at a step that the seed decides, in the first epoch."""
    data, model = marked(), poisoned(where, bad)
    before = [p.clone() for p in model.parameters()]
    match = (
        rf"objective is (nan|-inf) at step \d+, epoch 1: first in site '{site}', datum {WHERE}\. "
        "The model keeps its last good weights"
    )
    step = failing_step(model, data, objective, match)
    assert step > 1
    good = poisoned(where, bad)
    with torch.no_grad():
        for parameter, start in zip(good.parameters(), before, strict=True):
            parameter.copy_(start)
    fit(good, data, objective, steps=step - 1, batch_size=10, seed=3)
    assert same(model, good)
    assert parameters(model).isfinite().all()


def test_a_gradient_that_is_not_finite_names_its_parameter():
    data, model, good = marked(), poisoned("gradient"), poisoned("gradient")
    good.load_state_dict(model.state_dict())
    match = (
        r"The gradient of guide_modules\.z\S*width \(site 'z'\) is (nan|inf) at step \d+, epoch 1: "
        rf"first in datum {WHERE}\. The model keeps its last good weights\. Lower `lr`"
    )
    step = failing_step(model, data, pvae.ELBO(), match)
    fit(good, data, steps=step - 1, batch_size=10, seed=3)
    assert same(model, good)


def test_data_that_are_not_finite_are_refused_on_entry():
    x = TRUTH.sample(10)
    x[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of 10 rows, .* row 4"):
        fit(ppca(), x)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of 10 rows, .* row 4"):
        fit(ppca(), TRUTH.sample(10), validation=x)


def test_weights_that_a_step_made_overflow_are_put_back_to_the_epochs_first():
    model = pvae.models.vae(data_size=6, latent_size=2, hidden=(5,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(20, 6).round()
    with pytest.raises(FloatingPointError, match="last good weights"):
        pvae.fit(model, x, lr=1e45, optimizer=torch.optim.SGD, batch_size=5, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_buffers_that_a_failed_step_spoilt_are_put_back_as_well():
    class Spoilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 5)

        def forward(self, z: Tensor) -> Tensor:
            h = self.norm(z.reshape(-1, 2) * torch.nan)
            return self.out(h.reshape(z.shape))

    guide = {"z": Latent(Normal, 2, given="x", net=MLP(4))}
    x = Observed(Normal, 5, given="z", net=Spoilt(), scale=1.0)
    model = LatentModel(z=Latent(Normal, 2), x=x, guide=guide)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="first in site 'x'"):
        pvae.fit(model, torch.randn(20, 5), progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
