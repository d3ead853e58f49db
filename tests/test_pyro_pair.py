import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pvae
from pvae import PyroPair, models
from tests.exact import LinearGaussian

PIXELS, CODE = 6, 2


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(CODE, 8), nn.Linear(8, PIXELS)

    def forward(self, z):
        return torch.sigmoid(self.out(nn.functional.softplus(self.hidden(z))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(PIXELS, 8)
        self.loc, self.log_scale = nn.Linear(8, CODE), nn.Linear(8, CODE)

    def forward(self, x):
        x = x.reshape(-1, PIXELS)  # as tutorials flatten images
        h = nn.functional.softplus(self.hidden(x))
        return self.loc(h), self.log_scale(h).exp()


class VAE(nn.Module):
    """Written as VAEs in Pyro are, without a thought of pvae."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros((x.shape[0], CODE))
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pixels = dist.Bernoulli(self.decoder(z), validate_args=False)
            pyro.sample("obs", pixels.to_event(1), obs=x.reshape(-1, PIXELS))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


START = torch.full((CODE, PIXELS), 0.5)  # a tensor that the programs below begin from


def linear_model(x):
    """z ~ N(0, I), x | z ~ N(z W, s^2), as free functions with `pyro.param`."""
    weight = pyro.param("weight", START)
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), CODE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)


def linear_guide(x):
    back = pyro.param("guide.back", lambda: torch.full((PIXELS, CODE), 0.1))
    spread = pyro.param("guide_back", torch.ones(CODE), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ back, spread).to_event(1))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(20, PIXELS)


@pytest.fixture
def bits() -> torch.Tensor:
    pattern = torch.tensor([1.0, 1, 1, 0, 0, 0])
    patterns = torch.stack([pattern, 1 - pattern])
    flips = torch.bernoulli(torch.full((60, PIXELS), 0.1))
    return (patterns[torch.randint(2, (60,))] - flips).abs()


def values_of(pair: PyroPair) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pair.named_parameters()}


# ------------------------------------------------------------------------------ what it takes


def test_a_pair_as_in_pyros_tutorial_runs_unchanged(bits):
    vae = VAE()
    pair = PyroPair(vae.model, vae.guide)
    fit = pvae.fit(pair, bits, epochs=30, lr=0.03, batch_size=20, device="cpu", progress=False)
    assert fit.history["train"].iloc[-1] > fit.history["train"].iloc[0] + 0.5
    assert {"train reconstruction[obs]", "train KL[latent]"} <= set(fit.history.columns)
    result = pvae.evaluate(pair, bits, num_particles=50)
    assert result.summary().loc["ELBO", "value"] <= result.summary().loc["L_50", "value"]
    # the nets are trained in place, as `pyro.module` does
    own, module = set(map(id, pair.parameters())), set(map(id, vae.parameters()))
    assert own == module
    assert len(pyro.get_param_store()) == 0


def test_the_log_weights_of_a_pair_are_those_of_its_programs(bits):
    vae = VAE()
    weights = pvae.log_weights(PyroPair(vae.model, vae.guide), bits, num_particles=1, seed=5)
    torch.manual_seed(5)
    with pyro.get_param_store().scope():
        loss = Trace_ELBO().loss(vae.model, vae.guide, bits)
    assert float(weights.sum()) == pytest.approx(-loss, rel=1e-5)


def test_free_functions_with_constrained_params_are_fitted(x):
    pair = PyroPair(linear_model, linear_guide)
    fit = pvae.fit(pair, x, epochs=60, lr=0.05, device="cpu", progress=False)
    assert fit.history["train"].iloc[-1] > fit.history["train"].iloc[0] + 1
    assert len(list(pair.parameters())) == 4  # `guide.back` and `guide_back` are two
    scale = poutine.trace(pair.model).get_trace(x).nodes["scale"]["value"]
    assert 0 < scale.item() < 2
    assert len(pyro.get_param_store()) == 0


def test_a_pyro_module_is_a_program(x):
    class Linear(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = pyro.nn.PyroModule[nn.Linear](CODE, PIXELS)
            self.scale = pyro.nn.PyroParam(torch.tensor(2.0), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), CODE), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.weight(z), self.scale).to_event(1), obs=x)

    program = Linear()
    pair = PyroPair(program, linear_guide)
    fit = pvae.fit(pair, x, epochs=60, lr=0.05, device="cpu", progress=False)
    assert fit.history["train"].iloc[-1] > fit.history["train"].iloc[0] + 1
    assert {id(p) for p in program.parameters()} < {id(p) for p in pair.parameters()}


def test_several_columns_come_by_keyword(x):
    def model(x, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x, shift):
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(1))
            pyro.sample("z", dist.Normal(loc + 0 * x[:, :1], 1.0).to_event(1))

    data = {"x": x[:, :1], "shift": torch.arange(20.0)}
    pair = PyroPair(model, guide)
    pvae.fit(pair, data, epochs=1, device="cpu", progress=False)
    weights = pvae.log_weights(pair, data, num_particles=3)
    assert weights.shape == (3, 20)
    assert {k: v.shape for k, v in pair.prior_predictive(4).items()} == {"z": (4, 1), "x": (4, 1)}
    assert pair.reconstruct(data)["x"].shape == (20, 1)


def test_a_discrete_latent_outside_the_guide_is_summed_out(x):
    def model(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            mean = loc[c].unsqueeze(-1) + torch.zeros(PIXELS)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        pass

    pair = PyroPair(model, guide)
    weights = pvae.log_weights(pair, x, num_particles=2)
    parts = [
        math.log(p) + dist.Normal(loc, 1.0).log_prob(x).sum(-1) for p, loc in ((0.3, -1), (0.7, 1))
    ]
    torch.testing.assert_close(weights, torch.stack(parts).logsumexp(0).expand(2, 20))
    assert pair.summed == ["c"]
    pvae.fit(pair, x, TraceEnum_ELBO(max_plate_nesting=1), epochs=2, device="cpu", progress=False)


def test_an_inner_plate_is_part_of_the_datum(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("pixels", PIXELS, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True) / 7, (1 / 7) ** 0.5))

    pair = PyroPair(model, guide)
    covariance = torch.eye(PIXELS) + torch.ones(PIXELS, PIXELS)
    exact = dist.MultivariateNormal(torch.zeros(PIXELS), covariance).log_prob(x)
    weights = pvae.log_weights(pair, x, num_particles=3)
    torch.testing.assert_close(weights, exact.expand(3, 20))
    assert pair.summed == []


# ------------------------------------------------------------------------------ parameter stores


@pytest.mark.uses_param_store
def test_what_svi_trained_in_the_global_store_is_the_start(x):
    svi = SVI(linear_model, linear_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    store = pyro.get_param_store()
    trained = {name: store[name].detach().clone() for name in store}
    pair = PyroPair(linear_model, linear_guide)
    pair.prepare(x)
    trace = poutine.trace(pair.model).get_trace(x)
    torch.testing.assert_close(trace.nodes["weight"]["value"], trained["weight"])
    torch.testing.assert_close(trace.nodes["scale"]["value"], trained["scale"])
    pvae.fit(pair, x, epochs=2, lr=0.1, device="cpu", progress=False)
    pvae.evaluate(pair, x, num_particles=30)
    assert set(store) == set(trained)
    for name, value in trained.items():
        assert torch.equal(store[name], value), f"{name} in the global store changed"
    svi.step(x)  # and training there goes on


@pytest.mark.uses_param_store
def test_modules_trained_by_svi_are_the_start(bits):
    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(30):
        svi.step(bits)
    weights = pvae.log_weights(PyroPair(vae.model, vae.guide), bits, num_particles=20)
    fresh = VAE()
    unlike = pvae.log_weights(PyroPair(fresh.model, fresh.guide), bits, num_particles=20)
    assert float(weights.mean()) > float(unlike.mean()) + 0.5


@pytest.mark.uses_param_store
def test_a_module_of_the_same_name_trained_before_does_not_meet_this_one(bits):
    before = VAE()
    SVI(before.model, before.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(bits)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    vae = VAE()  # as when a notebook's cell is run again
    start = {name: value.clone() for name, value in vae.state_dict().items()}
    # free functions, so that the nets are known from `pyro.module` alone
    pair = PyroPair(lambda x: vae.model(x), lambda x: vae.guide(x))
    pvae.fit(pair, bits, epochs=1, device="cpu", progress=False)
    assert {id(p) for p in pair.parameters()} == {id(p) for p in vae.parameters()}
    for name, value in vae.state_dict().items():
        assert not torch.equal(value, start[name])
        assert torch.equal(before.state_dict()[name], kept[name])


def test_two_pairs_of_the_same_names_do_not_meet(x):
    start = START.clone()
    first, second = PyroPair(linear_model, linear_guide), PyroPair(linear_model, linear_guide)
    second.prepare(x)
    before = values_of(second)
    pvae.fit(first, x, epochs=2, lr=0.1, device="cpu", progress=False)
    for name, value in values_of(second).items():
        assert torch.equal(value, before[name])
        assert not torch.equal(values_of(first)[name], value)
    assert torch.equal(START, start)  # nor does the tensor that both began from


def test_running_a_cell_again_starts_afresh(x):
    histories = []
    for _ in range(2):
        pair = PyroPair(linear_model, linear_guide)
        fit = pvae.fit(pair, x, epochs=2, lr=0.1, device="cpu", progress=False)
        histories.append(fit.history["train"].tolist())
    assert histories[0] == histories[1]


def test_weights_are_saved_and_loaded(x, tmp_path):
    pair = PyroPair(linear_model, linear_guide)
    pvae.fit(pair, x, epochs=2, lr=0.1, device="cpu", progress=False)
    torch.save(pair.state_dict(), tmp_path / "pair.pt")
    other = PyroPair(linear_model, linear_guide)
    other.prepare(x)
    other.load_state_dict(torch.load(tmp_path / "pair.pt", weights_only=True))
    expected = pvae.log_weights(pair, x, num_particles=3)
    assert torch.equal(pvae.log_weights(other, x, num_particles=3), expected)


def test_a_pair_itself_runs_in_pyros_svi(x):
    pair = PyroPair(linear_model, linear_guide)
    pair.prepare(x)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert len(pyro.get_param_store()) == 0


def test_evaluation_leaves_a_pair_as_it_was(x):
    pair = PyroPair(linear_model, linear_guide)
    pair.prepare(x)
    before, random_state = values_of(pair), torch.get_rng_state()
    pvae.evaluate(pair, x, num_particles=30)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pair.training
    for name, value in values_of(pair).items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------ particles


class Flattening(nn.Module):
    """A linear-Gaussian pair whose nets take exactly one batch dimension; guide: the posterior."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(CODE, PIXELS, bias=False)
        self.flatten = nn.Flatten()

    def posterior(self):
        w = self.decoder.weight
        covariance = (torch.eye(CODE, dtype=w.dtype) + w.T @ w).inverse()
        return w @ covariance, covariance

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), CODE), 1.0).to_event(1))
            mean = self.flatten(self.decoder(z).unflatten(-1, (2, 3)))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        back, covariance = self.posterior()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ back, covariance))


