import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed, PyroPair
from pvae.nets import MLP, Linear, Table
from pvae.pair import Columns


def deep() -> LatentModel:
    """Every kind of site: discrete and summed, guided, several observed, an image."""
    return LatentModel(
        y=Given(categories=3),
        c=Latent(dist.Categorical, 4),
        z=Latent(dist.Normal, 2, given="c", net=Table()),
        x=Observed(dist.Bernoulli, (1, 3, 3), given=("z", "y"), net=MLP(5)),
        w=Observed(dist.Poisson, given="z", net=Linear()),
    )


def deep_data(num_data: int = 5) -> dict[str, Tensor]:
    return {
        "y": torch.randint(3, (num_data,)),
        "x": torch.rand(num_data, 1, 3, 3).round(),
        "w": torch.poisson(torch.ones(num_data)),
    }


def linear_vae() -> LatentModel:
    return LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Normal, 4, given="z", net=Linear(), scale=0.5),
        guide={"z": Latent(dist.Normal, 2, given="x", net=Linear(), scale=0.3)},
    )


def affine(model: LatentModel, name: str, value: Tensor) -> Tensor:
    """W value + b by hand, of the net that the model or its guide has at a site."""
    module = model.guide_modules[name] if name in model.guide_modules else model.module_of(name)
    layer = module.nets["net"].body
    return value @ layer.weight.T + layer.bias


# ------------------------------------------------------------------------------ from the prior


def test_prior_predictive_draws_every_site():
    model = deep()
    draws = model.prior_predictive(6, given=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert {name: value.shape for name, value in draws.items()} == {
        "c": (6,),
        "z": (6, 2),
        "x": (6, 1, 3, 3),
        "w": (6,),
    }
    assert draws["c"].dtype == torch.int64
    assert set(draws["x"].unique().tolist()) <= {0.0, 1.0}
    by_name = model.prior_predictive(2, given={"y": torch.tensor([0, 1])})
    assert list(by_name) == ["c", "z", "x", "w"]


def test_prior_predictive_draws_have_the_moments_of_the_model():
    model = linear_vae()
    x = model.prior_predictive(20_000)["x"]
    weight = model.module_of("x").nets["net"].body.weight.detach()
    variance = weight.square().sum(1) + 0.25
    assert (x.mean(0) / (variance / 20_000).sqrt()).abs().max() < 4.5  # the bias starts at zero
    error = (x.var(0) / variance - 1) / (2 / 20_000) ** 0.5
    assert error.abs().max() < 4.5


def test_draws_follow_torchs_seed():
    model = linear_vae()
    torch.manual_seed(3)
    first = model.prior_predictive(4)["x"]
    assert not torch.equal(model.prior_predictive(4)["x"], first)
    torch.manual_seed(3)
    assert torch.equal(model.prior_predictive(4)["x"], first)


@pytest.mark.parametrize(
    "given", [{"y": 2}, 2, torch.tensor(2)], ids=["by name", "a number", "a tensor"]
)
def test_all_draws_may_share_one_value_of_what_a_model_is_conditioned_on(given):
    model = deep()
    torch.manual_seed(3)
    expected = model.prior_predictive(6, given={"y": torch.full((6,), 2)})
    torch.manual_seed(3)
    found = model.prior_predictive(6, given=given)
    assert list(found) == ["c", "z", "x", "w"]
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    z = {"z": torch.randn(6, 2)}
    each = model.decode(z, given=torch.full((6,), 2))["x"]
    assert torch.equal(model.decode(z, given=given)["x"], each)
    assert not torch.equal(model.decode(z, given=0)["x"], each)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"'model' is conditioned on y: pass these values by `given=`, got nothing\."),
        ({"q": torch.zeros(6)}, r"is conditioned on y: .*, got q\."),
        (torch.zeros(5), r"6 draws need as many values of 'y', got 5\."),
        (torch.full((6,), 3), r"Datum 0 lies outside the support .* of 'y' \(Given\)"),
        (3, r"Datum 0 lies outside the support .* of 'y' \(Given\)"),
        (torch.zeros(6, 2), r"Data for 'y' of 'model' must have shape \(N, \), got \(6, 2\)"),
    ],
)
def test_what_a_model_is_conditioned_on_is_asked_for(given, message):
    with pytest.raises(ValueError, match=message):
        deep().prior_predictive(6, given=given)


# ------------------------------------------------------------------------------ from the posterior


