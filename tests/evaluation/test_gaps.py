"""The two gaps of the ELBO, where both are known in closed form or add up to a known one."""

import math

import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch.testing import assert_close

import pvae
from pvae import PyroPair, Refine
from tests.exact import LinearGaussian, TwoCategoricals
from tests.fitting import binary, declare

TRUTH = LinearGaussian.drawn()
X = TRUTH.sample(20)
QUICK = Refine(200, 8, 0.05, "ELBO")


class MeanField:
    """A diagonal guide: its means are right but for `shift`, its deviations times `spread`."""

    def __init__(self, shift: float, spread: float):
        self.shift, self.spread = shift, spread

    model = staticmethod(TRUTH.model)

    def guide(self, x):
        mean, S = TRUTH.posterior(x)
        best = torch.linalg.inv(S).diagonal().rsqrt()  # Bishop 2006, equation 10.13
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(mean + self.shift, self.spread * best).to_event(1))


def known(shift: float, spread: float) -> tuple[float, float]:
    """KL[q* || p(z | x)] and KL[q || p(z | x)] - KL[q* || p(z | x)], of two Gaussians."""
    precision = torch.linalg.inv(TRUTH.posterior(X)[1])
    of_family = (precision.diagonal().log().sum() - precision.logdet()) / 2
    d = len(precision)
    of_network = (shift**2 * precision.sum() + d * (spread**2 - 1) - 2 * d * math.log(spread)) / 2
    return float(of_family), float(of_network)


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (0.1, 1.5)])
def test_gaps_of_a_mean_field_guide_are_those_of_gaussians(shift, spread):
    pair = MeanField(shift, spread)
    log_p = pvae.evaluate(PyroPair(TRUTH.model, TRUTH.guide), X, 100)  # each weight is p(x)
    assert_close(log_p.log_p.values, TRUTH.log_prob(X).numpy())
    found = pvae.gaps(PyroPair(pair.model, pair.guide), X, 4000, log_p=log_p, refine=QUICK)
    for name, expected in zip(("approximation", "amortisation"), known(shift, spread), strict=True):
        error = float((found.per_datum[f"{name}_se"] ** 2).sum()) ** 0.5 / len(X)
        assert error < 0.01
        # two hundred steps come within 0.01 nats of the best
        assert abs(float(found.per_datum[name].mean()) - expected) < 4.5 * error + 0.01


def test_gaps_add_up_and_are_said():
    found = pvae.gaps(TRUTH.declared(), X, 200, refine=Refine(20, 4, 0.05, "ELBO"))
    table, rows = found.summary(), found.per_datum
    assert found.kind == "exact"
    whole = rows["log p(x)"] - rows["L[q]"]
    assert_close((rows["approximation"] + rows["amortisation"]).values, whole.values)
    assert table.loc["log p(x)", "value"] == pytest.approx(
        float(TRUTH.log_prob(X).mean()), abs=1e-4
    )
    assert table.loc["log p(x)", "se (draws)"] == 0
    assert table.loc["amortisation", "value"] > 0
    assert "as far as 20 steps find the best guide" in str(found)
    assert "a lower bound" not in found.verdict
    assert found.verdict in found._repr_html_()


def test_without_an_exact_value_log_p_is_a_bound_and_said_to_be():
    found = pvae.gaps(declare("vae"), binary(6), 100, refine=Refine(20, 4, 0.05, "ELBO"))
    assert found.kind == "lower bound L_100"
    assert "log p(x) is a lower bound here" in found.verdict
    assert float(found.per_datum["amortisation"].mean()) > 0


def test_an_evaluation_of_other_data_or_another_model_is_refused():
    other = pvae.evaluate(TRUTH.pair(), X[:5], 40)
    with pytest.raises(ValueError, match="'the model' and '`log_p`' cannot be compared"):
        pvae.gaps(TRUTH.pair(), X, 40, log_p=other, refine=Refine(1, 1, bound="ELBO"))
    ours = pvae.evaluate(TRUTH.declared(), X, 40)
    with pytest.raises(ValueError, match="`log_p` is no evaluation of this model: these are of"):
        pvae.gaps(TRUTH.pair(), X, 40, log_p=ours, refine=Refine(1, 1, bound="ELBO"))


def test_a_model_without_a_guide_has_no_gaps():
    truth = TwoCategoricals.drawn()
    with pytest.raises(ValueError, match="is a sum over every latent: it has no guide, and no gap"):
        pvae.gaps(truth.declared(), truth.sample(5), 10)


def test_steps_must_climb_the_elbo():
    with pytest.raises(ValueError, match="`refine` must climb the ELBO, whose gaps these are"):
        pvae.gaps(TRUTH.pair(), X, 10, refine=Refine())
