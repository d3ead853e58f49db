"""The contract that every model in `models/` keeps: a file added there is tested at once.

Its size is made small by the names of its arguments, and its data are drawn from itself.
"""

import inspect
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import LatentModel
from tests.fitting import assert_same_fit, traced

SMALL = {
    "data_size": 6,
    "latent_size": 2,
    "latent_sizes": (3, 2),
    "hidden": (5,),
    "hidden_top": (4,),
    "hidden_flow": (6,),
    "num_components": 3,
    "categories": 3,
    "num_latents": 2,
    "image_shape": (1, 4, 5),
    "channels": (3, 4),
}

# What a model can be besides its default.
VARIANTS = {
    "categorical_vae": [{"guided": True}],
    "conv_vae": [{"image_shape": (3, 5, 4), "pixels": "normal"}],
    "count_vae": [{"counts": "poisson"}],
    "flow_vae": [{"flow": "spline"}],
    "gaussian_vae": [{"sigma": 0.1}, {"sigma": "per pixel"}, {"sigma": "predicted"}],
    "ladder_vae": [{"latent_sizes": (4, 3, 2)}],
    "mixture_of_gaussians": [{"covariance": form} for form in ("full", "tied", "spherical")],
    "sigmoid_belief_network": [{"latent_sizes": (3,)}],
}

CASES = [
    pytest.param((name, options), id=" ".join([name, *map(str, options.values())]))
    for name in pvae.models.__all__
    for options in [{}, *VARIANTS.get(name, [])]
]


def small(name: str, options: dict) -> LatentModel:
    declare = getattr(pvae.models, name)
    known = inspect.signature(declare).parameters
    return declare(**{key: size for key, size in SMALL.items() if key in known} | options)


@pytest.fixture(params=CASES)
def declare(request):
    return lambda: small(*request.param)


@pytest.fixture
def model(declare) -> LatentModel:
    return declare()


@pytest.fixture
def data(model) -> dict[str, Tensor]:
    """Twenty data drawn from the model itself, which lie in any support."""
    given = {}
    for name in model.given:
        site = model.inputs[name]
        random = torch.randn(20, *site.shape)
        given[name] = torch.randint(site.categories, random.shape) if site.categories else random
    drawn = model.prior_predictive(20, given)
    return {name: drawn[name] for name in model.observed} | given


def everything_of(model: LatentModel) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that are not saved."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in named.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------ the contract


def test_a_file_holds_a_function_of_its_name_that_declares_a_model(model):
    declare = getattr(pvae.models, model.name)
    assert declare.__doc__
    assert inspect.getmodule(declare).__doc__
    assert isinstance(model, LatentModel)


def test_log_weights_have_one_row_a_particle_and_one_column_a_datum(model, data):
    weights = pvae.log_weights(model, data, num_particles=3)
    assert weights.shape == (3, 20)
    assert bool(weights.isfinite().all())
    assert not weights.requires_grad


