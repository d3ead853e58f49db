"""`fit`: objectives, optimisers and data of all kinds, against maxima known in closed form."""

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from pyro.distributions import Bernoulli, Normal
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed, PyroPair
from pvae.data import Data, load_data
from pvae.nets import Linear
from tests.exact import GaussianMixture
from tests.fitting import TRUTH, all_at, fit, gaussian, parameters, ppca

SGD = torch.optim.SGD


# ------------------------------------------------------------------------------ objectives

OBJECTIVES = [
    pvae.ELBO(),
    pvae.ELBO(4),
    pvae.IWAE(5),
    pyro.infer.Trace_ELBO(),
    pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True),
    pyro.infer.TraceMeanField_ELBO(),
    pyro.infer.TraceEnum_ELBO(max_plate_nesting=1),
    pyro.infer.TraceGraph_ELBO(),
    pyro.infer.RenyiELBO(alpha=0.5, num_particles=3),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_every_objective_trains(objective):
    x, model = TRUTH.sample(100), ppca()
    before = pvae.exact.log_prob(model, x).mean()
    fitted = fit(model, x, objective, epochs=30, lr=0.02, validation=x)
    assert fitted.model is model
    latent_size = model.inputs["z"].shape[0]
    best = float(pvae.fit_ppca(x, latent_size).log_prob(x).mean())  # of all such models
    assert before + 10 < pvae.exact.log_prob(model, x).mean() <= best
    assert fitted.history[["train", "valid"]].lt(best).all(axis=None)
    assert fitted.history["valid"].iloc[-1] > fitted.history["valid"].iloc[0]


@pytest.mark.parametrize("ours", [pvae.ELBO(), pvae.IWAE(1)])
def test_ours_and_trace_elbo_take_the_same_steps(ours):
    x = TRUTH.sample(50)
    one, other = ppca(), ppca()
    history = fit(one, x, ours, steps=8, lr=0.01).history
    of_pyro = fit(other, x, pyro.infer.Trace_ELBO(), steps=8, lr=0.01).history
    assert not torch.allclose(parameters(one), parameters(ppca()), atol=0.01)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=0, atol=1e-10)
    np.testing.assert_allclose(history["train"], of_pyro["train"], rtol=1e-12)


def test_gradients_do_not_grow_with_the_batch_under_pyros_objectives():
    """SGD would see a sum over the batch as a larger learning rate."""
    x = TRUTH.sample(50)
    one, other = ppca(), ppca()
    fit(one, x, pvae.ELBO(), steps=5, lr=1e-3, optimizer=SGD)
    fit(other, x, pyro.infer.Trace_ELBO(), steps=5, lr=1e-3, optimizer=SGD)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=0, atol=1e-10)


def test_ours_and_trace_enum_elbo_sum_the_same_components():
    truth = GaussianMixture.drawn()
    x, models = truth.sample(50), [truth.declared(), truth.declared()]
    fit(models[0], x, pvae.ELBO(), steps=8, lr=0.01)
    fit(models[1], x, pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), steps=8, lr=0.01)
    torch.testing.assert_close(*map(parameters, models), rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", [pyro.infer.Trace_ELBO(), pyro.infer.RenyiELBO()])
def test_an_objective_that_cannot_sum_out_is_refused(objective):
    truth = GaussianMixture.drawn()
    with pytest.raises(ValueError, match=r"ELBO cannot sum out c, .* Use pvae\.ELBO\(\).* guide"):
        fit(truth.declared(), truth.sample(10), objective)


def test_what_is_no_objective_is_refused():
    with pytest.raises(TypeError, match=r"such as pvae\.ELBO\(\) .*, got 'elbo'"):
        fit(ppca(), TRUTH.sample(10), "elbo")


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"patience": 3}, "`patience` counts epochs .* `validation=` as well"),
        ({"patience": 0, "validation": all_at(1.0)}, "`patience` must be at least 1, got 0"),
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"steps": -1}, "`steps` must be at least 1, got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"device": "abacus"}, "No device 'abacus' here"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS computes the loss several times .*Adam"),
    ],
)
def test_settings_without_meaning_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        fit(gaussian(), all_at(3.0), **settings)


