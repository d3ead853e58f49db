import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.flows import IAF
from pvae.nets import MLP, Input, Linear, Table
from pvae.site_module import SiteModule
from pvae.sites import Given, Latent, Learned, Observed, Predicted, Site


def same(raw: Tensor) -> Tensor:
    return raw


def lower_cholesky(raw: Tensor) -> Tensor:
    return raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


exp, sigmoid = torch.exp, torch.sigmoid
PAIR = {"concentration1": exp, "concentration0": exp}

# A class, the constants that it needs, and each other parameter as a function of what a net puts
# out, written by hand: the transforms that the documentation promises.
FAMILIES = [
    (dist.Normal, {}, {"loc": same, "scale": exp}),
    (dist.LogNormal, {}, {"loc": same, "scale": exp}),
    (dist.Laplace, {}, {"loc": same, "scale": exp}),
    (dist.Cauchy, {}, {"loc": same, "scale": exp}),
    (dist.Gumbel, {}, {"loc": same, "scale": exp}),
    (dist.Logistic, {}, {"loc": same, "scale": exp}),
    (dist.StudentT, {}, {"df": exp, "loc": same, "scale": exp}),
    (dist.HalfNormal, {}, {"scale": exp}),
    (dist.HalfCauchy, {}, {"scale": exp}),
    (dist.Exponential, {}, {"rate": exp}),
    (dist.Gamma, {}, {"concentration": exp, "rate": exp}),
    (dist.InverseGamma, {}, {"concentration": exp, "rate": exp}),
    (dist.Weibull, {}, {"scale": exp, "concentration": exp}),
    (dist.Pareto, {}, {"scale": exp, "alpha": exp}),
    (dist.Beta, {}, PAIR),
    (dist.Kumaraswamy, {}, PAIR),
    (dist.VonMises, {}, {"loc": same, "concentration": exp}),
    (dist.AsymmetricLaplace, {}, {"loc": same, "scale": exp, "asymmetry": exp}),
    (dist.Bernoulli, {}, {"logits": same}),
    (dist.ContinuousBernoulli, {}, {"logits": same}),
    (dist.Geometric, {}, {"logits": same}),
    (dist.Poisson, {}, {"rate": exp}),
    (dist.GammaPoisson, {}, {"concentration": exp, "rate": exp}),
    (dist.NegativeBinomial, {}, {"total_count": exp, "logits": same}),
    (dist.ZeroInflatedPoisson, {}, {"rate": exp, "gate_logits": same}),
    (dist.Binomial, {"total_count": 5}, {"logits": same}),
    (dist.BetaBinomial, {"total_count": 5}, PAIR),
    (dist.RelaxedBernoulliStraightThrough, {"temperature": torch.tensor(0.5)}, {"logits": same}),
]
# Of these a draw is a vector already, or an index into one.
VECTORS = [
    (dist.Categorical, {}, {"logits": same}),
    (dist.OneHotCategorical, {}, {"logits": same}),
    (dist.RelaxedOneHotCategorical, {"temperature": torch.tensor(0.5)}, {"logits": same}),
    (dist.Multinomial, {"total_count": 5}, {"logits": same}),
    (dist.Dirichlet, {}, {"concentration": exp}),
    (dist.DirichletMultinomial, {"total_count": 5}, {"concentration": exp}),
    (dist.ProjectedNormal, {}, {"concentration": same}),
    (dist.MultivariateNormal, {}, {"loc": same, "scale_tril": lower_cholesky}),
    (dist.MultivariateStudentT, {}, {"df": exp, "loc": same, "scale_tril": lower_cholesky}),
    (dist.LowRankMultivariateNormal, {}, {"loc": same, "cov_factor": same, "cov_diag": exp}),
]


def raw_shape(distribution: type, name: str) -> tuple[int, ...]:
    if name in ("scale_tril", "cov_factor"):
        return (3, 3)
    return () if distribution is dist.MultivariateStudentT and name == "df" else (3,)


def event_shape(distribution: type) -> tuple[int, ...]:
    return () if distribution is dist.Categorical else (3,)


def by_hand(distribution: type, constants: dict, parameters: dict[str, Tensor]):
    d = distribution(**constants, **parameters)
    return d if distribution in [family[0] for family in VECTORS] else d.to_event(1)


