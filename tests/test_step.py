"""Steps read out of Pyro once: they follow numbers that change, and wait for nothing."""

from collections import Counter

import numpy as np
import pyro
import pytest
import torch
import torch._inductor
from pyro import poutine
from pyro.distributions import Bernoulli, Normal
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae import Latent, LatentModel, Learned, Observed, lowering, step
from pvae.batches import source_of
from pvae.fence import fenced
from pvae.lowering import CannotLower
from pvae.nets import MLP
from pvae.training import Run
from tests.fitting import (
    annealed_by_hand,
    annealed_by_plain_object,
    annealed_by_settings,
    annealed_declared,
    assert_same_fit,
    binary,
    declare,
    fit,
    masked_by_a_column,
    same,
    traced,
)
from tests.test_lowering import needs_compiler
from tests.test_training import marked, poisoned

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 8, "steps": 50, "lr": 1e-2}  # 20 data: the last batch is of 4


def vae() -> LatentModel:
    return declare("vae")


def assert_traced_is_eager(make, data=None, objective=None, **settings):
    data = binary() if data is None else data
    settings = SETTINGS | settings
    lowered = traced(make(), data, objective, **settings)
    assert_same_fit(fit(make(), data, objective, compile=False, **settings), lowered)
    return lowered


@pytest.fixture
def readings(monkeypatch) -> Counter:
    """How often programs, optimisers and compilers have been read or run to make a graph."""
    counts: Counter = Counter()

    def count(owner, name, what):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(lowering, "make_fx", "program")
    count(step, "make_fx", "optimizer")
    count(torch._inductor, "compile", "compiled")
    return counts


# ------------------------------------------------------------------------------ numbers that change


class Plateau(ReduceLROnPlateau):
    def __init__(self, optimizer):
        super().__init__(optimizer, factor=0.5, patience=0, threshold=1.0)


def falling(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.8**epoch)


class ByHand:
    """A schedule that puts a new number where the rate was."""

    def __init__(self, optimizer):
        self.groups = optimizer.param_groups

    def step(self):
        for group in self.groups:
            group["lr"] = group["lr"] * 0.8

    def state_dict(self):
        return {}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam])
@pytest.mark.parametrize("scheduler", [falling, Plateau])
def test_a_schedule_is_followed_and_nothing_is_read_again(readings, scheduler, optimizer):
    fitted = assert_traced_is_eager(vae, scheduler=scheduler, optimizer=optimizer)
    read = ["program"] if optimizer is torch.optim.NAdam else ["program", "optimizer"]
    assert readings == Counter(read)
    assert fitted.history["lr"].nunique() > 4


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam])
def test_a_schedule_written_by_hand_is_followed(optimizer):
    fitted = assert_traced_is_eager(vae, scheduler=ByHand, optimizer=optimizer)
    assert fitted.history["lr"].iloc[-1] == pytest.approx(1e-2 * 0.8**16)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_schedule_of_momentum_is_followed(optimizer):
    """Betas and momentum are numbers of the update's graph, which is read again for each."""

    def one_cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=40)

    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)

    make = sgd if optimizer is torch.optim.SGD else optimizer
    assert_traced_is_eager(vae, scheduler=one_cycle, optimizer=make)


@needs_compiler
def test_a_compiled_fit_is_compiled_once(readings):
    def compiled(compile):
        model = vae().double()
        return fit(model, binary(), compile=compile, scheduler=falling, **SETTINGS)

    found, expected = (fitted.history["train"] for fitted in (compiled(True), compiled(False)))
    assert readings == {"program": 1, "optimizer": 1, "compiled": 1}
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [annealed_by_hand, annealed_declared])
def test_a_kl_weight_in_a_buffer_is_followed_and_nothing_is_read_again(readings, make):
    """It rises to 1 in five epochs of three steps, by a schedule that sets it in place."""

    def rising(run):
        torch.manual_seed(0)
        model, holder = make(nn.Buffer(torch.tensor(1.0)))

        def weighted(epoch):
            holder.beta.fill_(min(1.0, 0.1 + epoch / 5))
            return 1.0  # the rate stays

        return run(model, binary(), scheduler=lambda o: LambdaLR(o, weighted), **SETTINGS)

    lowered = rising(traced)
    assert readings == {"program": 1, "optimizer": 1}
    assert_same_fit(rising(eager), lowered)
    for epoch, beta in {1: 0.1, 3: 0.5, 17: 1.0}.items():
        row = lowered.history.loc[epoch]
        expected = row["train reconstruction[x]"] - beta * row["train KL[z]"]
        assert row["train"] == pytest.approx(expected, abs=1e-5)