def test_one_particle_at_a_time_gives_the_exact_answer_with_an_exact_guide(x):
    own, x = Flattening().double(), x.double()
    pair = PyroPair(own.model, own.guide, vectorize_particles=False)
    w = own.decoder.weight.detach()
    covariance = torch.eye(PIXELS, dtype=w.dtype) + w @ w.T
    exact = dist.MultivariateNormal(torch.zeros(PIXELS, dtype=w.dtype), covariance).log_prob(x)
    weights = pvae.log_weights(pair, x, num_particles=4)
    torch.testing.assert_close(weights, exact.expand(4, 20), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"Shape mismatch inside plate"):
        pvae.log_weights(PyroPair(own.model, own.guide), x, num_particles=4)


def test_one_particle_at_a_time_has_the_same_law():
    x = torch.randn(3, PIXELS)
    together = PyroPair(linear_model, linear_guide)
    apart = PyroPair(linear_model, linear_guide, vectorize_particles=False)
    a = pvae.log_weights(together, x, num_particles=1000, seed=1)
    b = pvae.log_weights(apart, x, num_particles=1000, seed=2)
    assert a.shape == b.shape == (1000, 3)
    standard_error = ((a.var(0) + b.var(0)) / 1000).sqrt()
    assert ((a.mean(0) - b.mean(0)) / standard_error).abs().max() < 4.5