def test_gradients_reach_every_parameter(model, data):
    pvae.IWAE(4).surrogate(model.draw(data, 4)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_declaration_and_its_numbers_survive_json(model, data):
    read = LatentModel.from_json(json.dumps(model.to_json()))
    assert json.dumps(read.to_json()) == json.dumps(model.to_json())
    read.load_state_dict(model.state_dict())
    expected = pvae.log_weights(model, data, num_particles=3)
    assert torch.equal(pvae.log_weights(read, data, num_particles=3), expected)


def test_one_step_of_fit_changes_every_parameter(model, data):
    before = everything_of(model)
    fit = pvae.fit(model, data, steps=1, batch_size=20, device="cpu", progress=False)
    assert fit.model is model
    assert bool(fit.history.map(math.isfinite).all(axis=None))
    parts = fit.history.filter(regex=r"train (KL|reconstruction)\[")
    total = sum(parts[name] * (-1 if " KL" in name else 1) for name in parts)
    assert float(total.iloc[0]) == pytest.approx(float(fit.history["train"].iloc[0]), abs=1e-3)
    moved = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {name for name, _ in model.named_parameters()}


def test_a_traced_fit_is_the_eager_one(declare, data):
    def start() -> LatentModel:
        torch.manual_seed(0)
        return declare()

    settings = {"batch_size": 10, "steps": 3, "device": "cpu", "progress": False}
    eager = pvae.fit(start(), data, pvae.IWAE(3), compile=False, **settings)
    assert_same_fit(traced(start(), data, pvae.IWAE(3), **settings), eager)


def test_evaluation_leaves_everything_as_it_was(model, data):
    model.train()
    next(iter(model.model_modules.values())).eval()
    modes = [module.training for module in model.modules()]
    before, random_state = everything_of(model), torch.get_rng_state()
    result = pvae.evaluate(model, data, num_particles=30, device="cpu")
    assert len(result.summary()) > 0
    assert same(everything_of(model), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bounds_are_ordered_and_below_what_is_exact(model, data):
    result = pvae.evaluate(model, data, num_particles=200, device="cpu").per_datum
    if "bound" in result:
        mean = result["bound"].mean("datum")
        assert bool((mean.diff("particles") > 0).all())
        if "exact" in result:
            gap = (result["exact"] - result["bound"]).isel(particles=-1).sum()
            error = (result["bound_se"].isel(particles=-1) ** 2).sum() ** 0.5
            assert float(gap) > -4.5 * float(error)
    else:
        weights = pvae.log_weights(model, data, num_particles=1)
        torch.testing.assert_close(
            torch.tensor(result["exact"].values, dtype=weights.dtype), weights[0]
        )


def test_nothing_enters_pyros_global_store(model, data):
    pvae.fit(model, data, steps=1, device="cpu", progress=False)
    pvae.evaluate(model, data, num_particles=30, device="cpu")
    model.model(data)
    model.guide(data)
    assert len(pyro.get_param_store()) == 0


def test_two_instances_do_not_meet(declare, model, data):
    other = declare()
    before = everything_of(other)
    pvae.fit(model, data, steps=2, device="cpu", progress=False)
    assert same(everything_of(other), before)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert shared == set()


def test_everything_runs_in_double_precision(model, data):
    single = everything_of(model)
    model.double()
    assert {value.dtype for value in everything_of(model).values()} == {torch.float64}
    weights = pvae.log_weights(model, data, num_particles=2)
    assert weights.dtype == torch.float64
    fit = pvae.fit(model, data, steps=1, device="cpu", progress=False)
    assert fit.history["train"].notna().all()
    model.float()
    assert everything_of(model).keys() == single.keys()


def test_every_site_is_sampled_in_its_shape(model, data):
    shapes = {name: model.inputs[name].shape for name in model.sites}
    given = {name: data[name] for name in model.given}
    for name, value in model.prior_predictive(20, given).items():
        assert tuple(value.shape) == (20, *shapes[name])
    posterior = model.posterior(data, num_samples=3)
    assert set(posterior) == {*model.latents, *model.summed}
    for name, value in posterior.items():
        assert tuple(value.shape) == (3, 20, *shapes[name])
    for name, value in model.reconstruct(data).items():
        assert tuple(value.shape) == (20, *shapes[name])
    for name, value in model.interpolate(data, data, steps=4).items():
        assert tuple(value.shape) == (4, 20, *shapes[name])


def test_it_prints_and_is_drawn(model):
    rows = str(model).splitlines()
    assert rows[0].startswith(f"{model.name}: ")
    assert len(rows) == 2 + len(model.sites) + len(model.guide_sites)
    assert model._repr_html_().count("<tr>") == len(rows) - 1
    assert all(f"{name} [label" in model.render().source for name in model.model_modules)


# ------------------------------------------------------------------------------ each model


def test_the_package_names_every_file():
    assert {"vae", "gaussian_vae", "hierarchical_vae", "ppca"} <= set(pvae.models.__all__)
    assert {"mixture_of_gaussians", "mixture_of_bernoullis"} <= set(pvae.models.__all__)
    assert pvae.models.vae is pvae.models.__dict__["vae"]


def test_a_mixture_of_bernoullis_is_its_formula():
    model = small("mixture_of_bernoullis", {})
    x = torch.rand(9, 6).round()
    pi = model.module_of("c").learned["logits"].softmax(-1)
    p = model.module_of("x").nets["net"].rows["logits"].sigmoid()
    per_component = (p ** x.unsqueeze(1) * (1 - p) ** (1 - x.unsqueeze(1))).prod(-1)
    expected = (pi * per_component).sum(-1).log().detach()
    torch.testing.assert_close(pvae.log_weights(model, x)[0], expected)


@pytest.mark.parametrize(
    ("form", "count"),
    [("diag", 18 + 18), ("spherical", 18 + 3), ("full", 18 + 108), ("tied", 18 + 36)],
)
def test_a_mixture_of_gaussians_is_its_formula(form, count):
    model = small("mixture_of_gaussians", {"covariance": form})
    x = torch.randn(9, 6)
    assert sum(p.numel() for p in model.parameters()) == 3 + count
    d = model.module_of("x")({"c": torch.arange(3)})
    mean = model.module_of("x").nets["net"].rows["loc"]
    covariance = d.covariance_matrix if form in ("full", "tied") else d.variance.diag_embed()
    parts = torch.stack(
        [
            dist.MultivariateNormal(mean[c], covariance.expand(3, 6, 6)[c]).log_prob(x)
            for c in range(3)
        ]
    )
    expected = (parts.logsumexp(0) - math.log(3)).detach()  # pi starts uniform
    torch.testing.assert_close(pvae.log_weights(model, x)[0], expected)


@pytest.mark.parametrize(
    ("sigma", "learned", "net_outputs"),
    [(0.1, 0, 1), ("learned", 1, 1), ("per pixel", 6, 1), ("predicted", 0, 2)],
)
def test_the_sigma_of_a_gaussian_vae_is_fixed_learned_or_predicted(sigma, learned, net_outputs):
    site = small("gaussian_vae", {"sigma": sigma}).module_of("x")
    assert sum(p.numel() for p in site.learned.parameters()) == learned
    assert len(site.nets["net"](torch.zeros(2))) == net_outputs
    scale = site({"z": torch.randn(4, 2)}).base_dist.scale
    assert scale.shape == (4, 6)
    if sigma != "predicted":
        torch.testing.assert_close(scale, torch.full((4, 6), 0.1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "gaussian_vae",
            {"sigma": "free"},
            "`sigma` must be a number or one of learned, per pixel, predicted; got 'free'",
        ),
        ("gaussian_vae", {"sigma": -1.0}, "`scale` must lie in GreaterThan"),
        (
            "mixture_of_gaussians",
            {"covariance": "round"},
            "`covariance` must be one of diag, spherical, full, tied; got 'round'",
        ),
    ],
)
def test_an_unknown_form_names_the_known_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, options)