def annealed(run, make, beta, values):
    """A fit whose KL weight an assignment puts to the next of the values after each epoch."""
    torch.manual_seed(0)
    model, holder = make(beta)

    def assign(epoch):
        holder.beta = values[min(epoch, len(values) - 1)]
        return 1.0  # the rate stays

    return run(model, binary(), scheduler=lambda o: LambdaLR(o, assign), **SETTINGS)


def eager(*args, **settings):
    return fit(*args, compile=False, **settings)


def assert_followed(fitted, values):
    for epoch, beta in enumerate(values, 1):
        row = fitted.history.loc[epoch]
        expected = row["train reconstruction[x]"] - float(beta) * row["train KL[z]"]
        assert row["train"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [annealed_by_hand, annealed_declared])
def test_a_buffer_replaced_by_assignment_is_followed(readings, make):
    values = [torch.tensor(0.1 * epoch) for epoch in range(1, 8)]
    lowered = annealed(traced, make, nn.Buffer(torch.tensor(1.0)), values)
    assert readings == {"program": 1, "optimizer": 1}
    assert_same_fit(annealed(eager, make, nn.Buffer(torch.tensor(1.0)), values), lowered)
    assert_followed(lowered, values)


HOLDERS = [annealed_by_hand, annealed_declared, annealed_by_plain_object]


@pytest.mark.parametrize("make", HOLDERS)
def test_a_plain_number_that_changes_is_followed_by_reading_again(readings, make):
    values = [0.2, 0.2, 0.5, 0.5, 0.5, 1.0]
    lowered = annealed(traced, make, 1.0, values)
    assert readings == {"program": 3, "optimizer": 1}
    assert_same_fit(annealed(eager, make, 1.0, values), lowered)
    assert_followed(lowered, values)


@pytest.mark.parametrize("make", HOLDERS)
def test_a_plain_number_that_keeps_changing_ends_in_pyro_after_one_line(readings, make):
    values = [0.1 * epoch for epoch in range(1, 12)]
    with pytest.warns(UserWarning, match="no tensor keeps changing; keep it in a buffer") as said:
        lowered = annealed(traced, make, 1.0, values)
    assert len(said) == 1
    assert readings["program"] == step.MOST_LOWERINGS
    assert_same_fit(annealed(eager, make, 1.0, values), lowered)
    assert_followed(lowered, values)


@pytest.mark.filterwarnings("ignore:The fit runs without being compiled")  # as well it may
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("make", [*HOLDERS, annealed_by_settings])
def test_no_kl_weight_is_taken_for_what_it_was(make, kind):
    """Whatever holds it, be it a number or a tensor that is no buffer."""
    values = [kind(beta) for beta in (0.2, 0.5, 1.0)]
    assert_same_fit(*(annealed(run, make, kind(1.0), values) for run in (eager, traced)))


@pytest.mark.parametrize("objective", [pvae.ELBO(2), pvae.IWAE(3)], ids=repr)
def test_a_mask_in_a_column_of_data_is_followed(objective):
    """So what is masked makes no difference."""
    x, seen = binary(), binary()[:, :1]
    data, others = {"x": x, "seen": seen}, {"x": torch.where(seen == 1, x, 1 - x), "seen": seen}
    fitted = assert_traced_is_eager(masked_by_a_column, data, objective)
    assert_same_fit(fitted, traced(masked_by_a_column(), others, objective, **SETTINGS))


# ------------------------------------------------------------------------------ optimisers


def with_momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)


def in_two_groups(parameters, lr):
    first, *others = parameters
    groups = [{"params": [first], "lr": 3 * lr}, {"params": others, "weight_decay": 0.1}]
    return torch.optim.Adam(groups, lr=lr)


def fused_in_two_groups(parameters, lr):
    *others, last = parameters
    rate = torch.tensor(lr)
    return torch.optim.AdamW(
        [{"params": others, "amsgrad": True}, {"params": [last], "lr": 2 * rate}],
        lr=rate,
        fused=True,
    )


