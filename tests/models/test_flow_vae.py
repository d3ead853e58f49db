"""p(x) by an integral over what the flow is fed, which needs no Jacobian."""

import pytest
import torch

import pvae
from pvae import LatentModel
from pvae.flows import MAF
from tests.fitting import binary


@pytest.fixture(params=["autoregressive", "spline"])
def model(request) -> LatentModel:
    made = pvae.models.flow_vae(6, 2, hidden=(5,), hidden_flow=(8,), flow=request.param).double()
    for parameter in made.model_modules["z"].parameters():  # far from the identity
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def test_log_p_is_the_integral_over_the_normal_that_the_prior_starts_from(model):
    """p(x) = integral of N(e; 0, I) p(x | f(e)) over e."""
    x = binary().double()
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    e = torch.cartesian_prod(axis, axis)
    prior = model.module_of("z")({})
    z = e
    for step in prior.transforms:
        z = step(z)
    logits = model.module_of("x").nets["net"](z)["logits"].detach()
    log_lik = (logits.sigmoid().log() @ x.T) + ((-logits).sigmoid().log() @ (1 - x).T)
    log_area = 2 * torch.log(axis[1] - axis[0])
    log_prior = prior.base_dist.log_prob(e)
    expected = (log_prior.unsqueeze(1) + log_lik).logsumexp(0) + log_area
    naive = model.draw(x, 20_000, "prior").log_weights.detach()  # log p(x | z), z by the flow
    ratio = (naive - expected).exp()
    error = ratio.std(0) / 20_000**0.5
    assert bool((error < 0.1).all())
    assert bool(((ratio.mean(0) - 1).abs() < 4.5 * error).all())
    if isinstance(model.sites["z"].flow[0], MAF):  # splines have kinks, which the rule is slow at
        torch.testing.assert_close(pvae.exact.log_prob(model, x), expected, rtol=0, atol=1e-3)


def test_draws_from_the_prior_have_its_density(model):
    z = model.prior_predictive(20_000)["z"]
    q = torch.distributions.Normal(z.mean(0), 0.3 * z.std(0))
    ratio = (
        q.log_prob(z).sum(-1) - model.module_of("z")({}).log_prob(z).detach()
    ).exp()  # of mean one
    error = float(ratio.std()) / 20_000**0.5
    assert error < 0.05
    assert float(ratio.mean()) == pytest.approx(1, abs=4.5 * error)


def test_an_unknown_flow_names_the_known_ones():
    with pytest.raises(ValueError, match="`flow` must be one of autoregressive, spline; got 'iaf'"):
        pvae.models.flow_vae(6, 2, flow="iaf")