def test_posterior_draws_every_latent_for_each_datum():
    draws = deep().posterior(deep_data(), num_samples=7)
    assert {name: value.shape for name, value in draws.items()} == {"z": (7, 5, 2), "c": (7, 5)}


def test_posterior_draws_have_the_moments_of_the_guide():
    model, x = linear_vae(), torch.randn(3, 4)
    z = model.posterior(x, num_samples=20_000)["z"]
    standard_error = 0.3 / 20_000**0.5
    assert ((z.mean(0) - affine(model, "z", x)) / standard_error).abs().max() < 4.5
    assert ((z.std(0) / 0.3 - 1) / (0.5 / 20_000) ** 0.5).abs().max() < 4.5


def test_responsibilities_of_a_summed_latent_follow_bayes_rule():
    model = pvae.models.mixture_of_gaussians(data_size=2, num_components=3)
    with torch.no_grad():
        model.module_of("c").learned["logits"].copy_(torch.tensor([0.0, 1.0, -1.0]))
        model.module_of("x").nets["net"].rows["loc"].copy_(torch.tensor([[0.0, 1], [1, 0], [0, 0]]))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.2, 1.5]])
    rows = model.module_of("x").nets["net"].rows
    joint = torch.stack(
        [
            dist.Normal(rows["loc"][c], rows["scale"][c].exp()).log_prob(x).sum(-1)
            + model.module_of("c").learned["logits"].log_softmax(-1)[c]
            for c in range(3)
        ]
    )
    expected = joint.softmax(0).T.detach()  # (data, components)
    drawn = model.posterior(x, num_samples=20_000)["c"]
    shares = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    standard_error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((shares - expected) / standard_error).abs().max() < 4.5


def test_two_summed_latents_are_drawn_together():
    # b is a; x shows their sum exactly: the posterior knows both
    model = LatentModel(
        a=Latent(dist.Categorical, 3),
        b=Latent(dist.Categorical, 2),
        x=Observed(dist.Normal, 1, given=("a", "b"), net=Table(), scale=0.01),
    )
    with torch.no_grad():
        model.module_of("x").nets["net"].rows["loc"].copy_(torch.arange(6.0).unsqueeze(-1))
    drawn = model.posterior(torch.arange(6.0).unsqueeze(-1), num_samples=4)
    assert torch.equal(drawn["a"], torch.tensor([0, 0, 1, 1, 2, 2]).expand(4, 6))
    assert torch.equal(drawn["b"], torch.tensor([0, 1, 0, 1, 0, 1]).expand(4, 6))


def test_codes_are_the_means_of_the_guide():
    model, x = linear_vae(), torch.randn(3, 4)
    torch.testing.assert_close(model.encode(x)["z"], affine(model, "z", x).detach())


# ------------------------------------------------------------------------------ decoded


def test_reconstructions_are_means_of_the_decoder():
    model, x = linear_vae(), torch.randn(3, 4)
    decoder = model.module_of("x").nets["net"].body.weight.detach()
    expected = affine(model, "x", affine(model, "z", x)).detach()  # E_q[W z + b]
    found = model.reconstruct(x, num_samples=20_000)["x"]
    standard_error = 0.3 * decoder.square().sum(1).sqrt() / 20_000**0.5
    assert ((found - expected) / standard_error).abs().max() < 4.5


def test_one_reconstruction_is_the_mean_at_one_draw():
    model, x = linear_vae(), torch.randn(3, 4)
    torch.manual_seed(1)
    z = model.posterior(x)["z"][0]
    torch.manual_seed(1)
    torch.testing.assert_close(model.reconstruct(x)["x"], affine(model, "x", z).detach())


def test_every_observed_site_is_reconstructed():
    shapes = {k: v.shape for k, v in deep().reconstruct(deep_data(), num_samples=3).items()}
    assert shapes == {"x": (5, 1, 3, 3), "w": (5,)}


@pytest.mark.parametrize(
    ("site", "data", "expected"),
    [
        (Observed(dist.Categorical, 3, logits=[0.0, 2.0, 1.0]), [0, 1, 2], [1, 1, 1]),
        (Observed(dist.Cauchy, 1, loc=2.0), [[0.0]], [[2.0]]),
        (Observed(dist.Poisson, 1, rate=2.5), [[0.0]], [[2.5]]),
    ],
    ids=["the mode of indices", "the mode where no mean exists", "the mean"],
)
def test_a_site_without_a_mean_is_reconstructed_by_its_mode(site, data, expected):
    model = LatentModel(x=site, z=Latent(dist.Normal, 1))
    found = model.reconstruct(torch.tensor(data), num_samples=3)["x"]
    assert found.tolist() == expected


