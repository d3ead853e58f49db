"""Deterministic autoencoders against scikit-learn's PCA, which the linear ones must equal."""

import math

import numpy as np
import pytest
import torch
from sklearn import decomposition
from torch import Tensor

import pvae
from pvae.baselines import Autoencoder, fit_autoencoder, fit_pca
from pvae.data import Data, load_data
from pvae.nets import MLP, Conv, Linear

Q = 5


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", dequantisation="uniform")


@pytest.fixture(scope="module")
def x(digits) -> Tensor:
    return digits.train.realised().values.double()


@pytest.fixture(scope="module")
def pca(x) -> Autoencoder:
    return fit_pca(x, Q)


@pytest.fixture(scope="module")
def peer(x) -> decomposition.PCA:
    return decomposition.PCA(Q, svd_solver="full").fit(x.numpy())


def quickly(x: Tensor, latent_size: int = 1, **settings) -> Autoencoder:
    settings = {"epochs": 2, "net": MLP(8), "device": "cpu", "progress": False} | settings
    return fit_autoencoder(x, latent_size, **settings)


def squared_error(autoencoder: Autoencoder, x: Tensor) -> float:
    return float((x - autoencoder.reconstruct(x)["x"]).square().flatten(1).sum(1).mean())


# ------------------------------------------------------------------------------ PCA


def test_codes_of_pca_are_scikit_learns_up_to_sign(x, pca, peer):
    expected = torch.from_numpy(peer.transform(x.numpy()))
    torch.testing.assert_close(pca.encode(x)["z"].abs(), expected.abs(), rtol=0, atol=1e-9)


def test_reconstructions_of_pca_are_scikit_learns(x, pca, peer):
    expected = torch.from_numpy(peer.inverse_transform(peer.transform(x.numpy())))
    torch.testing.assert_close(pca.reconstruct(x)["x"], expected, rtol=0, atol=1e-9)
    z = torch.randn(7, Q).double()
    expected = torch.from_numpy(peer.inverse_transform(z.numpy() * signs(pca, peer)))
    torch.testing.assert_close(pca.decode({"z": z})["x"], expected, rtol=0, atol=1e-9)


def signs(pca: Autoencoder, peer: decomposition.PCA) -> np.ndarray:
    codes = pca.encode(torch.from_numpy(peer.mean_ + peer.components_))["z"]
    return codes.diagonal().sign().numpy()


def test_what_pca_loses_is_the_variance_of_the_other_components(x, pca):
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0))
    assert squared_error(pca, x) == pytest.approx(float(eigenvalues[:-Q].sum()))


def test_the_largest_element_of_each_component_is_positive(pca):
    U = next(iter(pca.decoder.parameters()))
    assert (U.amax(dim=0) == U.abs().amax(dim=0)).all()


def test_all_components_reconstruct_exactly(x):
    whole = fit_pca(x, 64)
    torch.testing.assert_close(whole.reconstruct(x)["x"], x, rtol=0, atol=1e-9)


def test_between_two_data_pca_draws_the_straight_line_of_their_reconstructions(x, pca):
    line = pca.interpolate(x[:3], x[3:6], steps=4)["x"]
    first, last = pca.reconstruct(x[:3])["x"], pca.reconstruct(x[3:6])["x"]
    expected = torch.stack([first + (last - first) * t / 3 for t in range(4)])
    torch.testing.assert_close(line, expected, rtol=0, atol=1e-9)


def test_pca_takes_data_and_images_in_their_own_type_and_shape(digits):
    images = digits.train.realised().values.reshape(-1, 8, 8)
    from_data, from_images = fit_pca(digits.train, Q), fit_pca(images.numpy(), Q)
    assert from_images.reconstruct(images)["x"].shape == images.shape
    code = from_data.encode(digits.train)["z"]
    assert torch.equal(from_images.encode(images)["z"], code)
    assert code.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "latent_size", "message"),
    [
        (torch.randn(9, 4), 0, "at least 1 and at most the 4 elements of a datum, got 0"),
        (torch.randn(9, 4), 5, "at least 1 and at most the 4 elements of a datum, got 5"),
        (torch.randn(1, 4), 2, "PCA needs at least 2 data, got 1"),
        (torch.full((3, 4), torch.nan), 2, "has NaN or infinite values in 3 of 3 rows"),
    ],
)
def test_bad_input_of_pca_is_refused(data, latent_size, message):
    with pytest.raises(ValueError, match=message):
        fit_pca(data, latent_size)


def test_data_with_missing_entries_are_refused():
    whole = torch.randn(30, 4)
    data = Data.of(whole).masked(whole < 1)
    message = r"Data 'tensor' have missing entries \(NaN\), and baselines take none: fill them in"
    for ask in (
        lambda: fit_pca(data, 1),
        lambda: quickly(data),
        lambda: quickly(whole, validation=data),
        lambda: fit_pca(whole, 1).encode(data),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


# ------------------------------------------------------------------------------ by gradient steps


def test_a_linear_autoencoder_ends_as_well_as_pca():
    """Bourlard & Kamp 1988: no other linear map does better than the leading components."""
    x = torch.randn(400, 6) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]))
    fitted = quickly(x, 2, net=Linear(), epochs=200, lr=0.03, batch_size=400)
    assert squared_error(fitted, x) == pytest.approx(squared_error(fit_pca(x, 2), x), rel=1e-3)