def test_everything_works_one_particle_at_a_time(bits):
    class Convolving(VAE):
        def __init__(self):
            super().__init__()
            self.encoder.hidden = nn.Linear(4 * PIXELS, 8)
            self.convolution = nn.Conv1d(1, 4, 3, padding=1)

        def guide(self, x):
            h = self.convolution(x.reshape(-1, 1, PIXELS)).flatten(1)
            h = nn.functional.softplus(self.encoder.hidden(h))
            with pyro.plate("data", len(x)):
                loc, scale = self.encoder.loc(h), self.encoder.log_scale(h).exp()
                pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    vae = Convolving()
    pair = PyroPair(vae.model, vae.guide, vectorize_particles=False)
    fit = pvae.fit(pair, bits, pvae.IWAE(3), epochs=2, device="cpu", progress=False)
    assert fit.history["train"].notna().all()
    assert pvae.evaluate(pair, bits, num_particles=30).num_particles == 30
    shapes = {name: value.shape for name, value in pair.posterior(bits, 4).items()}
    assert shapes == {"latent": (4, 60, CODE)}
    assert pair.reconstruct(bits, 4)["obs"].shape == (60, PIXELS)
    assert pair.interpolate(bits[:2], bits[2:4], 5)["obs"].shape == (5, 2, PIXELS)
    assert pair.prior_predictive(3)["obs"].shape == (3, PIXELS)


# ------------------------------------------------------------------------------ errors


def nothing(x):
    pass


def without_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x), CODE), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(z @ START, 1.0).to_event(2), obs=x)


