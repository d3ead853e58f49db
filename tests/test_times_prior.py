"""A guide's entry times the prior: two Normals multiplied, and a net that model and guide share."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Bernoulli, Categorical, LogNormal, Normal
from torch import Tensor

import pvae
from pvae import Latent, LatentModel, Learned, Observed
from pvae.flows import IAF
from pvae.nets import MLP, Linear, Table
from pvae.site_module import _product

A, S, B, SIGMA = 0.7, 0.8, 1.5, 0.6  # z2 ~ N(0, 1), z1 ~ N(A z2, S), x ~ N(B z1, SIGMA)
VARIANCE = B**2 * (A**2 + S**2) + SIGMA**2


def chain(slope: float, deviation: float, says: float = 1 / B, bias: float = 0.0) -> LatentModel:
    """The linear chain; q(z2 | x) = N(slope x, deviation^2), q(z1 | x, z2) ~ p N(says x + bias, .).

    Of slope and deviation of the posterior, and as it says by itself, the guide is the posterior.
    """
    model = LatentModel(
        z2=Latent(Normal, 1),
        z1=Latent(Normal, 1, given="z2", net=Linear(), scale=S),
        x=Observed(Normal, 1, given="z1", net=Linear(), scale=SIGMA),
        guide={
            "z2": Latent(Normal, 1, given="x", net=Linear(), scale=deviation),
            "z1": Latent(Normal, 1, given="x", net=Linear(), scale=SIGMA / B, times_prior=True),
        },
    ).double()
    slopes = {"z1": A, "x": B}, {"z2": slope, "z1": says}
    with torch.no_grad():
        for part, own in zip((model.model_modules, model.guide_modules), slopes, strict=True):
            for name, value in own.items():
                for parameter in part[name].parameters():
                    parameter.fill_(value if parameter.dim() == 2 else 0.0)
        for parameter in model.guide_modules["z1"].parameters():
            if parameter.dim() == 1:
                parameter.fill_(bias)
    return model


def off() -> LatentModel:
    """A guide that is none of the posterior's parts."""
    return chain(0.2, 0.9, says=0.2, bias=0.3)


def test_of_the_posterior_each_log_weight_is_log_p():
    slope = A * B / VARIANCE
    model = chain(slope, math.sqrt(1 - slope * A * B))
    x = 3 * torch.randn(20, 1, dtype=torch.float64)
    weights = pvae.log_weights(model, x, num_particles=5)
    truth = Normal(torch.zeros(1, dtype=torch.float64), VARIANCE**0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(weights, truth.expand(5, 20))


def gradients(objective, seed: int, num_data: int = 4000) -> tuple[Tensor, Tensor]:
    """By parameter: the mean over draws and its standard error, and the expectation."""
    torch.manual_seed(seed)
    model = off()
    x = torch.full((num_data, 1), 1.3, dtype=torch.float64)
    drawn = []
    for _ in range(30):
        model.zero_grad()
        objective.differentiable_loss(model.model, model.guide, x).backward()
        drawn.append(torch.stack([-p.grad.sum() / num_data for p in model.parameters()]))
    draws = torch.stack(drawn)
    return draws.mean(0), draws.std(0) / 30**0.5


def expectation(num_particles: int, wake: bool = False) -> Tensor:
    """Of the gradient of L_K, by Gauss-Hermite in e2 and e1 of each particle.

    Or that of wake-sleep's wake phases, sum_k w~_k (d log p_k + d log q_k) at draws that are fixed.
    """
    model = off()
    p, q = model.model_modules, model.guide_modules
    x = torch.tensor([1.3], dtype=torch.float64)
    nodes = 24 if num_particles == 1 else 14
    e, chance = hermite(nodes)
    e2, e1 = e[:, None, None], e[None, :, None]
    z2 = q["z2"].nets["net"](x)["loc"] + 0.9 * e2
    above, says = p["z1"].nets["net"](z2)["loc"], q["z1"].nets["net"](x)["loc"]
    own = SIGMA / B
    scale = (1 / S**2 + 1 / own**2) ** -0.5
    loc = scale**2 * (above / S**2 + says / own**2)
    z1 = loc + scale * e1
    if wake:
        z1, z2 = z1.detach(), z2.detach()
        above = p["z1"].nets["net"](z2)["loc"]
        loc = scale**2 * (above / S**2 + says / own**2)
    centre = q["z2"].nets["net"](x)["loc"]
    log_q = Normal(centre, 0.9).log_prob(z2) + Normal(loc, scale).log_prob(z1)
    log_p = Normal(0.0, 1.0).log_prob(z2) + Normal(above, S).log_prob(z1)
    log_p = log_p + Normal(p["x"].nets["net"](z1)["loc"], SIGMA).log_prob(x)
    log_w, weight = (log_p - log_q).flatten(), (chance[:, None] * chance).flatten()
    bound, together = log_w, weight
    if num_particles == 2:
        bound = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
        together = weight[:, None] * weight
    if wake:
        share = (log_w[:, None] - log_w).sigmoid().detach()
        both = (log_p + log_q).flatten()
        bound = share * both[:, None] + (1 - share) * both
    found = torch.autograd.grad((bound * together).sum(), list(model.parameters()))
    return torch.stack([gradient.sum() for gradient in found])


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """For expectations under N(0, 1)."""
    e, chance = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(nodes))
    return e, chance / chance.sum()


