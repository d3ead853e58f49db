import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed
from pvae.nets import MLP, Conv, Deconv, Linear, Table


def vae(**options) -> LatentModel:
    return LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 4, given="z", net=MLP(5), **options),
        guide={"z": Latent(dist.Normal, 2, given="x", net=MLP(5))},
    )


def conditional_vae() -> LatentModel:
    return LatentModel(
        y=Given(categories=3),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 4, given=("z", "y"), net=MLP(5)),
    )


def mixture_vae() -> LatentModel:
    """A continuous latent guided, a discrete one summed out."""
    return LatentModel(
        c=Latent(dist.Categorical, 3),
        z=Latent(dist.Normal, 2, given="c", net=Table()),
        x=Observed(dist.Bernoulli, 4, given="z", net=MLP(5)),
        guide={"z": Latent(dist.Normal, 2, given="x", net=MLP(5))},
    )


@pytest.fixture
def bits() -> torch.Tensor:
    """Sixty noisy copies of two opposite patterns: what there is to learn."""
    patterns = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    flips = torch.bernoulli(torch.full((60, 4), 0.1))
    return (patterns[torch.randint(2, (60,))] - flips).abs()


# ------------------------------------------------------------------------------ the graph


def test_a_declaration_names_its_sites_by_kind():
    model = conditional_vae()
    assert (model.given, model.latents, model.observed) == (["y"], ["z"], ["x"])
    assert model.summed == []
    assert mixture_vae().summed == ["c"]
    assert mixture_vae().categories == 3


def test_log_p_is_the_sum_over_the_sites_in_the_order_written(bits):
    model = LatentModel(
        a=Latent(dist.Normal, 2),
        b=Latent(dist.Normal, 3, given="a", net=Linear()),
        c=Latent(dist.Gamma, 1, given=("a", "b"), net=MLP(4)),
        x=Observed(dist.Bernoulli, 4, given=("b", "c"), net=MLP(5)),
    )
    trace = poutine.trace(model.model).get_trace(bits)
    assert list(trace.stochastic_nodes) == ["data", "a", "b", "c"]
    value = {name: trace.nodes[name]["value"] for name in ("a", "b", "c")}
    b, c, x = (model.module_of(name).nets["net"] for name in ("b", "c", "x"))
    for_b, for_c = b(value["a"]), c(value["a"], value["b"])
    by_hand = dist.Normal(0, 1).log_prob(value["a"]).sum(-1)
    by_hand += dist.Normal(for_b["loc"], for_b["scale"].exp()).log_prob(value["b"]).sum(-1)
    gamma = dist.Gamma(for_c["concentration"].exp(), for_c["rate"].exp())
    by_hand += gamma.log_prob(value["c"]).sum(-1)
    logits = x(value["b"], value["c"])["logits"]
    by_hand += dist.Bernoulli(logits=logits).log_prob(bits).sum(-1)
    torch.testing.assert_close(trace.log_prob_sum(), by_hand.sum())


def test_a_guide_may_climb_through_latents_in_another_order_than_the_model(bits):
    model = LatentModel(
        z2=Latent(dist.Normal, 2),
        z1=Latent(dist.Normal, 3, given="z2", net=MLP(4)),
        x=Observed(dist.Bernoulli, 4, given="z1", net=MLP(5)),
        guide={
            "z1": Latent(dist.Normal, 3, given="x", net=MLP(5)),
            "z2": Latent(dist.Normal, 2, given=("z1", "x"), net=MLP(4)),
        },
    )
    drawn = model.guide(bits)
    assert {name: value.shape for name, value in drawn.items()} == {"z1": (60, 3), "z2": (60, 2)}


def test_a_model_without_latents_is_a_density(bits):
    model = LatentModel(x=Observed(dist.Bernoulli, 4, logits=Learned(0.0, 4)))
    weights = pvae.log_weights(model, bits, num_particles=2)
    torch.testing.assert_close(weights, torch.full((2, 60), 4.0).mul(-torch.tensor(2.0).log()))


# ------------------------------------------------------------------------------ the default guide