@pytest.fixture(params=FAMILIES + VECTORS, ids=lambda family: family[0].__name__)
def family(request):
    return request.param


# ------------------------------------------------------------------------------ any distribution


def test_without_net_and_parameters_a_distribution_is_the_image_of_zero(family):
    distribution, constants, functions = family
    d = SiteModule("s", Latent(distribution, 3, **constants), [])({})
    zeros = {
        name: function(torch.zeros(raw_shape(distribution, name)))
        for name, function in functions.items()
    }
    expected = by_hand(distribution, constants, zeros)
    assert d.event_shape == expected.event_shape == event_shape(distribution)
    assert d.batch_shape == ()
    draws = expected.sample((10,))
    torch.testing.assert_close(d.log_prob(draws), expected.log_prob(draws))


def test_a_net_predicts_the_parameters_of_any_distribution(family):
    distribution, constants, functions = family
    site = Latent(distribution, 3, given="z", net=MLP(4), **constants)
    module = SiteModule("s", site, [Input((2,))])
    z = torch.randn(5, 4, 2)  # particles, data
    d = module({"z": z})
    raw = module.nets["net"](z)
    assert set(raw) == set(functions)
    parameters = {name: function(raw[name]) for name, function in functions.items()}
    expected = by_hand(distribution, constants, parameters)
    draws = d.sample()
    assert draws.shape == (5, 4, *event_shape(distribution))
    assert d.event_shape == module.event_shape
    assert bool(d.support.check(draws).all())
    torch.testing.assert_close(d.log_prob(draws), expected.log_prob(draws))


def test_gradients_of_any_log_probability_reach_the_net(family):
    distribution, constants, _ = family
    site = Latent(distribution, 3, given="z", net=Linear(), **constants)
    module = SiteModule("s", site, [Input((2,))])
    d = module({"z": torch.randn(6, 2)})
    d.log_prob(d.sample()).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


def test_the_standard_normal_and_the_uniform_categorical_are_what_zeros_mean():
    z = torch.randn(7, 50)
    d = SiteModule("z", Latent(dist.Normal, 50), [])({})
    by_formula = -z.square().sum(-1) / 2 - 25 * math.log(2 * math.pi)
    torch.testing.assert_close(d.log_prob(z), by_formula)
    d = SiteModule("c", Latent(dist.Categorical, 10), [])({})
    torch.testing.assert_close(d.log_prob(torch.arange(10)), torch.full((10,), -math.log(10)))


def test_event_shapes_are_of_any_rank():
    for shape in [(), 4, (4,), [2, 3], (1, 4, 4)]:
        module = SiteModule("x", Observed(dist.Normal, shape), [])
        expected = (shape,) if isinstance(shape, int) else tuple(shape)
        assert module.event_shape == tuple(module({}).event_shape) == expected
    assert SiteModule("c", Latent(dist.Categorical, (2, 5)), []).event_shape == (2,)


def test_a_uniform_takes_its_bounds_as_constants():
    module = SiteModule("u", Latent(dist.Uniform, 3, low=-1, high=torch.tensor([1.0, 2, 3])), [])
    assert module.event_shape == (3,)
    log_volume = math.log(2 * 3 * 4)
    assert float(module({}).log_prob(torch.zeros(3))) == pytest.approx(-log_volume)


def test_a_delta_takes_its_value_as_a_constant():
    d = SiteModule("s", Latent(dist.Delta, 2, v=torch.tensor([1.0, 2.0])), [])({})
    assert torch.equal(d.sample(), torch.tensor([1.0, 2.0]))


def test_an_ordered_outcome_has_one_category_more_than_cutpoints():
    site = Observed(dist.OrderedLogistic, 3, given="z", net=MLP(4))
    module = SiteModule("x", site, [Input((2,))])
    assert (module.event_shape, module.categories) == ((), 4)
    assert module({"z": torch.randn(5, 6, 2)}).probs.shape == (5, 6, 4)


