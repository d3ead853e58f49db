"""Labels seen for some data, and summed out for the others; a hundred of them classify digits."""

from itertools import product

import pyro
import pytest
import torch

import pvae
from pvae import exact, models

NAN = float("nan")


def small() -> pvae.LatentModel:
    return models.semi_supervised_vae(4, categories=3, latent_size=1, hidden=(5,)).double()


def every_image() -> torch.Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=4)), dtype=torch.float64)


def test_it_is_a_distribution_over_images_and_labels_together():
    """p(x, y) of all pairs sums to one, and log p(x) is the log of its sum over y."""
    model, x = small(), every_image()
    joint = torch.stack(
        [exact.log_prob(model, {"x": x, "y": torch.full((16,), float(y))}) for y in range(3)]
    )
    assert joint.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert (joint[0] - joint[1]).abs().max() > 0.01, "the label matters"
    marginal = exact.log_prob(model, {"x": x, "y": torch.full((16,), NAN)})
    torch.testing.assert_close(marginal, joint.logsumexp(0), rtol=0, atol=1e-3)


def test_a_label_that_is_missing_has_the_probabilities_of_bayes_rule():
    model, x = small(), every_image()
    labels = [torch.full((16,), float(y)) for y in range(3)]
    joint = torch.stack([exact.log_prob(model, {"x": x, "y": y}) for y in labels])
    expected = joint.softmax(0).T
    data = {"x": x, "y": torch.full((16,), NAN)}
    how = {"proposal": "prior"}  # of bounded weights, where an untrained guide is too narrow
    runs = [pvae.impute(model, data, 1000, 100, seed=seed, **how) for seed in range(20)]
    found = torch.stack([run.probabilities["y"] for run in runs])
    drawn = torch.stack([(run.draws["y"] == 1).double().mean(0) for run in runs])
    for values, exactly in ((found, expected), (drawn, expected[:, 1])):
        error = values.std(0) / len(values) ** 0.5
        assert bool(((values.mean(0) - exactly).abs() < 4.5 * error + 2e-4).all())
        assert float(error.max()) < 0.02
    assert torch.equal(runs[0].mean["y"].long(), runs[0].probabilities["y"].argmax(1))


def test_a_hundred_labels_and_other_digits_beat_a_hundred_labels():
    """Against logistic regression on the same hundred. Labelled digits are repeated, so that about
    as many come with a label as without: without it the likelihood of x alone decides what y is.
    """
    from sklearn.linear_model import LogisticRegression

    train, _, test = pvae.load_data("digits", binarisation="threshold")
    known = torch.cat([(train.labels == digit).nonzero()[:10, 0] for digit in range(10)])
    x, y = train.values[known], train.labels[known]
    data = {
        "x": torch.cat([train.values, x.repeat(10, 1)]),
        "y": torch.cat([torch.full((len(train),), NAN), y.float().repeat(10)]),
    }
    pyro.set_rng_seed(0)
    model = models.semi_supervised_vae(64, latent_size=4, hidden=(64,))
    settings = {"epochs": 20, "batch_size": 100, "lr": 5e-3, "device": "cpu", "progress": False}
    pvae.fit(model, data, **settings)
    unknown = {"x": test.values, "y": torch.full((len(test),), NAN)}
    found = pvae.impute(model, unknown, 30, 1).mean["y"]
    right = float((found == test.labels).float().mean())
    logistic = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy())
    assert right > logistic.score(test.values.numpy(), test.labels.numpy())
