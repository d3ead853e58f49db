"""The prior is the guide at pseudo-inputs: its density by hand, and whose parameters are whose."""

import copy
import json
import math

import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor

import pvae
from pvae import LatentModel
from tests.fitting import binary, fit


def tiny(num_components: int = 4) -> LatentModel:
    model = pvae.models.vampprior_vae(6, 1, hidden=(5,), num_components=num_components).double()
    for parameter in model.guide_modules.parameters():  # components apart from each other
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def encoded(model: LatentModel, x: Tensor) -> Normal:
    """q(z | x), written out."""
    first, _, last = model.guide_module_of("z").nets["net"].body
    h = torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    return Normal(h[:, 0], h[:, 1].exp())


def log_prior(model: LatentModel, z: Tensor) -> Tensor:
    """log 1/K sum_k q(z | u_k) at each of z, (S,)."""
    u = model.module_of("z").nets["net"].raw["x"].sigmoid()
    return encoded(model, u).log_prob(z.unsqueeze(-1)).logsumexp(-1).detach() - math.log(len(u))


def test_log_p_is_the_integral_under_the_guide_at_pseudo_inputs():
    model, x = tiny(), binary().double()
    z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    logits = model.module_of("x").nets["net"](z.unsqueeze(-1))["logits"].detach()
    log_lik = (logits.sigmoid().log() @ x.T) + ((-logits).sigmoid().log() @ (1 - x).T)
    expected = (log_prior(model, z).unsqueeze(1) + log_lik).logsumexp(0) + torch.log(z[1] - z[0])
    torch.testing.assert_close(pvae.exact.log_prob(model, x), expected, rtol=0, atol=1e-3)


def test_the_factors_of_k_and_z_add_up_to_the_prior():
    model = tiny()
    particles = model.draw(binary().double(), 5)
    expected = log_prior(model, particles.values["z"].detach().reshape(-1)).reshape(5, 20)
    torch.testing.assert_close(particles.log_joint_of(["k", "z"]).detach(), expected)


def test_draws_from_the_prior_have_its_density():
    model = tiny()
    z = model.prior_predictive(20_000)["z"].reshape(-1)
    q = Normal(z.mean(), 0.5 * z.std())
    ratio = (q.log_prob(z) - log_prior(model, z)).exp()  # of mean one
    error = float(ratio.std()) / 20_000**0.5
    assert error < 0.05
    assert float(ratio.mean()) == pytest.approx(1, abs=4.5 * error)


def test_the_gradient_of_the_prior_reaches_pseudo_inputs_and_guide_as_by_hand():
    model = tiny()
    z = torch.randn(1, 20, 1, dtype=torch.float64)
    wanted = [model.module_of("z").nets["net"].raw["x"], *model.guide_modules.parameters()]
    modules = model.model_modules
    by_k = torch.stack([modules["z"]({"k": torch.tensor(k)}).log_prob(z[0]) for k in range(4)])
    ours = torch.autograd.grad(by_k.logsumexp(0).sum(), wanted)
    u = wanted[0].sigmoid()
    by_hand = encoded(model, u).log_prob(z[0]).logsumexp(-1).sum()
    for one, other in zip(ours, torch.autograd.grad(by_hand, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_it_has_a_vaes_parameters_and_the_pseudo_inputs():
    vae = pvae.models.vae(6, 1, hidden=(5,))
    of_vae = {name: p.shape for name, p in vae.named_parameters()}
    ours = {name: p.shape for name, p in tiny().named_parameters()}
    assert ours == of_vae | {"model_modules.z.nets.net.raw.x": (4, 6)}


@pytest.mark.parametrize("again", [copy.deepcopy, None], ids=["copied", "through JSON"])
def test_another_models_prior_follows_its_own_guide(again):
    model = tiny()
    other = again(model) if again else LatentModel.from_json(json.dumps(model.to_json())).double()
    before = model.module_of("z")({"k": torch.arange(4)}).mean
    fit(other, binary(), steps=2)
    assert torch.equal(model.module_of("z")({"k": torch.arange(4)}).mean, before)
    z = torch.randn(7, dtype=torch.float64)
    joint = other.module_of("z")({"k": torch.arange(4)}).log_prob(z.reshape(7, 1, 1))
    torch.testing.assert_close(joint.logsumexp(-1).detach() - math.log(4), log_prior(other, z))


def test_pseudo_inputs_lie_where_pixels_do():
    u = tiny(num_components=50).module_of("z").pseudo_inputs.values()["x"]
    assert u.shape == (50, 6)
    assert bool(((0 < u) & (u < 1)).all())
    assert float(u.detach().std()) > 0.1