OPTIMIZERS = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.Adamax,
    with_momentum,
    in_two_groups,
    fused_in_two_groups,
]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda function: function.__name__)
def test_fifty_traced_steps_of_any_optimiser_are_those_of_pyro(optimizer, clip_norm):
    assert_traced_is_eager(vae, optimizer=optimizer, clip_norm=clip_norm)


def test_clipping_bounds_the_step():
    """SGD at rate 1 moves the parameters by the gradient, whose norm is 1e-3 at most."""
    model = vae()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    settings = {"lr": 1.0, "optimizer": torch.optim.SGD, "clip_norm": 1e-3, "batch_size": 10}
    traced(model, binary(), steps=4, **settings)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert 2e-3 < float((after - before).norm()) <= 4.001e-3


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, with_momentum])
def test_a_traced_fit_resumes_to_the_same_numbers(tmp_path, optimizer):
    settings = {"batch_size": 8, "lr": 1e-2, "optimizer": optimizer}
    settings["scheduler"] = lambda optimizer: StepLR(optimizer, 2)
    traced(vae(), binary(), epochs=5, folder=tmp_path, **settings)
    resumed = traced(vae(), binary(), epochs=9, folder=tmp_path, **settings)
    assert_same_fit(fit(vae(), binary(), epochs=9, compile=False, **settings), resumed)


# ------------------------------------------------------------------------------ models and data


class Idle(nn.Module):
    """A net some of whose parameters the bound does not depend on, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.idle, self.used, self.frozen = nn.Linear(3, 3), nn.Linear(2, 6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, z):
        return self.frozen(self.used(z))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, with_momentum])
def test_parameters_without_gradients_stay_as_they_are(optimizer):
    def make():
        torch.manual_seed(0)
        return LatentModel(
            z=Latent(Normal, 2),
            x=Observed(Bernoulli, 6, given="z", net=Idle()),
            guide={"z": Latent(Normal, 2, given="x", net=MLP(5))},
        )

    start, trained = make().state_dict(), assert_traced_is_eager(make, optimizer=optimizer)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, start[name]) == ("idle" in name or "frozen" in name), name


@pytest.mark.parametrize("name", ["vae", "mixture_of_gaussians"])
def test_traced_steps_in_float64_are_those_of_pyro(name):
    def make():
        return declare(name).double()

    fitted = assert_traced_is_eager(make, binary().double(), pvae.IWAE(3))
    assert {p.dtype for p in fitted.model.parameters()} == {torch.float64}


def test_noise_of_the_data_is_drawn_in_the_traced_step():
    train = pvae.load_data("digits").train.subset(slice(20))
    assert train.resampled

    def make():
        torch.manual_seed(0)
        return pvae.models.vae(data_size=64, latent_size=2, hidden=(5,))

    fitted = assert_traced_is_eager(make, train)
    again = traced(make(), train.realised(), **SETTINGS)
    assert not same(fitted.model, again.model)


# ------------------------------------------------------------------------------ what does not run


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a number from a tensor.

    The CPU's fused optimisers read their learning rate within their kernel, out of sight here, as
    the kernels on CUDA need not.
    """

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.REFUSED, f"the host waits: {function}"
        return function(*args, **(kwargs or {}))


def test_the_guard_against_waiting_sees_it():
    with NoWaiting(), pytest.raises(AssertionError, match="the host waits"):
        torch.ones(1).item()


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["vae", "hierarchical_vae", "mixture_of_gaussians"])
def test_traced_steps_wait_for_nothing_and_run_no_pyro(monkeypatch, name, clip_norm):
    model, data = declare(name), binary(24)  # three whole batches
    source = source_of(model, data, batch_size=8, seed=0, device=CPU)
    run = Run(model, pvae.IWAE(3), source, torch.optim.Adam, 1e-2, clip_norm, seed=0)

    def refuse(message):
        raise AssertionError("a Pyro handler ran")

    with fenced(0, CPU):
        run.step.lower(compile=False)
        run._steps(None)  # the first of them reads the optimiser
        start = [p.detach().clone() for p in model.parameters()]
        monkeypatch.setattr(runtime, "apply_stack", refuse)
        monkeypatch.setattr(pyro.primitives, "apply_stack", refuse)
        with NoWaiting():
            assert run._steps(None) == 24
    assert run.steps == 6
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert all(map(torch.isfinite, run.step.totals))