@pytest.mark.parametrize(
    ("objective", "num_particles"),
    [
        (pvae.ELBO(), 1),
        (pvae.ELBO(gradient="stl"), 1),
        (pvae.ELBO(kl="analytic"), 1),
        (pvae.IWAE(2), 2),
        (pvae.IWAE(2, "dreg"), 2),
        (pvae.ReweightedWakeSleep(2), 2),
    ],
    ids=lambda value: str(value),
)
def test_the_shared_net_has_the_gradient_of_both_its_uses(objective, num_particles):
    mean, error = gradients(objective, 3)
    wake = isinstance(objective, pvae.ReweightedWakeSleep)
    assert ((mean - expectation(num_particles, wake)).abs() < 4.5 * error + 1e-6).all()


def test_the_use_in_the_guide_can_be_told():
    """What the test above would not see, were the guide's use of the shared net left out."""
    model = off()
    guide = pyro.poutine.trace(model.guide).get_trace(torch.full((1, 1), 1.3, dtype=torch.float64))
    shared = list(model.model_modules["z1"].parameters())
    found = torch.autograd.grad(guide.nodes["z1"]["value"].sum(), shared)
    assert min(float(g.abs().max()) for g in found) > 0.1


def test_a_latent_may_be_a_single_number():
    model = LatentModel(
        z=Latent(Normal, loc=0.5, scale=2.0),
        x=Observed(Normal, 3, given="z", net=Linear()),
        guide={"z": Latent(Normal, given="x", net=Linear(), times_prior=True)},
    )
    assert pvae.log_weights(model, torch.randn(4, 3), 5).shape == (5, 4)


@pytest.mark.parametrize("scales", [(1e-25, 1.0), (1.0, 1e-25), (1e30, 1.0), (1e30, 1e30)])
def test_scales_whose_precisions_overflow_have_a_product_with_gradients(scales):
    loc, own, prior = (torch.tensor(v, requires_grad=True) for v in (0.7, *scales))
    found = _product({"loc": loc, "scale": own}, Normal(-0.4, prior))
    a, b = map(float, scales)
    weight = 1 / (1 + (a / b) ** 2)  # of the guide's own
    assert float(found["loc"].detach()) == pytest.approx(
        0.7 * weight - 0.4 * (1 - weight), rel=1e-5
    )
    assert float(found["scale"].detach()) == pytest.approx(a * weight**0.5, rel=1e-5)
    (found["loc"] + found["scale"]).backward()
    assert all(bool(leaf.grad.isfinite()) for leaf in (loc, own, prior))


def normal(given: str, **options) -> Latent:
    return Latent(Normal, 2, given=given, net=MLP(3), **options)


X = Observed(Bernoulli, 4, given="z", net=MLP(3))
TIMES = {"z": normal("x", times_prior=True)}


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"z": Latent(Normal, 2, times_prior=True)},
            r"Site 'z' is the prior: `times_prior` is for the guide's entry\.",
        ),
        (
            {"k": Latent(Categorical, 3), "z": Latent(Normal, 2, given="k", net=Table())},
            r"Guide entry 'z' multiplies the prior, which is given 'k': that is summed out, and "
            r"has no value in the guide\. Give it an entry before\.",
        ),
        (
            {"y": Latent(Normal, 1), "z": normal("y")}
            | {"guide": TIMES | {"y": Latent(Normal, 1, given="x", net=MLP(3))}},
            r"The guide entry 'z' is given 'y', which is declared after it: write 'y' first\.",
        ),
        (
            {"z": Latent(LogNormal, 2)},
            r"Guide entry 'z' multiplies the prior, which must be a Normal of shape \(2,\) without "
            r"flow or PseudoInputs; it is LogNormal of shape \(2,\)\.",
        ),
        ({"z": Latent(Normal, 2, flow=IAF(3))}, r"it is Normal through flow of shape \(2,\)\."),
    ],
)
def test_what_cannot_be_multiplied_says_why(sites, message):
    with pytest.raises(ValueError, match=message):
        LatentModel(**{"guide": TIMES} | sites | {"x": X})


def test_only_normals_are_multiplied():
    with pytest.raises(ValueError, match="whose product with another Normal is known, got LogNorm"):
        Latent(LogNormal, 2, times_prior=True)
    with pytest.raises(ValueError, match="got Normal through a flow"):
        Latent(Normal, 2, flow=IAF(3), times_prior=True)


def test_a_declaration_keeps_it():
    model = LatentModel(z=Latent(Normal, 2, loc=Learned(0.0, 2)), x=X, guide=TIMES)
    read = LatentModel.from_json(model.to_json())
    assert read.guide_sites["z"].times_prior
    assert str(read).splitlines()[-1].endswith("; times the prior")
    read.load_state_dict(model.state_dict())
    data = torch.rand(6, 4).round()
    pyro.set_rng_seed(0)
    expected = pvae.log_weights(model, data, 3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(pvae.log_weights(read, data, 3), expected)