def test_an_interpolation_ends_at_the_decoded_codes():
    model, start, end = linear_vae(), torch.randn(3, 4), torch.randn(3, 4)
    path = model.interpolate(start, end, steps=5)["x"]
    assert path.shape == (5, 3, 4)
    first = affine(model, "x", affine(model, "z", start)).detach()
    last = affine(model, "x", affine(model, "z", end)).detach()
    torch.testing.assert_close(path[0], first)
    torch.testing.assert_close(path[-1], last)
    torch.testing.assert_close(path[2], (first + last) / 2)  # the decoder is affine


def test_an_interpolation_is_as_precise_as_its_model():
    """A third is no number of float32: float64 knows more of its digits."""
    model = linear_vae().double()
    start, end = torch.randn(2, 3, 4, dtype=torch.float64)
    path = model.interpolate(start, end, steps=4)["x"]
    thirds = path[0] + torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1) / 3 * (
        path[-1] - path[0]
    )
    torch.testing.assert_close(path, thirds, rtol=0, atol=1e-12)


def test_an_interpolation_of_a_deep_model_has_every_observed_site():
    model = deep()
    path = model.interpolate(deep_data(), deep_data(), steps=4)
    assert {name: value.shape for name, value in path.items()} == {
        "x": (4, 5, 1, 3, 3),
        "w": (4, 5),
    }


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, x: m.prior_predictive(0), "`num_samples` must be at least 1, got 0"),
        (lambda m, x: m.posterior(x, 0), "`num_samples` must be at least 1, got 0"),
        (lambda m, x: m.reconstruct(x, -1), "`num_samples` must be at least 1, got -1"),
        (lambda m, x: m.interpolate(x, x, 1), "`steps` must be at least 2, both ends .*, got 1"),
        (
            lambda m, x: m.interpolate(x[:1], x),
            "`start` and `end` need as many data as each other, got 1 and 3",
        ),
        (lambda m, x: m.posterior(x[:, :2]), r"must have shape \(N, 4\), got \(3, 2\)"),
        (
            lambda m, x: m.draw(x, 2, "posterior"),
            "`proposal` must be one of 'guide', 'prior', 'defensive', got",
        ),
        (lambda m, x: m.draw(x, 0), "`num_particles` must be at least 1, got 0"),
    ],
)
def test_sampling_says_what_it_needs(use, message):
    with pytest.raises(ValueError, match=message):
        use(linear_vae(), torch.randn(3, 4))


def test_sampling_changes_nothing_and_keeps_no_graph():
    model, x = linear_vae(), torch.randn(3, 4)
    model.module_of("x").eval()  # modes of parts are kept, too
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = [
        model.prior_predictive(3),
        model.posterior(x, 2),
        model.encode(x),
        model.reconstruct(x, 2),
        model.interpolate(x, x, 3),
    ]
    assert not any(value.requires_grad for result in results for value in result.values())
    assert model.training
    assert not model.module_of("x").training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_prior_as_a_proposal_leaves_the_likelihood_as_the_weight():
    model = LatentModel(
        c=Latent(dist.Categorical, 2),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Normal, 4, given=("z", "c"), net=Linear(), scale=Learned(0.5)),
    )
    x = torch.randn(3, 4)
    particles = model.draw(x, 5, proposal="prior")
    z, net = particles.values["z"], model.module_of("x").nets["net"]
    parts = [dist.Normal(net(z, torch.tensor(c))["loc"], 0.5).log_prob(x).sum(-1) for c in range(2)]
    likelihood = torch.stack(parts).logsumexp(0) - torch.tensor(2.0).log()
    assert z.shape == (5, 3, 2)
    torch.testing.assert_close(particles.log_weights, likelihood)


# ------------------------------------------------------------------------------ columns


def test_columns_give_batches_in_the_form_they_came():
    x, y = torch.randn(6, 2), torch.arange(6.0)
    index = torch.tensor([3, 1])
    assert torch.equal(Columns(x).batch(index), x[index])
    assert torch.equal(Columns(x).rows(slice(1, 3)), x[1:3])
    named = Columns({"x": x, "y": y})
    assert torch.equal(named.batch(index)["y"], y[index])
    assert torch.equal(named.rows(slice(1, 3))["x"], x[1:3])
    assert len(named) == 6
    assert torch.equal(named.main.values, x)