@pytest.mark.parametrize(
    "distribution",
    [
        torch.distributions.Normal,
        torch.distributions.Bernoulli,
        torch.distributions.Categorical,
        torch.distributions.MultivariateNormal,
        torch.distributions.StudentT,
    ],
)
def test_torch_classes_become_pyros_of_the_same_name(distribution):
    site = Latent(distribution, 3)
    assert site.distribution is getattr(dist, distribution.__name__)
    assert site == Latent(getattr(dist, distribution.__name__), 3)


def test_a_distribution_of_the_users_own_is_a_site():
    class Twice(dist.Normal):
        """Not of Pyro's."""

    d = SiteModule("x", Observed(Twice, 2, scale=2.0), [])({})
    assert float(d.log_prob(torch.zeros(2))) == pytest.approx(-math.log(2 * math.pi * 4))


# ------------------------------------------------------------------------------ parameters

COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 1.0]])


@pytest.mark.parametrize(
    "scale",
    [2, 2.0, [2.0, 2.0], torch.tensor(2.0), torch.full((2,), 2.0), np.full(2, 2.0)],
    ids=str,
)
def test_a_constant_is_a_number_a_list_a_tensor_or_an_array(scale):
    module = SiteModule("x", Observed(dist.Normal, 2, scale=scale), [])
    assert torch.equal(module({}).base_dist.scale, torch.full((2,), 2.0))
    assert list(module.parameters()) == []
    assert module.state_dict() == {}  # it is in the declaration


@pytest.mark.parametrize(
    "parameter",
    [
        {"scale_tril": torch.linalg.cholesky(COVARIANCE)},
        {"covariance_matrix": COVARIANCE},
        {"covariance_matrix": COVARIANCE.tolist()},
        {"precision_matrix": COVARIANCE.inverse()},
    ],
)
def test_matrix_constants_leave_the_mean_to_the_net(parameter):
    site = Observed(dist.MultivariateNormal, 2, given="z", net=Linear(), **parameter)
    module = SiteModule("x", site, [Input((3,))])
    z = torch.randn(4, 5, 3)
    d = module({"z": z})
    torch.testing.assert_close(d.covariance_matrix, COVARIANCE.expand(4, 5, 2, 2))
    torch.testing.assert_close(d.mean, module.nets["net"](z)["loc"])
    assert set(module.nets["net"](z)) == {"loc"}


def test_a_factor_of_lower_rank_is_kept():
    factor = torch.tensor([[1.0], [2.0], [0.0]])
    site = Observed(dist.LowRankMultivariateNormal, 3, cov_factor=factor)
    expected = factor @ factor.T + torch.eye(3)
    torch.testing.assert_close(SiteModule("x", site, [])({}).covariance_matrix, expected)


@pytest.mark.parametrize(
    ("learned", "count"),
    [
        (Learned(0.1), 1),
        (Learned(0.1, 3), 3),
        (Learned([0.1, 0.1, 0.1]), 3),
        (Learned(torch.full((3,), 0.1)), 3),
    ],
    ids=["scalar", "per dimension", "list", "tensor"],
)
def test_a_learned_parameter_starts_where_it_is_told_and_is_trained(learned, count):
    site = Observed(dist.Normal, 3, given="z", net=Linear(), scale=learned)
    module = SiteModule("x", site, [Input((2,))])
    assert module.learned["scale"].numel() == count
    d = module({"z": torch.randn(4, 2)})
    torch.testing.assert_close(d.base_dist.scale, torch.full((4, 3), 0.1))
    d.log_prob(torch.zeros(4, 3)).sum().backward()
    assert bool((module.learned["scale"].grad != 0).all())


def test_a_learned_matrix_stays_in_its_support():
    site = Observed(dist.MultivariateNormal, 2, scale_tril=Learned(torch.eye(2)))
    module = SiteModule("x", site, [])
    torch.testing.assert_close(module({}).covariance_matrix, torch.eye(2))
    with torch.no_grad():
        module.learned["scale_tril"].normal_(std=10)
    assert bool(dist.constraints.lower_cholesky.check(module({}).scale_tril))


def test_a_predicted_parameter_has_a_net_of_its_own():
    site = Observed(dist.Normal, 3, given="z", net=Linear(), scale=Predicted(MLP(7)))
    module = SiteModule("x", site, [Input((2,))])
    z = torch.randn(5, 2)
    d = module({"z": z}).base_dist
    torch.testing.assert_close(d.loc, module.nets["net"](z)["loc"])
    torch.testing.assert_close(d.scale, module.nets["net_scale"](z)["scale"].exp())