def test_the_default_guide_mirrors_the_decoder_and_reads_all_data():
    model = LatentModel(
        y=Given(categories=3),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 4, given=("z", "y"), net=MLP(20, 10, activation="relu")),
        w=Observed(dist.Normal, 1, given="z", net=Linear()),
    )
    expected = Latent(dist.Normal, 2, given=("x", "w", "y"), net=MLP(10, 20, activation="relu"))
    assert model.guide_sites == {"z": expected}


def test_the_default_guide_of_a_conditional_image_decoder_reads_image_and_label():
    model = LatentModel(
        y=Given(categories=3),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, (1, 8, 8), given=("z", "y"), net=Deconv(8, 4)),
    )
    assert model.guide_sites["z"].given == ("x", "y")
    assert model.guide_sites["z"].net == Conv(4, 8)
    images, labels = torch.rand(5, 1, 8, 8).round(), torch.arange(5) % 3
    assert pvae.log_weights(model, {"x": images, "y": labels}, 4).shape == (4, 5)


def test_the_default_guide_of_an_image_decoder_convolves():
    model = LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, (1, 5, 6), given="z", net=Deconv(8, 4)),
    )
    assert model.guide_sites["z"].net == Conv(4, 8)
    images = torch.rand(3, 1, 5, 6).round()
    assert pvae.log_weights(model, images, num_particles=2).shape == (2, 3)


@pytest.mark.parametrize(
    ("latent", "family"),
    [
        (Latent(dist.Normal, 2), dist.Normal),
        (Latent(dist.StudentT, (2, 2)), dist.Normal),
        (Latent(dist.MultivariateNormal, 2), dist.Normal),
        (Latent(dist.Gamma, 2), dist.Gamma),
        (Latent(dist.LogNormal, 2), dist.LogNormal),
        (Latent(dist.Beta, 2), dist.Beta),
        (Latent(dist.Dirichlet, 3), dist.Dirichlet),
    ],
    ids=lambda value: getattr(value, "title", value),
)
def test_the_default_guide_draws_within_the_support_of_the_prior(latent, family, bits):
    model = LatentModel(z=latent, x=Observed(dist.Bernoulli, 4, given="z", net=MLP(5)))
    assert model.guide_sites["z"].distribution is family
    drawn = model.guide(bits)["z"]
    assert bool(model.module_of("z").prototype.support.check(drawn).all())
    assert bool(pvae.log_weights(model, bits, num_particles=3).isfinite().all())


@pytest.mark.parametrize(
    "latent",
    [Latent(dist.Categorical, 3), Latent(dist.OneHotCategorical, 3), Latent(dist.Bernoulli)],
)
def test_discrete_latents_are_summed_out_by_default(latent, bits):
    model = LatentModel(
        c=latent,
        z=Latent(dist.Normal, 2, given="c", net=MLP(5)),
        x=Observed(dist.Bernoulli, 4, given=("z", "c"), net=MLP(5)),
    )
    assert model.summed == ["c"]
    assert list(model.guide_sites) == ["z"]
    assert pvae.log_weights(model, bits, num_particles=3).shape == (3, 60)


def test_a_latent_without_a_default_guide_asks_for_an_entry(bits):
    sites = {
        "u": Latent(dist.Uniform, 2, low=0.0, high=1.0),
        "x": Observed(dist.Bernoulli, 4, given="u", net=MLP(5)),
    }
    with pytest.raises(ValueError, match=r"Latent 'u' needs an entry in `guide`, as none can be"):
        LatentModel(**sites)
    model = LatentModel(**sites, guide={"u": Latent(dist.Beta, 2, given="x", net=MLP(5))})
    assert bool(pvae.log_weights(model, bits, num_particles=3).isfinite().all())


# ------------------------------------------------------------------------------ Pyro programs


def mean_loss(svi: SVI, data: torch.Tensor, steps: int) -> float:
    return sum(svi.step(data) for _ in range(steps)) / steps / len(data)