# ------------------------------------------------------------------------------ falling back


class Counting(LatentModel):
    """Each run scales its likelihood by another number, which no graph can know."""

    runs = 0

    def model(self, batch=None, num_data=None):
        self.runs += 1
        with poutine.scale(scale=1.0 + self.runs % 2):
            return super().model(batch, num_data)


def test_a_program_that_cannot_be_lowered_runs_in_pyro_after_one_line():
    def make():
        torch.manual_seed(0)
        return Counting(z=Latent(Normal, 2), x=Observed(Bernoulli, 6, given="z", net=MLP(5)))

    with pytest.warns(UserWarning, match="The fit runs without being compiled: ") as said:
        lowered = traced(make(), binary(), **SETTINGS)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert len(lowered.history) == 17


def test_after_falling_back_the_numbers_are_those_of_pyro(monkeypatch):
    def refuse(*args, **kwargs):
        raise CannotLower("there is no graph")

    monkeypatch.setattr(step, "Lowered", refuse)
    expected = fit(vae(), binary(), compile=False, **SETTINGS)
    with pytest.warns(UserWarning, match="being compiled: there is no graph") as said:
        found = traced(vae(), binary(), **SETTINGS)
    assert len(said) == 1
    assert_same_fit(expected, found)


# ------------------------------------------------------------------------------ what goes wrong


def planted(model: LatentModel, number: int) -> tuple[dict[str, Tensor], int]:
    """Data with the mark at a datum of this step of the first epoch, and which one that is."""
    data = marked()
    batches = source_of(model, data, batch_size=10, seed=3, device=CPU).epoch(1)
    where = int(list(batches)[number - 1][1][4])
    data["mark"] = data["mark"].roll(where - int(data["mark"].argmax()), 0)
    return data, where


@pytest.mark.parametrize(
    ("kind", "bad", "what"),
    [
        ("guide", torch.nan, r"The objective is nan at step 3, epoch 1: first in site 'z', datum"),
        (
            "model",
            -torch.inf,
            r"The objective is -inf at step 3, epoch 1: first in site 'x', datum",
        ),
        ("gradient", torch.nan, r"The gradient of \S*width \(site 'z'\) is \w+ at step 3, epoch 1"),
    ],
)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, with_momentum])
def test_a_nan_amid_an_epoch_is_told_as_pyro_would_tell_it(kind, bad, what, optimizer):
    settings = {"batch_size": 10, "seed": 3, "optimizer": optimizer}
    start = poisoned(kind, bad)
    data, where = planted(start, 3)

    def again():
        model = poisoned(kind, bad)
        model.load_state_dict(start.state_dict())
        return model

    eager, lowered, good = again(), again(), again()
    with pytest.raises(FloatingPointError, match=what) as in_pyro:
        fit(eager, data, compile=False, epochs=2, **settings)
    with pytest.raises(FloatingPointError, match=what) as in_graph:
        traced(lowered, data, epochs=2, **settings)
    assert str(in_graph.value) == str(in_pyro.value)
    assert f"datum {where}. The model keeps its last good weights" in str(in_graph.value)
    fit(good, data, compile=False, steps=2, **settings)
    assert same(lowered, good)
    assert same(eager, good)


@pytest.mark.parametrize("run", [traced, fit])
def test_a_nan_in_a_later_epoch_undoes_no_epoch_before_it(run):
    """The third epoch's rate is one at which weights are soon too large to square."""

    def overflowing(optimizer):
        return LambdaLR(optimizer, lambda epoch: 1e30 if epoch == 2 else 1.0)

    def make():
        torch.manual_seed(0)
        return LatentModel(x=Observed(Normal, 6, loc=Learned(0.0, 6), scale=1.0))

    settings = {"batch_size": 8, "optimizer": torch.optim.SGD, "lr": 0.1, "scheduler": overflowing}
    model, good = make(), make()
    with pytest.raises(FloatingPointError, match=r"at step 8, epoch 3: .* last good weights"):
        run(model, binary(), epochs=4, **settings)
    fit(good, binary(), steps=7, compile=False, **settings)
    assert same(model, good)
