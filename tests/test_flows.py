import copy
import math
import re

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pvae
from pvae import Latent, LatentModel, Learned, Observed
from pvae.flows import IAF, MAF, Flow, Flows, SplineCoupling
from pvae.nets import MLP, Input, Linear, Table
from pvae.objectives.gradient import Coefficients, gradient_of
from pvae.site_module import SiteModule
from tests.fitting import assert_same_fit, binary, fit, traced

KINDS = [IAF, MAF, SplineCoupling]
STEPS = {
    "iaf": [IAF(8)],
    "maf": [MAF(8, 9)],
    "spline": [SplineCoupling(8)],
    "two iafs": [IAF(8), IAF(9)],
    "all three": [SplineCoupling(8), IAF(8), MAF(8)],
}


@pytest.fixture(params=STEPS.values(), ids=STEPS)
def steps(request) -> list[Flow]:
    return request.param


def strong(module: nn.Module) -> nn.Module:
    """In float64, with maps that are far from the identity."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def site(steps: list[Flow], size: int = 3, **options) -> SiteModule:
    module = SiteModule("z", Latent(dist.Normal, size, flow=steps, **options), [Input((4,))])
    assert isinstance(strong(module), SiteModule)
    return module


def mapped(d: dist.TransformedDistribution, e: Tensor) -> Tensor:
    """z = f(e)."""
    for step in d.transforms:
        e = step(e)
    return e


# ------------------------------------------------------------------------------ densities


def test_the_density_is_that_of_the_base_less_the_log_jacobian(steps):
    module = site(steps, given="x", net=MLP(5))
    d = module({"x": torch.randn(1, 4, dtype=torch.float64)})
    e = d.base_dist.sample()
    jacobian = torch.autograd.functional.jacobian(lambda e: mapped(d, e), e)[0, :, 0]
    expected = d.base_dist.log_prob(e) - jacobian.det().abs().log()
    z = mapped(d, e)
    torch.testing.assert_close(d.log_prob(z), expected)
    torch.testing.assert_close(d.log_prob(z.clone()), expected)  # of which no step knows the source


def test_a_density_integrates_to_one_and_draws_come_from_it(steps):
    """E_p[q / p] = 1 for any density q where p has mass: here a narrow one."""
    d = site(steps, size=2)({})
    z = d.sample((20_000,))
    q = dist.Normal(z.mean(0), 0.3 * z.std(0)).to_event(1)
    ratio = (q.log_prob(z) - d.log_prob(z)).exp()
    error = float(ratio.std()) / 20_000**0.5
    assert error < 0.02
    assert float(ratio.mean()) == pytest.approx(1, abs=4.5 * error)


def with_constants(steps: list[Flow], *numbers: tuple[list[float], list[float]]) -> SiteModule:
    """Steps whose networks put out these numbers, mu and log sigma, whatever goes in."""
    module = site(steps, size=2)
    for network, (mu, log_sigma) in zip(module.flow.networks, numbers, strict=True):
        nn.init.zeros_(network.layers[-1].weight)
        bias = torch.tensor([*mu, *log_sigma], dtype=torch.float64)
        network.layers[-1].bias = nn.Parameter(bias)
    return module


def test_steps_without_slope_make_a_normal_of_another_place_and_scale():
    mu, log_sigma = [1.0, -2.0], [0.5, -0.5]
    z = torch.randn(20, 2, dtype=torch.float64)
    sigma = torch.tensor(log_sigma).exp().numpy()
    forwards = with_constants([IAF(4)], (mu, log_sigma))({}).log_prob(z)
    by_scipy = stats.norm(mu, sigma).logpdf(z).sum(-1)
    torch.testing.assert_close(forwards, torch.from_numpy(by_scipy))
    backwards = with_constants([MAF(4)], (mu, log_sigma))({}).log_prob(z)
    by_scipy = stats.norm(-np.array(mu) / sigma, 1 / sigma).logpdf(z).sum(-1)
    torch.testing.assert_close(backwards, torch.from_numpy(by_scipy))


def test_dimensions_are_reversed_between_two_steps():
    first, second = ([1.0, -2.0], [0.5, -0.5]), ([3.0, 4.0], [0.0, 1.0])
    mean = with_constants([IAF(4), IAF(4)], first, second)({}).sample((20_000,)).mean(0)
    expected = [-2.0 + 3.0, math.exp(1.0) * 1.0 + 4.0]
    error = torch.tensor([math.exp(-0.5), math.exp(1.5)]) / 20_000**0.5
    assert bool(((mean - torch.tensor(expected)).abs() < 4.5 * error).all())


@pytest.mark.parametrize("kind", [IAF, MAF])
def test_an_autoregressive_step_has_its_papers_formula(kind):
    module = site([kind(8)], given="x", net=Linear())
    x = torch.randn(5, 4, dtype=torch.float64)
    d, (network,) = module({"x": x}), module.flow.networks
    e = d.base_dist.sample()
    z = mapped(d, e)
    known, other = (e, z) if kind is IAF else (z, e)
    context = module.nets["net"](x)["context"]
    for i in range(3):
        before = known * (torch.arange(3) < i)  # what may matter to dimension i
        mu, log_sigma = network(before, context)
        expected = known[:, i] * log_sigma[:, i].clamp(-5, 3).exp() + mu[:, i]
        torch.testing.assert_close(other[:, i], expected)


def test_a_coupling_leaves_the_first_half_and_all_that_is_far_out():
    d = site([SplineCoupling(8)], size=5)({})
    e = torch.randn(50, 5, dtype=torch.float64)
    z = mapped(d, e)
    assert torch.equal(z[:, :2], e[:, :2])
    assert bool((z[:, 2:] != e[:, 2:])[e[:, 2:].abs() < 3].all())
    far = 4 * e.sign()
    assert torch.equal(mapped(d, far), far)
    torch.testing.assert_close(d.log_prob(far), d.base_dist.log_prob(far))


# ------------------------------------------------------------------------------ in a model


def flow_vae(prior: type[Flow], guide: type[Flow]) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(dist.Normal, 2, flow=[prior(6), prior(6)]),
        x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5)),
        guide={"z": Latent(dist.Normal, 2, given="x", net=MLP(5), flow=[guide(6), guide(7)])},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_of_the_size_of_the_first_layer_and_reaches_every_step(kind):
    module = site([kind(8, 9), kind(7)], given="x", net=MLP(5))
    assert set(module.nets["net"](torch.zeros(4).double())) == {"loc", "scale", "context"}
    x, e = torch.randn(2, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    d = module({"x": x})
    assert module.nets["net"](x)["context"].shape == (2, 8)
    for step in (d.transforms[0], d.transforms[2]):
        assert not torch.equal(*step(e.expand(2, 3)))
    assert site([kind(8)]).flow.networks[0].context_dim == 0


@pytest.mark.parametrize("kind", KINDS)
def test_particles_drawn_together_weigh_what_each_weighs_alone(kind):
    model, x = flow_vae(kind, kind), binary()
    particles = model.draw(x, 3)
    z = particles.values["z"]
    prior, guide = model.module_of("z"), model.guide_module_of("z")
    for k in range(3):
        torch.testing.assert_close(particles.log_p["z"][k], prior({}).log_prob(z[k]))
        alone = torch.cat([guide({"x": x[n : n + 1]}).log_prob(z[k, n : n + 1]) for n in range(20)])
        torch.testing.assert_close(particles.log_q["z"][k], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_given_an_enumerated_parent_has_its_categories_one_by_one(kind):
    model = LatentModel(
        c=Latent(dist.Categorical, 3),
        z=Latent(dist.Normal, 2, given="c", net=Table(), flow=kind(4)),
        x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5)),
        guide={"z": Latent(dist.Normal, 2, given="x", net=MLP(5))},
    )
    strong(model)
    particles = model.draw(binary().double(), 4)
    z = particles.values["z"]
    for c in range(3):
        alone = model.module_of("z")({"c": torch.full((4, 20), c)}).log_prob(z)
        torch.testing.assert_close(particles.log_p["z"][c], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_draws_have_the_gradient_of_uncut_ones(kind):
    model, x = flow_vae(kind, kind).double(), binary().double()
    programs = model.programs(x)
    gradients = []
    for cut in (False, True):
        torch.manual_seed(1)
        particles = programs.draw(3, cut=cut)
        one = torch.ones_like(particles.log_weights)
        total = particles.log_weights.sum()
        if cut:  # a bound differentiated as it is: c, -c, c
            total = gradient_of(particles, Coefficients(one, -one, one), {})
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for uncut, cut_ in zip(*gradients, strict=True):
        torch.testing.assert_close(cut_, uncut)


@pytest.mark.parametrize("objective", [pvae.ELBO(), pvae.IWAE(3, gradient="dreg")], ids=str)
def test_a_fit_as_a_graph_has_the_same_bits(objective):
    ours = fit(flow_vae(MAF, IAF), binary(), objective, steps=3)
    assert_same_fit(ours, traced(flow_vae(MAF, IAF), binary(), objective, steps=3))


def test_a_compiled_fit_has_the_same_numbers():
    """As it had not with Pyro's `Permute` between the steps."""

    def fitted(compile: bool) -> LatentModel:
        torch.manual_seed(0)
        guide = {"z": Latent(dist.Normal, 2, given="x", net=Linear(), flow=[IAF(8), IAF(8)])}
        x = Observed(dist.Bernoulli, 6, given="z", net=Linear())
        model = LatentModel(z=Latent(dist.Normal, 2), x=x, guide=guide)
        return fit(model, binary(), steps=1, compile=compile).model

    for one, other in zip(fitted(True).parameters(), fitted(False).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # a step of Adam is 1e-3


def test_a_spline_as_a_graph_may_leave_its_box_at_any_step():
    """Where it is the identity; with Pyro's own, the number outside became part of the graph."""
    fits = []
    for run in (fit, traced):
        model = flow_vae(SplineCoupling, SplineCoupling)
        model.guide_module_of("z").nets["net"].body[-1].weight.data *= 10
        drawn = model.draw(binary(), 50).values["z"]
        assert 0 < float((drawn.abs() > 3).double().mean()) < 1
        fits.append(run(model, binary(), pvae.ELBO(3), steps=5))
    assert_same_fit(*fits)


@pytest.mark.parametrize(("size", "method"), [(2, "quadrature"), (3, None)])
def test_a_flow_leaves_no_model_linear_gaussian(size, method):
    model = LatentModel(
        z=Latent(dist.Normal, size, flow=MAF(4)),
        x=Observed(dist.Normal, 4, given="z", net=Linear(), scale=0.5),
    )
    assert pvae.exact.method(model) == method


def test_a_model_keeps_nothing_of_what_its_maps_have_computed():
    model = flow_vae(MAF, IAF)
    pvae.IWAE(2).surrogate(model.draw(binary(), 2)).backward()
    copy.deepcopy(model)  # refuses tensors that a graph has made
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_flow_tightens_the_bound_where_the_posterior_is_bent():
    """z ~ N(0, I), x ~ N(z_2 + z_1^2, 0.25): a posterior like a banana, one datum."""

    class Bent(nn.Module):
        def forward(self, z):
            return z[..., 1:] + z[..., :1] ** 2

    def bound(**flow) -> tuple[float, float]:
        torch.manual_seed(0)
        loc, scale = Learned([0.0, 0.0]), Learned([1.0, 1.0])
        entry = Latent(dist.Normal, 2, loc=loc, scale=scale, **flow)
        model = LatentModel(
            z=Latent(dist.Normal, 2),
            x=Observed(dist.Normal, 1, given="z", net=Bent(), scale=0.25),
            guide={"z": entry},
        )
        x = torch.full((1, 1), 1.0)
        fit(model, x, pvae.ELBO(64), steps=400, lr=0.02)
        weights = pvae.log_weights(model, x, num_particles=5000)
        truth = float(pvae.exact.log_prob(model, x))
        return truth - float(weights.mean()), float(weights.std()) / 5000**0.5

    (plain, error), (bent, bent_error) = bound(), bound(flow=[IAF(16), IAF(16)])
    assert bent > -4.5 * bent_error  # both are below log p(x)
    assert plain - bent > 0.2 + 4.5 * (error + bent_error)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IAF(), r"IAF takes sizes of layers, as in IAF\(64\), got \(\)"),
        (lambda: MAF(8, 0), r"MAF takes sizes of layers, as in MAF\(64\), got \(8, 0\)"),
        (lambda: SplineCoupling(2.5), r"SplineCoupling takes sizes .* got \(2\.5,\)"),
        (
            lambda: site([IAF(2)]),
            r"Site 'z': IAF needs hidden layers of at least .* dimensions, 3; got \(2,\)",
        ),
        (
            lambda: site([IAF(8)], size=1),
            r"Site 'z': A flow maps real vectors of at least two dimensions, got .* \(1,\)",
        ),
        (
            lambda: SiteModule("z", Latent(dist.Gamma, 2, flow=IAF(8)), []),
            r"A flow maps real vectors .* shape \(2,\) in Independent.*Greater",
        ),
        (
            lambda: SiteModule("z", Latent(dist.Normal, (2, 3), flow=IAF(8)), []),
            r"A flow maps real vectors .* shape \(2, 3\)",
        ),
        (
            lambda: Flow.from_json({"flow": "os.system", "hidden": [3]}),
            r"names the flow 'os\.system', which is not one of pvae's \(IAF, MAF, SplineCoupling\)",
        ),
    ],
)
def test_a_flow_that_cannot_be_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_that_is_none_is_refused():
    with pytest.raises(
        TypeError, match=re.escape("takes steps such as pvae.flows.IAF(64), got 64")
    ):
        Latent(dist.Normal, 2, flow=[64])
    with pytest.raises(TypeError, match="Normal has no parameter 'flow'"):
        Observed(dist.Normal, 2, flow=IAF(8))
    assert isinstance(Flows([IAF(4)], dist.Normal(torch.zeros(2), 1).to_event(1), 0), nn.Module)