def test_columns_are_known_by_their_content():
    x, y = torch.randn(6, 2), torch.arange(6.0)
    assert Columns({"x": x, "y": y}).fingerprint() == Columns({"x": x, "y": y}).fingerprint()
    assert Columns({"x": x, "y": y}).fingerprint() != Columns({"x": x, "y": y + 1}).fingerprint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, r"as many rows as each other, got \{'x': 3,"),
        ({"x": torch.zeros(0, 2)}, r"must have shape \(N, \*event\) with N >= 1, got \(0, 2\)"),
        ({"x": torch.tensor([1.0, float("nan")])}, "NaN"),
    ],
)
def test_columns_that_are_no_data_say_so(data, message):
    with pytest.raises(ValueError, match=message):
        Columns(data)


def test_decode_gives_the_means_at_latents_of_ones_choosing():
    model = LatentModel(
        z=Latent(dist.Normal, 2), x=Observed(dist.Normal, 5, given="z", net=Linear(), scale=0.1)
    )
    grid = torch.cartesian_prod(torch.linspace(-2, 2, 3), torch.linspace(-2, 2, 3))
    weight, bias = model.module_of("x").nets.parameters()
    torch.testing.assert_close(model.decode({"z": grid})["x"], (grid @ weight.T + bias).detach())


def test_latents_left_out_are_drawn_from_the_prior():
    model = LatentModel(
        c=Latent(dist.Categorical, 2, probs=[0.25, 0.75]),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Normal, 1, given=("z", "c"), net=Linear(), scale=0.1),
    )
    z = torch.zeros(4000, 2)
    means = model.decode({"z": z})["x"]
    low, high = (model.decode({"z": z[:1], "c": torch.tensor([c])})["x"] for c in range(2))
    share = ((means - low).abs() > (means - high).abs()).float().mean()
    assert abs(share - 0.75) < 4.5 * (0.75 * 0.25 / 4000) ** 0.5


def pyro_pair() -> PyroPair:
    """Two latents of which the second is discrete, drawn by hand, as many as there are data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            code = pyro.sample("code", dist.Categorical(torch.ones(3)))
            pyro.deterministic("double", 2 * z, event_dim=1)
            loc = z.sum(-1) + code
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    pair = PyroPair(model, guide, name="by hand")
    pair.prepare(torch.zeros(5))
    return pair


def test_a_hand_written_model_decodes_latents_of_ones_choosing():
    found = pyro_pair().decode({"z": torch.ones(3, 2), "code": torch.arange(3)})
    assert found["x"].tolist() == [2.0, 3.0, 4.0]


Z = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (linear_vae, {"zz": Z}, r"'model' has no latent 'zz' to decode; it has z\. .* mean 'z'\?"),
        (linear_vae, {"z": Z, "c": Z}, r"'model' has no latent 'c' to decode; it has z\.$"),
        (deep, {"y": Z}, r"has no latent 'y' to decode; it has c, z\."),
        (linear_vae, {"z": torch.zeros(3, 5)}, r"'z' of 'model' .* \(3, 2\), .* got \(3, 5\)\.$"),
        (linear_vae, {"z": torch.zeros(2)}, r"'z' of 'model' must .* \(2, 2\), .* got \(2,\)\.$"),
        (linear_vae, {"z": torch.tensor(0.0)}, r"must have shape \(1, 2\), .* got \(\)\.$"),
        (deep, {"z": Z, "c": torch.zeros(4)}, r"'c' of 'model' .* \(3,\), .* got \(4,\)\.$"),
        (linear_vae, {}, "needs values of a latent, got none: try `prior_predictive`"),
        (pyro_pair, {"cod": torch.zeros(3)}, r"'by hand' has .* has z, code\. .* mean 'code'\?"),
        (pyro_pair, {"double": Z}, r"'by hand' has no latent 'double' .* it has z, code\."),
        (pyro_pair, {"z": Z.T}, r"'z' of 'by hand' must have shape \(2, 2\), .* got \(2, 3\)\.$"),
    ],
)
def test_decode_says_which_latents_there_are_and_of_which_shapes(make, values, message):
    model = make()
    given = torch.zeros(3) if model.name == "model" and model.given else None
    with pytest.raises(ValueError, match=message):
        model.decode(values, given)