# ------------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize(
    "optimizer",
    [SGD, torch.optim.AdamW, torch.optim.Rprop, lambda p, lr: SGD(p, lr=lr, momentum=0.9)],
)
def test_any_optimiser_takes_its_own_steps(optimizer):
    truth = GaussianMixture.drawn()
    x, fitted, by_hand = truth.sample(30), truth.declared(), truth.declared()
    fit(fitted, x, optimizer=optimizer, lr=0.01, steps=5, batch_size=30)
    steps = optimizer(list(by_hand.parameters()), lr=0.01)
    for _ in range(5):
        steps.zero_grad()
        (-by_hand.draw(x).log_weights.mean()).backward()
        steps.step()
    torch.testing.assert_close(parameters(fitted), parameters(by_hand), rtol=0, atol=1e-10)
    assert not torch.allclose(parameters(fitted), parameters(truth.declared()), atol=1e-3)


def test_the_norm_of_the_gradient_is_clipped():
    truth = GaussianMixture.drawn()
    x, start = truth.sample(30) + 2, parameters(truth.declared())
    settings = {"optimizer": SGD, "lr": 1.0, "steps": 1, "batch_size": 30}
    free = parameters(fit(truth.declared(), x, **settings).model) - start
    clipped = parameters(fit(truth.declared(), x, clip_norm=0.01, **settings).model) - start
    loose = parameters(fit(truth.declared(), x, clip_norm=100.0, **settings).model) - start
    assert free.norm() > 1
    torch.testing.assert_close(clipped, 0.01 * free / free.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(loose, free)


def test_schedulers_step_once_an_epoch():
    settings = {"epochs": 5, "lr": 0.8, "optimizer": SGD, "batch_size": 2}
    halved = fit(gaussian(), all_at(3.0), scheduler=lambda o: StepLR(o, 2, gamma=0.5), **settings)
    assert halved.history["lr"].tolist() == [0.8, 0.8, 0.4, 0.4, 0.2]
    thirds = fit(gaussian(), all_at(3.0), scheduler=lambda o: LambdaLR(o, thirding), **settings)
    np.testing.assert_allclose(thirds.history["lr"], [0.8 / 3**i for i in range(5)])


def thirding(epoch: int) -> float:
    return 3.0**-epoch


@pytest.mark.parametrize(
    ("target", "expected"), [(3.0, [0.1, 0.1, 0.1, 0.1]), (-3.0, [0.1, 0.1, 0.05, 0.025])]
)
def test_a_plateau_is_judged_by_the_validation_bound(target, expected):
    """Training data at 3 draw mu up, so data at -3 are fitted worse from the second epoch on."""
    fitted = fit(
        gaussian(),
        all_at(3.0),
        epochs=4,
        lr=0.1,
        optimizer=SGD,
        validation=all_at(target),
        scheduler=lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
    )
    assert fitted.history["lr"].tolist() == expected


def test_without_validation_a_plateau_is_judged_by_the_training_bound():
    fitted = fit(
        gaussian(),
        all_at(3.0),
        epochs=4,
        lr=0.1,
        optimizer=SGD,
        scheduler=lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
    )
    assert fitted.history["lr"].tolist() == [0.1, 0.1, 0.1, 0.1]


# ------------------------------------------------------------------------------ data of all kinds


def test_dynamic_binarisation_draws_each_epoch_anew_and_validation_once():
    train, valid, _ = load_data("digits")
    grey = Data(train.values[:30], None, train.spec, resampled=True)
    net, seen = nn.Linear(2, 64), []

    def model(x: Tensor) -> None:
        if not torch.is_grad_enabled() or x.shape[0] == 30:
            seen.append(x)
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    pair = PyroPair(model, guide)
    pair.prepare(grey[:])
    seen.clear()
    fit(pair, grey, epochs=3, batch_size=30, validation=valid.values[:20])
    trained = [x for x in seen if len(x) == 30]
    validated = [x for x in seen if len(x) == 20]
    assert (len(trained), len(validated)) == (3, 3)
    assert all(set(x.unique().tolist()) == {0.0, 1.0} for x in trained)
    assert len({float(x.sum()) for x in trained}) == 3
    assert all(torch.equal(x, valid.values[:20]) for x in validated)


def test_columns_by_name_stay_row_by_row_together():
    """x given y is a linear regression: its maximum is the least-squares solution."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    x = y @ torch.tensor([[1.0], [-2.0]], dtype=torch.float64) + 0.5
    x = x + 0.3 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    model = LatentModel(
        y=Given(2),
        x=Observed(Normal, 1, given="y", net=Linear(), scale=1.0),
    ).double()
    data = {"y": y.numpy(), "x": x}
    fit(model, data, optimizer=SGD, lr=0.5, epochs=60, batch_size=60)
    with_ones = torch.cat([y, torch.ones(60, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(with_ones, x).solution.flatten()
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-6)


def test_a_conditional_vae_reaches_the_truth_of_its_conditions():
    """x = W z + 2 y + noise: with y given, log p(x | y) is that of the model without y."""
    x, y = TRUTH.sample(200), torch.randn(200, 1, dtype=torch.float64)
    model = LatentModel(
        y=Given(1),
        z=Latent(Normal, 3),
        x=Observed(Normal, 5, given=("z", "y"), net=Linear(), scale=Learned(1.0)),
        guide={"z": Latent(Normal, 3, given=("x", "y"), net=Linear(), scale=Learned(0.5, 3))},
    ).double()
    data = {"x": x + 2 * y, "y": y}
    fit(model, data, lr=0.05, epochs=80, batch_size=50)
    log_p = pvae.exact.log_prob(model, data).mean()
    assert abs(log_p - TRUTH.log_prob(x).mean()) < 0.3


def test_a_pyro_pair_fits_as_under_pyros_svi():
    """The same pair with `pyro.param`, trained by hand-rolled SVI from the same start."""
    x = TRUTH.sample(100)
    net = nn.Linear(3, 5).double()

    def model(x: Tensor) -> None:
        decoder = pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        W = pyro.param("W", x.new_zeros(5, 3))
        scale = pyro.param(
            "scale", x.new_ones(3), constraint=torch.distributions.constraints.positive
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x @ W, scale).to_event(1))

    pair = PyroPair(model, guide)
    fitted = fit(pair, x, epochs=150, lr=0.02, batch_size=50, validation=x)
    assert fitted.history["valid"].iloc[-1] > fitted.history["valid"].iloc[0] + 5
    assert {name for name, _ in pair.named_parameters()} >= {"params.W", "params.scale"}
    C = net.weight @ net.weight.T + 0.25 * torch.eye(5, dtype=torch.float64)
    learned = torch.distributions.MultivariateNormal(net.bias, C).log_prob(x).mean()
    assert learned > TRUTH.log_prob(x).mean() - 0.3


def test_ppca_by_svi_reaches_the_closed_form_maximum_on_digits():
    train = load_data("digits", dequantisation="uniform").train.realised()
    best = pvae.fit_ppca(train, latent_size=4).log_prob(train).double().mean()
    model = pvae.models.ppca(data_size=64, latent_size=4)
    epochs = 120
    fit(
        model,
        train,
        epochs=epochs,
        batch_size=128,
        lr=0.05,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
    )
    reached = pvae.exact.log_prob(model, train).double().mean()
    assert best - 0.05 < reached < best + 1e-3  # a maximum: nothing is above it but rounding


# ------------------------------------------------------------------------------ what is printed


def test_a_fit_prints_what_was_done():
    fitted = fit(gaussian(), all_at(3.0), epochs=2, validation=all_at(1.0))
    table = fitted.summary()["value"]
    assert table["objective"] == "ELBO(num_particles=1)"
    assert table["data"] == "tensor, values as given, 1 dimension, all"
    assert table["valid (nats per datum)"] == fitted.history["valid"].iloc[-1]
    assert repr(fitted).startswith("Fit of model\n")
    assert "weights of epoch" in fitted._repr_html_()


def test_progress_is_shown_where_it_is_asked_for(capsys):
    fit(gaussian(), all_at(3.0), epochs=3, validation=all_at(3.0), progress=True)
    shown = capsys.readouterr().err
    assert "model, ELBO(num_particles=1)" in shown
    assert "3/3" in shown
    assert "valid=" in shown
    fit(gaussian(), all_at(3.0), epochs=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": nn.Linear(2, 2)}, r"LatentModel or a PyroPair, got Linear\. Wrap Pyro programs"),
        ({"objective": "iwae"}, r"`objective` must be an objective such as .*, got 'iwae'"),
        ({"optimizer": "adam"}, r"`optimizer` must be a torch\.optim class, .* got 'adam'"),
        (
            {"optimizer": pyro.optim.Adam({"lr": 1e-3})},
            r"must be a torch\.optim class, .* got <pyro",
        ),
        ({"batch_size": 2.5}, r"`batch_size` must be a whole number, got 2\.5"),
        (
            {"data": pvae.load_data(torch.rand(20, 5))},
            r"are splits: pass one of them, such as `.train`",
        ),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused(change, match):
    arguments = {"model": pvae.models.ppca(5, 2), "data": torch.rand(10, 5)} | change
    with pytest.raises(TypeError, match=match):
        pvae.fit(**arguments, progress=False)
