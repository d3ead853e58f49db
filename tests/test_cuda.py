"""What only a GPU shows: one launch a step, nothing that waits, the numbers of the CPU."""

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import svi
from pvae.batches import source_of
from pvae.fence import fenced
from pvae.training import Run
from tests.fitting import annealed_by_hand, binary, declare, fit
from tests.test_step import planted
from tests.test_training import poisoned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = {"batch_size": 8, "epochs": 20, "lr": 1e-2, "device": "cuda"}  # the last batch is of 4
SMALL = ["vae", "hierarchical_vae", "mixture_of_gaussians"]


def at(speed: str, model, data, objective=None, **settings):
    """A fit at a speed; traced and compiled steps are captured as a CUDA graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svi, "_speed", lambda *args: speed)
        return fit(model, data, objective, **SETTINGS | settings)


def uncaptured(*args, **settings):
    """A traced fit, kernel by kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pvae.step._is_capturable", lambda optimizer: False)
        return at("traced", *args, **settings)


def run_of(model, data) -> Run:
    source = source_of(model, data, 8, seed=0, device=torch.device("cuda"))
    return Run(model, pvae.ELBO(), source, torch.optim.Adam, 1e-2, None, seed=0)


def assert_close(one, other, columns=("train",)):
    for column in columns:
        np.testing.assert_allclose(one.history[column], other.history[column], rtol=1e-4)


# ------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("name", SMALL)
def test_eager_and_traced_steps_agree(name):
    """From the same random numbers, kernel by kernel."""
    eager, lowered = at("eager", declare(name), binary()), uncaptured(declare(name), binary())
    assert_close(eager, lowered)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_captured_step_is_the_step_it_was_captured_from(optimizer):
    """A mixture draws nothing: its order of data is all the chance there is."""
    model, data = "mixture_of_gaussians", binary(24)
    eager = at("eager", declare(model), data, optimizer=optimizer)
    assert_close(eager, at("traced", declare(model), data, optimizer=optimizer))


def test_captured_steps_draw_new_numbers_in_each():
    """They draw the generator's numbers, so that fits with noise agree as well."""
    eager, captured = (at(s, declare("vae"), binary(24)) for s in ("eager", "traced"))
    assert_close(eager, captured, ("train", "train KL[z]", "train reconstruction[x]"))
    still = at("traced", declare("vae"), binary(24), lr=0.0)
    assert still.history["train"].nunique() > 15


def test_compiled_steps_are_eager_ones_but_for_rounding():
    eager, compiled = (at(s, declare("vae"), binary(24)) for s in ("eager", "compiled"))
    np.testing.assert_allclose(compiled.history["train"], eager.history["train"], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype, torch says
@pytest.mark.parametrize("name", SMALL)
def test_no_step_of_an_epoch_waits_for_the_device(monkeypatch, name):
    """The order of data is made on the host, and copied before the first step."""
    run = run_of(declare(name), binary(24))
    with fenced(0, run.device):
        run.step.lower(compile=False)
        for _ in range(3):
            run._steps(None)  # workspaces are made, the graph is captured
        assert run.step._replay is not None
        batches = list(run.source.epoch(1))
        monkeypatch.setattr(run.source, "epoch", lambda number: batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen = run._steps(None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seen == 24
    assert run.step.totals.isfinite().all()


# ------------------------------------------------------------------------------ what changes


def test_a_schedule_is_followed():
    """At a rate of 0 from the fifth epoch on, the parameters stay where they were."""

    def stopping(optimizer):
        return LambdaLR(optimizer, lambda epoch: float(epoch < 4))

    settings = {"scheduler": stopping}
    short = at("traced", declare("vae"), binary(24), epochs=4, **settings)
    long = at("traced", declare("vae"), binary(24), epochs=9, **settings)
    for name, value in short.model.state_dict().items():
        torch.testing.assert_close(value, long.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert_close(
        at("eager", declare("vae"), binary(24), **settings),
        at("traced", declare("vae"), binary(24), **settings),
    )


def test_a_kl_weight_in_a_buffer_is_followed():
    torch.manual_seed(0)
    model, holder = annealed_by_hand(torch.nn.Buffer(torch.tensor(1.0)))

    def weighted(epoch):
        holder.beta.fill_(min(1.0, 0.1 + epoch / 5))
        return 1.0

    fitted = at("traced", model, binary(24), scheduler=lambda o: LambdaLR(o, weighted))
    for epoch, beta in {1: 0.1, 3: 0.5, 17: 1.0}.items():
        row = fitted.history.loc[epoch]
        expected = row["train reconstruction[x]"] - beta * row["train KL[z]"]
        assert row["train"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("speed", ["eager", "traced"])
def test_a_nan_is_located(speed):
    model = poisoned("guide", torch.nan)
    data, where = planted(model, 3)
    match = rf"is nan at step 3, epoch 1: first in site 'z', datum {where}\. The model keeps its"
    with pytest.raises(FloatingPointError, match=match):
        at(speed, model, data, batch_size=10, seed=3, epochs=2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------ data and weights


@pytest.mark.parametrize("speed", ["eager", "traced"])
def test_streaming_from_pinned_memory_is_the_fit_from_unpinned(speed):
    fits = [
        at(speed, declare("vae"), DataLoader(TensorDataset(binary()), 8, pin_memory=pin))
        for pin in (True, False)
    ]
    assert_close(*fits)
    assert {p.device.type for p in fits[0].model.parameters()} == {"cuda"}


@pytest.mark.parametrize("compile", [False, True])
def test_evaluations_agree_with_those_of_the_cpu(compile):
    model, x = declare("vae"), binary(50)
    cpu, cuda = (
        pvae.evaluate(model, x, 2000, device=device, compile=compile and device == "cuda")
        for device in ("cpu", "cuda")
    )
    errors = np.hypot(cpu.per_datum["bound_se"][-1], cuda.per_datum["bound_se"][-1])
    assert float((abs(cpu.log_p - cuda.log_p) / errors).max()) < 5
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_exact_values_are_those_of_the_cpu():
    model, x = declare("mixture_of_gaussians").double(), binary(50).double()
    cpu, cuda = (pvae.evaluate(model, x, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda.log_p, cpu.log_p, rtol=1e-10)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_em_is_that_of_the_cpu(covariance):
    x = torch.randn(300, 5, dtype=torch.float64)
    cpu, cuda = (
        pvae.fit_em(x, 3, covariance, means=x[:3], device=device) for device in ("cpu", "cuda")
    )
    assert cuda.means.device.type == "cuda"
    torch.testing.assert_close(cuda.means.cpu(), cpu.means, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cuda.log_prob(x.cuda()).cpu(), cpu.log_prob(x), rtol=1e-6, atol=1e-8)
