"""Lowered steps: the same numbers as Pyro's, from a graph in which no Pyro runs."""

import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import runtime
from torch import nn

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, svi
from pvae.fence import fenced
from pvae.lowering import CannotLower, Lowered
from pvae.nets import MLP
from tests.fitting import OBJECTIVES, SMALL, assert_same_fit, binary, declare

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 8, "steps": 50, "progress": False, "lr": 1e-2}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def loss(model, batch):
    value = -model.draw(batch, 2).log_weights.mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)]


def lower(model, batch):
    with fenced(0, CPU):
        return Lowered(model, loss, [batch])


@pytest.fixture
def traced(monkeypatch):
    """`compile="auto"` runs every fit as a graph that is not compiled."""
    monkeypatch.setattr(svi, "SHORT", 1)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("name", SMALL)
def test_fifty_lowered_steps_are_those_of_pyro_bit_for_bit(name, objective):
    """20 data in batches of 8: the last of each epoch, of 4, runs in Pyro either way."""
    eager = pvae.fit(declare(name), binary(), objective, compile=False, **SETTINGS)
    lowered = pvae.fit(declare(name), binary(), objective, compile="auto", **SETTINGS)
    assert_same_fit(eager, lowered)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("baseline", ["average", "learned", "leave-one-out", "vimco"])
@pytest.mark.parametrize("kind", [pvae.ELBO, pvae.IWAE])
def test_lowered_steps_keep_the_state_of_baselines(kind, baseline):
    """Of a latent without reparameterisation, drawn by the guide."""
    fits = []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        model = LatentModel(
            z=Latent(dist.Bernoulli, 3),
            x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5)),
            guide={"z": Latent(dist.Bernoulli, 3, given="x", net=MLP(5))},
        )
        objective = kind(3, baseline=baseline)
        fits.append(pvae.fit(model, binary(), objective, compile=compile, **SETTINGS))
    assert_same_fit(*fits)


@needs_compiler
@pytest.mark.parametrize(
    "objective", [pvae.IWAE(3), pvae.ReweightedWakeSleep(3, guide="both")], ids=repr
)
def test_compiled_steps_draw_torchs_own_bernoullis(objective):
    """Of latents, and of data that the model dreams: inductor's would be others."""
    fits = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = LatentModel(
            z=Latent(dist.Bernoulli, 3),
            x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5)),
            guide={"z": Latent(dist.Bernoulli, 3, given="x", net=MLP(5))},
        ).double()
        fits.append(pvae.fit(model, binary().double(), objective, compile=compile, **SETTINGS))
    eager, compiled = (fit.history["train"].to_numpy() for fit in fits)
    assert abs(eager - compiled).max() < 1e-8


@needs_compiler
def test_compiled_steps_are_those_of_pyro_but_for_rounding():
    fits = [
        pvae.fit(declare("vae").double(), binary().double(), pvae.IWAE(4), compile=c, **SETTINGS)
        for c in (False, True)
    ]
    eager, compiled = (dict(fit.model.named_parameters()) for fit in fits)
    for name, value in eager.items():
        torch.testing.assert_close(value, compiled[name], rtol=1e-8, atol=1e-8)


def test_no_pyro_runs_in_a_lowered_step(monkeypatch):
    model = declare("hierarchical_vae")
    lowered = lower(model, binary())

    def refuse(message):
        raise AssertionError("a Pyro handler ran")

    monkeypatch.setattr(runtime, "apply_stack", refuse)
    monkeypatch.setattr(pyro.primitives, "apply_stack", refuse)
    monkeypatch.setattr(LatentModel, "model", refuse)
    found, *_ = lowered(binary())
    assert found.isfinite()


def test_a_lowered_step_follows_the_parameters_it_was_not_read_with():
    model = declare("vae")
    lowered = lower(model, binary())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    torch.manual_seed(3)
    found, *_ = lowered(binary())
    torch.manual_seed(3)
    assert torch.equal(found, loss(model, binary())[0])