@pytest.mark.parametrize(
    ("declare", "objective"),
    [
        (vae, Trace_ELBO()),
        (vae, pvae.IWAE(5)),
        (mixture_vae, TraceEnum_ELBO(max_plate_nesting=1)),
        (mixture_vae, pvae.ELBO()),
        (
            lambda: pvae.models.mixture_of_bernoullis(data_size=4, num_components=2),
            TraceEnum_ELBO(max_plate_nesting=1),
        ),
    ],
)
def test_pyros_own_svi_trains_model_and_guide(declare, objective, bits):
    model = declare()
    before = [parameter.clone() for parameter in model.parameters()]
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.03}), objective)
    first = mean_loss(svi, bits, 5)
    mean_loss(svi, bits, 100)
    assert mean_loss(svi, bits, 5) < first - 0.3  # nats per datum
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    assert len(pyro.get_param_store()) == 0


def test_trace_elbo_and_log_weights_agree_draw_for_draw(bits):
    model = vae()
    torch.manual_seed(3)
    loss = Trace_ELBO().loss(model.model, model.guide, bits)
    weights = pvae.log_weights(model, bits, num_particles=1, seed=3)
    assert float(weights.sum()) == pytest.approx(-loss, rel=1e-5)


def test_pyros_predictive_samples_prior_and_posterior(bits):
    model = vae()
    prior = Predictive(model.model, num_samples=5)(None, 7)
    assert {name: value.shape for name, value in prior.items()} == {"z": (5, 7, 2), "x": (5, 7, 4)}
    posterior = Predictive(model.model, guide=model.guide, num_samples=5, parallel=True)
    assert posterior(bits)["z"].shape == (5, 60, 2)
    assert len(pyro.get_param_store()) == 0


def test_model_and_guide_can_be_overridden_in_a_subclass(bits):
    class Warm(LatentModel):
        """The prior's factor at half strength."""

        def model(self, batch=None, num_data=1):
            with poutine.scale(scale=0.5):
                return super().model(batch, num_data)

    sites = {"x": Observed(dist.Bernoulli, 4, logits=Learned(0.0, 4))}
    loss = Trace_ELBO().loss(Warm(**sites).model, Warm(**sites).guide, bits)
    assert loss == pytest.approx(60 * 2 * 0.6931472)
    fit = pvae.fit(Warm(**sites), bits, epochs=2, device="cpu", progress=False)
    assert fit.history["train"].notna().all()


def test_two_models_side_by_side_do_not_meet(bits):
    trained, other = vae(), vae()
    other.load_state_dict(trained.state_dict())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    svi = SVI(trained.model, trained.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(bits)
    pvae.fit(trained, bits, epochs=1, device="cpu", progress=False)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, trained.state_dict()[name])