def without_to_event(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), CODE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ START, 1.0), obs=x)


def without_either(x):
    pyro.sample("x", dist.Normal(torch.zeros(len(x), PIXELS), 1.0), obs=x)


def one_by_one(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x{i}", dist.Normal(torch.zeros(PIXELS), 1.0).to_event(1), obs=x[i])


def a_global_latent(x):
    scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(PIXELS), scale).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "num_data", "message"),
    [
        (without_plate, 20, "Site 'z' lies in no vectorised plate over the data"),
        (without_to_event, 20, r"Shape mismatch inside plate\('data'\) .*, add `\.to_event\(1\)`"),
        (without_to_event, 2, r"Shape mismatch inside plate\('data'\) .*, add `\.to_event\(1\)`"),
        (without_either, 20, r"Site 'x' has log-probabilities of shape \(\d+, 6\), of which"),
        (one_by_one, 20, "Site 'x0' lies in no vectorised plate over the data"),
        (a_global_latent, 20, "Site 'scale' lies in no vectorised plate over the data"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [lambda pair, x: pvae.fit(pair, x, epochs=1, device="cpu", progress=False), pvae.evaluate],
)
def test_data_without_a_plate_are_shown_the_plate_to_write(use, model, num_data, message):
    plate = r'with pyro\.plate\("data", len\(x\)\):\n .*\.to_event\(1\)\)\n .*obs=x\)'
    with pytest.raises(ValueError, match=rf"(?s){message}.*[Ww]rite.*:\n.*{plate}"):
        use(PyroPair(model, nothing), torch.randn(num_data, PIXELS))
    assert len(pyro.get_param_store()) == 0


def test_an_event_as_long_as_the_batch_is_not_taken_for_data():
    pair = PyroPair(without_to_event, nothing)
    message = r"dimension -2 belongs to no plate\. If these are parts of one datum, add `\.to_event"
    with pytest.raises(ValueError, match=message):
        pair.prepare(torch.randn(PIXELS, PIXELS))


def test_a_pair_that_has_seen_no_data_cannot_know_their_shape(x):
    pair = PyroPair(linear_model, linear_guide)
    with pytest.raises(ValueError, match=r"'pyro pair' has seen no data yet, so .* by `given=`"):
        pair.prior_predictive(3)
    assert pair.prior_predictive(3, given=x)["x"].shape == (3, PIXELS)


def test_a_continuous_latent_outside_the_guide_is_an_error(x):
    pair = PyroPair(linear_model, nothing)
    message = r"Latent 'z' .* is neither drawn by the guide nor summable .* Add it to the guide"
    with pytest.raises(ValueError, match=message):
        pvae.log_weights(pair, x)


def test_a_pair_prints_the_names_of_its_programs():
    assert repr(PyroPair(linear_model, linear_guide)) == "PyroPair(linear_model, linear_guide)"
    assert repr(PyroPair(VAE().model, VAE().guide)) == "PyroPair(VAE.model, VAE.guide)"


def test_a_declared_models_own_program_may_have_a_guide_written_by_hand():
    truth = LinearGaussian.drawn()
    x = truth.sample(7)
    model = truth.declared()
    pair = PyroPair(model.model, truth.guide)
    weights = pvae.log_weights(pair, x, 3)
    torch.testing.assert_close(weights, truth.log_prob(x).expand(3, -1))
    learned = models.ppca(data_size=5, latent_size=3).double()
    assert {id(p) for p in learned.model_modules.parameters()} <= {
        id(p) for p in PyroPair(learned.model, truth.guide).parameters()
    }
    assert pvae.log_weights(PyroPair(learned.model, truth.guide), x, 3).isfinite().all()


def test_deterministic_sites_keep_their_shape():
    """Pyro's `uncondition` would draw them anew, from a Delta that the plate has widened."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, 0.5))

    pair, x = PyroPair(model, guide), torch.randn(3)
    pair.prepare(x)
    drawn = pair.prior_predictive(5)
    assert drawn["twice"].shape == (5,)
    assert torch.equal(drawn["twice"], 2 * drawn["z"])
    assert not torch.equal(drawn["x"], drawn["twice"])


def test_draws_of_the_guide_alone_on_which_latents_depend_are_refused():
    """log q(z | x) would be an integral over them, and "bounds" lie above log p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 3.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.1 * a, 0.7))

    with pytest.raises(ValueError, match="The guide draws 'a', which the model does not have"):
        pvae.evaluate(PyroPair(model, guide), torch.zeros(3), 10)


def test_the_first_run_of_a_pair_leaves_moments_of_its_networks_as_they_were():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    before = {name: value.clone() for name, value in net.named_buffers()}
    pvae.evaluate(PyroPair(model, guide, vectorize_particles=False), torch.randn(20, 2), 3)
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name
