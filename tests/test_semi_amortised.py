"""Guides refined in training: per-datum and semi-amortised inference, against closed forms."""

import pytest
import torch
from pyro.distributions import Bernoulli, Normal
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Learned, Observed, Refine, SemiAmortised
from pvae.nets import MLP, Linear
from tests.exact import LinearGaussian
from tests.fitting import assert_same_fit, binary, fit, traced

TRUTH = LinearGaussian.drawn(data_size=5, latent_size=1)
X = TRUTH.sample(200)


def ppca(guide) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(Normal, 1),
        x=Observed(Normal, 5, given="z", net=Linear(), scale=Learned(1.0)),
        guide=guide,
    ).double()


def vae(guide) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(Normal, 2),
        x=Observed(Bernoulli, 6, given="z", net=MLP(5)),
        guide=guide,
    )


def test_per_datum_parameters_fit_the_model_as_closed_form_does():
    """The guide's family holds the posterior, so that SVI climbs log p(x) itself."""
    model = ppca("per-datum")
    how = SemiAmortised(refine=Refine(20, 4, 0.3, "ELBO"))
    fit(model, X, how, epochs=150, lr=0.05, batch_size=100)
    best = pvae.fit_ppca(X, 1).log_prob(X).mean()
    assert 0 <= best - pvae.exact.log_prob(model, X).mean() < 0.06


def test_a_model_without_encoder_is_refined_without_being_told():
    """In training, in validation, and in evaluation."""
    model = ppca("per-datum")
    fitted = fit(model, X, validation=X[:50], epochs=5, lr=0.03)
    assert fitted.settings["objective"].startswith("SemiAmortised(objective=ELBO(")
    found = pvae.evaluate(model, X[:50], 100)
    assert found.proposal == "refined guide"
    assert float(found.per_datum["bound"][0].mean()) > fitted.history["valid"].iloc[-1] - 0.3
    plain = pvae.evaluate(model, X[:50], 100, proposal="guide")
    assert float(plain.per_datum["bound"][0].mean()) < float(found.log_p.mean()) - 0.2


def test_the_guide_that_is_refined_starts_from_the_prior():
    model = vae("per-datum")
    assert model.guide_sites == {"z": Latent(Normal, (2,))}
    assert model.per_datum
    assert LatentModel.from_json(model.to_json()).per_datum
    assert "guide, per datum" in str(model)
    assert not vae(None).per_datum


@pytest.mark.parametrize("guide", ["per-datum", None])
@pytest.mark.parametrize("objective", [pvae.ELBO(), pvae.IWAE(3, "dreg")])
def test_traced_fits_are_those_of_pyro_bit_for_bit(guide, objective):
    how = SemiAmortised(objective, Refine(3, 2, 0.1, "ELBO"))
    eager = fit(vae(guide), binary(50), how, epochs=2, compile=False)
    assert_same_fit(eager, traced(vae(guide), binary(50), how, epochs=2))


def test_semi_amortised_guides_are_better_than_their_encoder():
    model = vae(None)
    fitted = fit(model, binary(50), SemiAmortised(pvae.ELBO(10)), epochs=3, lr=1e-4)
    plain = pvae.evaluate(model, binary(50), 200, grid=[1])
    assert fitted.history["train"].iloc[-1] > float(plain.per_datum["bound"][0].mean()) + 0.1


def test_the_model_learns_from_where_steps_end():
    """Its gradient is that of the bound at the refined guide, which is held fixed."""
    model = ppca("per-datum")
    objective = SemiAmortised(pvae.ELBO(2000), Refine(300, 16, 0.1, "ELBO"))
    programs = model.programs(X[:4])
    objective.prepare(programs)
    objective.estimate(programs)[1].backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    pvae.exact.log_prob(model, X[:4])
    z = pvae.exact.posterior(model, X[:4])["z"].sample((20_000,))
    model.zero_grad()
    mean = model.model_modules["x"]({"z": z})
    mean.log_prob(X[:4]).mean(0).sum().backward()  # Fisher's identity, d/d theta log p(x)
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert_close(gradient, parameter.grad, rtol=0.05, atol=0.5)


def test_what_it_is_made_of_is_shown():
    assert repr(SemiAmortised(pvae.IWAE(5))).startswith(
        "SemiAmortised(objective=IWAE(num_particles=5)"
    )


def test_pyros_own_objectives_cannot_refine():
    with pytest.raises(ValueError, match="Trace_ELBO cannot refine the guide of each datum"):
        fit(ppca("per-datum"), X, Trace_ELBO(), epochs=1)


def test_only_per_datum_is_a_guide_by_name():
    with pytest.raises(ValueError, match=r"`guide` must be .* or 'per-datum', got 'amortised'"):
        vae("amortised")


def test_sampling_with_a_per_datum_guide_refines_it_first():
    model = ppca("per-datum")
    fit(model, X, epochs=5, lr=0.03)
    mean = pvae.exact.posterior(model, X[:5])["z"].mean
    assert_close(model.encode(X[:5])["z"], mean, rtol=0, atol=0.1)
    assert_close(model.posterior(X[:5], 500)["z"].mean(0), mean, rtol=0, atol=0.2)
    tree = pvae.to_datatree(model, X[:5])
    assert_close(tree["posterior/z"].mean(("chain", "draw")).values, mean.numpy(), atol=0.3, rtol=0)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (pvae.collapse, "`collapse`"),
        (pvae.gaps, "`gaps`"),
        (lambda m, x: pvae.ais(m, x, 2, start="guide"), "Annealing from the guide"),
    ],
)
def test_what_asks_for_an_encoder_is_told_that_there_is_none(call, what):
    with pytest.raises(ValueError, match=f"{what} needs a guide that reads data"):
        call(ppca("per-datum"), X)