def test_declaring_again_starts_afresh(bits):
    torch.manual_seed(1)
    first = vae()
    start = {name: value.clone() for name, value in first.state_dict().items()}
    SVI(first.model, first.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(bits)
    torch.manual_seed(1)
    for name, value in vae().state_dict().items():
        assert torch.equal(value, start[name])


@pytest.mark.parametrize("of_model", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_data", [torch.float32, torch.float64])
def test_data_are_read_in_the_precision_of_the_model(of_model, of_data, bits):
    model = vae().to(of_model)
    data = bits.to(of_data).numpy()  # NumPy's own precision is double
    assert pvae.log_weights(model, data).dtype == of_model
    history = pvae.fit(model, data, epochs=1, device="cpu", progress=False).history
    assert history["train"].notna().all()


# ------------------------------------------------------------------------------ data


def test_data_come_by_name_or_alone(bits):
    model = vae()
    for data in (bits, bits.numpy(), {"x": bits}, bits.tolist()):
        assert len(model.columns(data)) == 60
    labels = torch.randint(3, (60,))
    assert len(conditional_vae().columns({"x": bits, "y": labels})) == 60


def test_grey_levels_under_a_bernoulli_are_an_error_unless_asked_for():
    grey = torch.tensor([[0.0, 1, 1, 0], [0.25, 1, 1, 0.5]])
    message = (
        r"Datum 1 lies outside the support .* of 'x' \(Bernoulli\): its values run from 0\.25 to "
        r"1\. These look like grey levels, .* binarise them .*binarisation='dynamic'.*"
        r"declare a density \(Normal, Beta, ContinuousBernoulli\).*check_support=False"
    )
    for use in (pvae.fit, pvae.evaluate, pvae.log_weights, LatentModel.reconstruct):
        with pytest.raises(ValueError, match=message):
            use(vae(), grey)
    weights = pvae.log_weights(vae(check_support=False), grey, num_particles=3)
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("binarisation", ["dynamic", "threshold"])
def test_a_density_of_bits_is_warned_of(binarisation):
    bits = pvae.load_data("digits", binarisation=binarisation).test
    grey = pvae.load_data("digits", dequantisation="uniform").test
    model = pvae.models.gaussian_vae(64, latent_size=2, hidden=(4,))
    with pytest.warns(UserWarning, match="'digits' is binary, and Normal a density"):
        model.columns(bits)
    model.columns(grey)
    pvae.models.count_vae(64, latent_size=2, hidden=(4,)).columns(bits)


def test_labels_of_data_are_named_where_a_model_takes_them():
    digits = pvae.load_data("digits").test
    model = pvae.models.conditional_vae(64, latent_size=2, hidden=(4,))
    with pytest.raises(ValueError, match=r"with x, y\. Labels of data are `data\.labels`\."):
        model.columns(digits)
    labels = digits.labels.float().masked_fill(digits.labels == 0, torch.nan)
    with pytest.raises(ValueError, match=r"Column 'y': Data 'tensor' has NaN"):
        model.columns({"x": digits, "y": labels})


@pytest.mark.parametrize(
    ("site", "data", "message"),
    [
        (
            Observed(dist.Bernoulli, 2),
            [[0.0, 2.0]],
            r"Datum 0 .* run from 0 to 2\. These look like grey",
        ),
        (Observed(dist.Poisson, 2), [[1.0, 2], [1, 0.5]], r"Datum 1 .* \(Poisson\)"),
        (Observed(dist.Gamma, 2), [[1.0, -2.0]], r"Datum 0 .* \(Gamma\).* from -2 to 1\.$"),
        (Observed(dist.Beta, 2), [[0.5, 1.5]], r"Datum 0 .* \(Beta\)"),
        (Observed(dist.Categorical, 3), [0, 1, 3], r"Datum 2 .* \(Categorical\)"),
        (Observed(dist.Dirichlet, 2), [[0.5, 0.6]], r"Datum 0 .* \(Dirichlet\)"),
    ],
)
def test_values_outside_any_support_name_the_datum_and_the_site(site, data, message):
    with pytest.raises(ValueError, match=message):
        pvae.log_weights(LatentModel(x=site), data)


def test_the_datum_outside_is_found_beyond_the_first_block():
    data = torch.zeros(10_000, 1)
    data[9_000] = 0.5
    with pytest.raises(ValueError, match=r"Datum 9000 lies outside"):
        LatentModel(x=Observed(dist.Bernoulli, 1)).columns(data)


@pytest.mark.parametrize(
    ("declare", "data", "message"),
    [
        (
            vae,
            torch.zeros(3, 5),
            r"Data for 'x' of 'model' must have shape \(N, 4\), got \(3, 5\)\.$",
        ),
        (
            vae,
            torch.zeros(3, 2, 2),
            r"must have shape \(N, 4\), got \(3, 2, 2\)\. Reshape each datum first",
        ),
        (vae, {"y": torch.zeros(3, 4)}, r"'model' needs data for x, got y\."),
        (vae, {}, r"'model' needs data for x, got nothing\."),
        (
            conditional_vae,
            torch.zeros(3, 4),
            r"'model' needs several columns of data: pass a dictionary with x, y\.",
        ),
        (conditional_vae, {"x": torch.zeros(3, 4)}, r"'model' needs data for x, y, got x\."),
        (
            conditional_vae,
            {"x": torch.zeros(3, 4), "y": torch.zeros(2)},
            r"All columns of data need as many rows as each other, got \{'x': 3, 'y': 2\}",
        ),
        (
            conditional_vae,
            {"x": torch.zeros(3, 4), "y": torch.tensor([0, 1, 3])},
            r"Datum 2 lies outside the support .* of 'y' \(Given\)",
        ),
    ],
)
def test_columns_that_do_not_fit_say_what_is_needed(declare, data, message):
    with pytest.raises(ValueError, match=message):
        declare().columns(data)


# ------------------------------------------------------------------------------ errors

Z, TWO = Latent(dist.Normal, 2), Latent(dist.Normal, 2, given="z", net=MLP(3))
X = Observed(dist.Bernoulli, 4, given="z", net=MLP(3))


def given(parent: str) -> Latent:
    return Latent(dist.Normal, 2, given=parent, net=MLP(3))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"latent": Z, "x": Observed(dist.Bernoulli, 4, given="laten", net=MLP(3))},
            r"The site 'x' is given 'laten', which is unknown here\. Known: latent, x\. Did you "
            r"mean 'latent'\?",
        ),
        (
            {"z": given("y"), "y": given("z"), "x": X},
            r"Each site must follow its parents, got a cycle: z -> y -> z",
        ),
        ({"z": given("z"), "x": X}, r"got a cycle: z -> z"),
        (
            {"x": X, "z": Z},
            r"The site 'x' is given 'z', which is declared after it: write 'z' first\.",
        ),
        ({"z": Z}, r"A model needs an observed site: x=Observed\(\.\.\.\)"),
        ({"type": Z, "x": Observed(dist.Normal)}, r"torch keeps the name 'type' for itself"),
        (
            {"z": Z, "x": X, "guide": {"zz": given("x")}},
            r"entry for 'zz', which is no site of the model \(z, x\)\. Did you mean 'z'\?",
        ),
        (
            {"z": Z, "x": X, "guide": {"z": given("x"), "x": given("z")}},
            r"entry for 'x', which is not latent but Observed: remove the entry",
        ),
        (
            {"y": Given(1), "z": Z, "x": X, "guide": {"y": given("x")}},
            r"entry for 'y', which is not latent but Given",
        ),
        (
            {"z": Z, "x": X, "guide": {"z": given("q")}},
            r"The guide entry 'z' is given 'q', which is unknown here\. Known: x, z\.",
        ),
        (
            {"z": Z, "y": TWO, "x": X, "guide": {"z": given("y"), "y": given("z")}},
            r"Each guide entry must follow its parents, got a cycle: z -> y -> z",
        ),
        (
            {"z": Z, "y": TWO, "x": X, "guide": {"z": given("y"), "y": given("x")}},
            r"The guide entry 'z' is given 'y', which is declared after it",
        ),
        (
            {"z": Z, "x": X, "guide": {"z": Latent(dist.Normal, 3, given="x", net=MLP(3))}},
            r"Guide entry 'z' draws values of shape \(3,\), but the model's site has shape \(2,\)",
        ),
        (
            {"z": Z, "x": X, "guide": {}},
            r"Latent 'z' \(Normal, event shape \(2,\)\) is neither guided nor summable .*: give it "
            r"an entry in `guide`",
        ),
        (
            {"z": Latent(dist.Poisson), "x": X},
            r"Latent 'z' \(Poisson, event shape \(\)\) is neither guided nor summable",
        ),
        (
            {"z": Latent(dist.Bernoulli, 3), "x": X},
            r"Latent 'z' \(Bernoulli, event shape \(3,\)\) is neither guided nor summable",
        ),
        (
            {"z": Z, "x": Observed(dist.Bernoulli, 4, given="z", net=Deconv(3))},
            r"Site 'x': Deconv needs the parameter 'logits' of shape \(channels, height, width\)",
        ),
        ({"y": Given("a"), "x": Observed(dist.Normal)}, r"y needs a shape of positive whole"),
    ],
)
def test_a_declaration_that_cannot_be_says_why(sites, message):
    with pytest.raises(ValueError, match=message):
        LatentModel(**sites)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"z": dist.Normal, "x": X}, r"Site 'z' must be Latent, Observed or Given, got <class"),
        ({"z": Z, "x": X, "guide": {"z": X}}, r"Guide entry 'z' must be a Latent, got Observed"),
    ],
)
def test_what_is_no_site_says_so(sites, message):
    with pytest.raises(TypeError, match=message):
        LatentModel(**sites)


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program `dot` of Graphviz")
def test_a_drawing_is_written_beside_a_folder_of_the_same_name(tmp_path):
    (tmp_path / "vae").mkdir()
    pvae.models.vae(6, 2, (4,)).render(str(tmp_path / "vae.svg"))
    assert "<svg" in (tmp_path / "vae.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae", "vae.svg"]