def test_a_predicted_parameter_may_be_one_for_all_dimensions():
    site = Observed(dist.Normal, 3, given="c", net=Table(), scale=Predicted(Table(), 1))
    module = SiteModule("x", site, [Input((), categories=4)])
    scale = module({"c": torch.arange(4)}).base_dist.scale
    assert torch.equal(scale, scale[:, :1].expand(4, 3))
    assert len(scale[:, 0].unique()) == 4


@pytest.mark.parametrize(
    "site",
    [
        Latent(dist.Normal, 2, scale=0.5),
        Latent(dist.Uniform, 2, low=0.0, high=1.0),
        Latent(dist.RelaxedBernoulliStraightThrough, 2, temperature=0.5),
        Latent(dist.RelaxedOneHotCategorical, 2, temperature=0.5),
        Latent(dist.Gamma, 2, rate=Learned(2.0)),
    ],
    ids=lambda site: site.title,
)
def test_constants_and_free_parameters_follow_the_module(site):
    d = SiteModule("s", site, []).double()({})
    assert d.log_prob(d.sample()).dtype == torch.float64
    assert d.log_prob(d.sample()).shape == ()


def test_a_net_of_the_users_own_gives_parameters_in_their_order():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, z):
            return self.loc(z), self.log_scale(z)

    own = Twin()
    module = SiteModule("x", Observed(dist.Normal, 3, given="z", net=own), [Input((2,))])
    z = torch.randn(4, 5, 2)
    d = module({"z": z}).base_dist
    torch.testing.assert_close(d.loc, own.loc(z))
    torch.testing.assert_close(d.scale, own.log_scale(z).exp())
    assert len(list(module.parameters())) == 4


@pytest.mark.parametrize(
    ("site", "categories", "summable"),
    [
        (Latent(dist.Categorical, 4), 4, True),
        (Latent(dist.OneHotCategorical, 4), None, True),
        (Latent(dist.Bernoulli), None, True),
        (Latent(dist.Categorical, (2, 4)), 4, False),
        (Latent(dist.Bernoulli, 3), None, False),
        (Latent(dist.Poisson), None, False),
        (Latent(dist.Normal), None, False),
    ],
)
def test_what_can_be_summed_out_is_one_discrete_variable_of_finite_support(
    site, categories, summable
):
    module = SiteModule("c", site, [])
    assert (module.categories, module.summable) == (categories, summable)


# ------------------------------------------------------------------------------ errors