def test_a_deep_one_follows_a_curve_that_pca_cannot():
    t = torch.linspace(-1.5, 1.5, 300)
    x = torch.stack([t.sin(), t.cos()], dim=1) * 2
    fitted = quickly(x, net=MLP(16), epochs=300, lr=0.01, batch_size=300)
    assert squared_error(fitted, x) < squared_error(fit_pca(x, 1), x) / 10


def test_the_history_is_the_squared_error(x):
    train, valid = x[:200], x[200:300]
    fitted = quickly(train, 3, epochs=3, validation=valid)
    assert list(fitted.history) == ["step", "train", "valid"]
    best = fitted.history["valid"].min()
    assert squared_error(fitted, valid) == pytest.approx(best, rel=1e-9)
    one = quickly(train, 3, epochs=1, batch_size=200, lr=0.0)  # as it began
    assert squared_error(one, train) == pytest.approx(one.history["train"].iloc[0], rel=1e-9)


def test_seeds_reproduce_and_the_callers_random_state_is_untouched(x):
    before = torch.get_rng_state()
    first, again, other = (quickly(x[:100], seed=seed) for seed in (1, 1, 2))
    code = first.encode(x)["z"]
    assert torch.equal(again.encode(x)["z"], code)
    assert not torch.equal(other.encode(x)["z"], code)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_deterministic_and_trains_in_the_type_of_the_data(x):
    fitted = quickly(x[:100])
    assert fitted.encode(x)["z"].dtype == torch.float64
    first, second = (fitted.reconstruct(x[:10])["x"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_codes_and_their_reconstructions_have_the_shapes_of_a_models(x):
    images = x[:40].float().reshape(-1, 1, 8, 8)
    fitted = quickly(images, 3, net=Conv(4, 8))
    assert fitted.encode(images)["z"].shape == (40, 3)
    assert fitted.decode({"z": torch.zeros(7, 3)})["x"].shape == (7, 1, 8, 8)
    assert fitted.reconstruct(images)["x"].shape == (40, 1, 8, 8)
    line = fitted.interpolate(images[:5], images[5:10], steps=4)["x"]
    assert line.shape == (4, 5, 1, 8, 8)
    ends = torch.cat([fitted.reconstruct(images[:5])["x"], fitted.reconstruct(images[5:10])["x"]])
    torch.testing.assert_close(line[[0, -1]].flatten(0, 1), ends)


def test_dynamic_bits_are_drawn_anew_for_each_batch():
    data = load_data("digits", binarisation="dynamic").train.subset(slice(0, 50))
    epochs = quickly(data, epochs=2, batch_size=50, lr=0.0).history["train"]
    assert epochs.iloc[0] != epochs.iloc[1]
    once = quickly(data.realised(), epochs=2, batch_size=50, lr=0.0).history["train"]
    assert math.isclose(once.iloc[0], once.iloc[1], rel_tol=1e-6)


# ------------------------------------------------------------------------------ what it has not


@pytest.mark.parametrize(
    "ask",
    [pvae.evaluate, pvae.ais, lambda model, _: pvae.sandwich(model)],
    ids=["evaluate", "ais", "sandwich"],
)
def test_a_deterministic_autoencoder_has_no_p_of_x(ask, x, pca):
    message = (
        r"'pca' is a deterministic autoencoder: .* so it has no p\(x\), and neither log p\(x\)"
    )
    with pytest.raises(TypeError, match=message):
        ask(pca, x)


def test_the_error_names_models_that_have_one(pca):
    with pytest.raises(TypeError, match=r"pvae.fit_ppca instead of PCA, pvae.models.gaussian_vae"):
        _ = pca.model


def test_tables_can_say_why_there_is_no_log_p(pca):
    assert pca.why_no_log_p == "deterministic: no p(x)"


def test_data_and_codes_that_do_not_fit_are_refused(x, pca):
    with pytest.raises(ValueError, match=r"'pca' must have shape \(N, 64\), got \(2, 8, 8\)"):
        pca.encode(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"Codes of 'pca' must have shape \(S, 5\), got \(2, 4\)"):
        pca.decode({"z": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="`steps` must be at least 2, both ends included, got 1"):
        pca.interpolate(x[:2], x[:2], steps=1)
    with pytest.raises(ValueError, match="as many data as each other, got 2 and 3"):
        pca.interpolate(x[:2], x[:3])


def test_a_comparison_shows_it_last_and_says_why_it_has_no_log_p(digits, pca):
    ppca = pvae.evaluate(pvae.fit_ppca(digits.train, Q).to_model(), digits.test, num_particles=10)
    table = pvae.compare({"PCA": pca, "PPCA": ppca}).table
    assert list(table.index) == ["PPCA", "PCA"]
    assert table["what it is"]["PCA"] == "deterministic: no p(x)"
    assert math.isnan(table["log p(x)"]["PCA"])
    with pytest.raises(ValueError, match="at least one evaluation: none of these has a p"):
        pvae.compare({"PCA": pca})