def test_reading_a_step_changes_neither_the_model_nor_the_random_state():
    model = LatentModel(
        z=Latent(dist.Normal, 2), x=Observed(dist.Bernoulli, 6, given="z", net=normalised(2, 6))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with fenced(None, CPU):
        Lowered(model, loss, [binary()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def normalised(size_in, size_out):
    """A net of one's own whose buffers each step changes."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(size_in, 8), nn.BatchNorm1d(8)
            self.out = nn.Linear(8, size_out)

        def forward(self, z):
            h = self.norm(self.linear(z).reshape(-1, 8)).reshape(*z.shape[:-1], 8)
            return self.out(torch.nn.functional.dropout(h, 0.5, self.training))

    return Normalised()


@pytest.mark.usefixtures("traced")
def test_batch_norm_and_dropout_are_lowered_with_their_buffers():
    def fit(compile):
        torch.manual_seed(0)
        z = Latent(dist.Normal, 2, given="x", net=MLP(5))
        x = Observed(dist.Bernoulli, 6, given="z", net=normalised(2, 6))
        model = LatentModel(z=Latent(dist.Normal, 2), x=x, guide={"z": z})
        return pvae.fit(model, binary(), compile=compile, **SETTINGS)

    lowered = fit("auto")
    assert_same_fit(fit(False), lowered)
    assert int(
        lowered.model.state_dict()["model_modules.x.nets.net.module.norm.num_batches_tracked"]
    )


class HandWritten(nn.Module):
    def __init__(self, branches=False):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.branches = branches

    def model(self, x):
        pyro.module("decoder", self.decoder)
        temperature = pyro.param("temperature", torch.tensor(1.0), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            if self.branches and z.sum() > 0:
                z = -z
            logits = temperature * self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def fit_hand_written(compile, branches=False):
    torch.manual_seed(0)
    pair = HandWritten(branches)
    return pvae.fit(PyroPair(pair.model, pair.guide), binary(), compile=compile, **SETTINGS)


@pytest.mark.usefixtures("traced")
def test_a_hand_written_pair_is_lowered():
    assert_same_fit(fit_hand_written(False), fit_hand_written("auto"))


def test_control_flow_on_values_is_said_once_and_runs_in_pyro():
    with pytest.warns(UserWarning, match="runs without being compiled: .*") as said:
        lowered = fit_hand_written(True, branches=True)
    assert len(said) == 1
    assert_same_fit(fit_hand_written(False, branches=True), lowered)


def programs_around(held):
    """A model and guide whose decoder is wherever `held` keeps it."""

    def model(x):
        decoder = held() if not isinstance(held, nn.Module) else held
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", torch.ones(2), dist.constraints.positive)
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), scale).to_event(1))

    pair = PyroPair(model, guide)
    pair.prepare(binary())
    return pair


@pytest.mark.usefixtures("traced")
def test_a_network_that_functions_refer_to_is_found_and_lowered():
    def fit(compile):
        torch.manual_seed(0)
        return pvae.fit(programs_around(nn.Linear(2, 6)), binary(), compile=compile, **SETTINGS)

    assert_same_fit(fit(False), fit("auto"))


def test_a_network_that_hides_from_the_pair_is_not_lowered():
    """Its weights would be constants of the graph, and would never be trained."""
    hidden = [nn.Linear(2, 6)]
    pair = programs_around(lambda: hidden[0])
    with pytest.raises(CannotLower, match="depend on more than parameters, data and random"):
        lower(pair, binary())


@pytest.mark.usefixtures("traced")
def test_without_a_working_compiler_the_fit_runs_in_pyro(monkeypatch):
    def fail(self, *tensors):
        raise CannotLower("InvalidCxxCompiler: no C++ compiler")

    monkeypatch.setattr(Lowered, "compile", fail)
    with pytest.warns(UserWarning, match="without being compiled: InvalidCxxCompiler"):
        found = pvae.fit(declare("vae"), binary(), compile=True, **SETTINGS)
    assert_same_fit(pvae.fit(declare("vae"), binary(), compile=False, **SETTINGS), found)


def test_objectives_of_pyro_run_in_pyro():
    with pytest.warns(UserWarning, match="Trace_ELBO.* is Pyro's own"):
        pvae.fit(declare("vae"), binary(), pyro.infer.Trace_ELBO(), compile=True, **SETTINGS)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("steps", "compiled"), [(49, False), (50, True)])
def test_auto_compiles_long_fits_only(monkeypatch, steps, compiled):
    monkeypatch.setattr(svi, "LONG", 50)
    fit = pvae.fit(declare("vae"), binary(), **(SETTINGS | {"steps": steps}))
    assert fit.settings["compiled"] is compiled


@pytest.mark.usefixtures("traced")
def test_auto_resumes_as_the_run_began(monkeypatch, tmp_path):
    monkeypatch.setattr(svi, "LONG", 50)
    pvae.fit(declare("vae"), binary(), folder=tmp_path, **(SETTINGS | {"steps": 30}))
    resumed = pvae.fit(declare("vae"), binary(), folder=tmp_path, **(SETTINGS | {"steps": 60}))
    assert resumed.settings["compiled"] is False


def scaled_by(numbers):
    """A function of a model and a batch that looks at the batch's values."""

    def function(model, batch):
        return [model.draw(batch, 2).log_weights.mean() * float(numbers(batch).mean())]

    return function


def test_values_that_leave_torch_on_the_way_are_noticed():
    """`numpy()` is no operation of a graph, which would hold the first batch's mean for good."""
    with fenced(0, CPU), pytest.raises(CannotLower, match="depend on more than parameters"):
        Lowered(declare("vae"), scaled_by(lambda batch: batch.numpy()), [binary()])


@pytest.mark.usefixtures("traced")
def test_parameters_put_in_place_of_others_are_trained():
    def replacing(model):
        def make(optimizer):
            def replace(epoch):
                for parameter in model.parameters():
                    parameter.data = parameter.data.clamp(-0.5, 0.5)
                return 1.0

            return torch.optim.lr_scheduler.LambdaLR(optimizer, replace)

        return make

    def fit(compile):
        model = declare("vae")
        scheduler = replacing(model)
        return pvae.fit(model, binary(), compile=compile, scheduler=scheduler, **SETTINGS)

    assert_same_fit(fit(False), fit("auto"))


@pytest.mark.usefixtures("traced")
def test_hooks_of_an_optimiser_run_at_each_step():
    calls = []

    def hooked(parameters, lr):
        optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        return optimizer

    pvae.fit(declare("vae"), binary(), optimizer=hooked, **SETTINGS)
    assert len(calls) == SETTINGS["steps"]


def test_a_buffer_that_holds_infinities_from_the_start_may_hold_them():
    model = declare("vae")
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    fit = pvae.fit(model, binary(), compile=False, **SETTINGS)
    assert fit.history["train"].notna().all()


def test_what_a_compiler_gets_wrong_is_not_trusted(monkeypatch):
    """As torch 2.15 does with gradients through a permutation by index."""

    def wrong(graph, tensors, options):
        return lambda *inputs: [1.5 * value for value in graph(*inputs)]

    monkeypatch.setattr("torch._inductor.compile", wrong)
    with pytest.warns(UserWarning, match="what inductor makes of it gives other numbers"):
        found = pvae.fit(declare("vae"), binary(), compile=True, **SETTINGS)
    assert_same_fit(found, pvae.fit(declare("vae"), binary(), compile=False, **SETTINGS))