def built(site: Site) -> SiteModule:
    return SiteModule("x", site, [Input((2,))] * len(site.given))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Latent(dist.Normal(0, 1), 2), "Latent needs a distribution class such as"),
        (lambda: Observed("Normal", 2), "Observed needs a distribution class .* got 'Normal'"),
        (
            lambda: Latent(dist.Normal, 2, scal=1.0),
            r"Normal has no parameter 'scal'\. Did you mean 'scale'\?",
        ),
        (lambda: Latent(dist.Normal, 2, zzzzz=1.0), r"Normal has no parameter 'zzzzz'\.$"),
        (
            lambda: Latent(type("Mine", (torch.distributions.Normal,), {}), 2),
            r"Mine is not among pyro\.distributions",
        ),
    ],
)
def test_what_is_no_distribution_or_none_of_its_parameters_says_so(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Latent(dist.Normal, 0), "Normal needs a shape of positive whole numbers, got 0"),
        (lambda: Latent(dist.Normal, 2.5), "shape of positive whole numbers, got 2.5"),
        (lambda: Latent(dist.Normal, (2, -1)), r"whole numbers, got \(2, -1\)"),
        (
            lambda: Latent(dist.Normal, 2, net=MLP(3)),
            "A net needs parents: give Normal `given=` as well",
        ),
        (
            lambda: Latent(dist.Normal, 2, given=("a", "b")),
            "Normal is given a, b, but nothing reads it: add `net=`, or `Predicted",
        ),
        (
            lambda: built(Observed(dist.Bernoulli, 3, logits=0.0, probs=0.5)),
            "Bernoulli takes one of logits, probs, got both",
        ),
        (
            lambda: built(
                Observed(
                    dist.MultivariateNormal, 2, scale_tril=COVARIANCE, precision_matrix=COVARIANCE
                )
            ),
            "MultivariateNormal takes one of scale_tril, precision_matrix, got both",
        ),
        (
            lambda: built(Observed(dist.Bernoulli, 3, given="z", net=MLP(3), probs=0.5)),
            "Site 'x' has a net, and no parameter left for it to predict",
        ),
        (
            lambda: built(Latent(dist.Uniform, 3)),
            "Uniform needs `low` by keyword, as a constant: no net can predict it",
        ),
        (
            lambda: built(Latent(dist.Delta, 3, given="z", net=MLP(3))),
            "Delta needs `v` by keyword, as a constant",
        ),
        (
            lambda: built(Latent(dist.Uniform, 3, low=Learned(0.0), high=1.0)),
            r"Site 'x': `low` of Uniform must be a constant, got Learned\(init=0\.0",
        ),
        (
            lambda: built(Observed(dist.Binomial, 3, total_count=Learned(5.0))),
            "Site 'x': `total_count` of Binomial must be a constant",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, scale=-1.0)),
            r"Site 'x': `scale` must lie in GreaterThan\(lower_bound=0\.0\), got -1\.0",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, scale=Learned(0.0))),
            "Site 'x': `scale` must lie in GreaterThan",
        ),
        (
            lambda: built(Observed(dist.MultivariateNormal, 2, covariance_matrix=-COVARIANCE)),
            "Site 'x': `covariance_matrix` must lie in PositiveDefinite",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, scale=torch.ones(4))),
            r"`scale` has shape \(4,\), which does not fit the shape \(3,\) that Normal needs here",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, loc=Learned(0.0, 4))),
            r"`loc` has shape \(4,\), which does not fit the shape \(3,\)",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, loc=Learned(0.0, "a"))),
            "Learned needs a shape of positive whole numbers, got 'a'",
        ),
        (
            lambda: built(Observed(dist.MultivariateNormal, 2, scale_tril=torch.eye(3))),
            r"`scale_tril` has shape \(3, 3\), which does not fit the shape \(2, 3\)",
        ),
        (
            lambda: built(Observed(dist.MixtureOfDiagNormals, (2, 3))),
            "Site 'x': MixtureOfDiagNormals takes no parameters of shapes",
        ),
        (
            lambda: built(Observed(dist.Normal, 3, given="z", net=Table())),
            "Site 'x': Table looks up rows by a single Categorical parent",
        ),
    ],
)
def test_a_parameter_that_cannot_be_says_whose_and_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(2, 3), "Linear must return 2 tensors, for loc, scale, got 1"),
        (
            nn.Linear(2, 7),
            r"Linear must return `loc` of shape \(\*batch, 3\), got \(5, 7\)",
        ),
    ],
)
def test_a_wrong_net_of_the_users_own_says_what_it_must_return(net, message):
    constants = {} if "tensors" in message else {"scale": 1.0}
    module = built(Observed(dist.Normal, 3, given="z", net=net, **constants))
    with pytest.raises(ValueError, match=message):
        module({"z": torch.randn(5, 2)})


def test_sites_are_values():
    assert Latent(dist.Normal, 2, given="z", net=MLP(3)) == Latent(
        dist.Normal, (2,), given=("z",), net=MLP(3)
    )
    assert Latent(dist.Normal, 2) != Latent(dist.Normal, 3)
    assert Latent(dist.Normal, 2) != Observed(dist.Normal, 2)
    assert Latent(dist.Normal, 2, flow=IAF(3)) == Latent(dist.Normal, 2, flow=[IAF(3)])
    assert Latent(dist.Normal, 2, flow=IAF(3)) != Latent(dist.Normal, 2, flow=[IAF(3), IAF(3)])
    assert Latent(dist.Normal, 2, flow=IAF(3)) != Latent(dist.Normal, 2)
    assert Given(3) == Given(3)
    with pytest.raises(AttributeError, match="cannot assign"):
        Latent(dist.Normal, 2).shape = (3,)
