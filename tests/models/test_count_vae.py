"""Counts: scipy's log-probabilities, and when a Poisson is too narrow."""

import math

import pyro
import pytest
import torch
from scipy import stats
from torch import Tensor

import pvae
from pvae import LatentModel, models

BOTH = pytest.mark.parametrize("counts", ["poisson", "negative binomial"])


def parts(model: LatentModel, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean of x given z, and r; with logits l, the mean is r exp(l)."""
    site = model.module_of("x")
    out = {name: value.detach() for name, value in site.nets["net"](z).items()}
    if "rate" in out:
        return out["rate"].exp(), None
    r = site.learned["total_count"].detach().exp()
    return r * out["logits"].exp(), r


@BOTH
def test_the_likelihood_is_that_of_scipy(counts):
    model = models.count_vae(4, 2, hidden=(5,), counts=counts).double()
    z = torch.randn(6, 2, dtype=torch.float64)
    x = torch.randint(9, (6, 4)).double()
    mean, r = parts(model, z)
    found = model.module_of("x")({"z": z})
    if r is None:
        truth = stats.poisson(mean.numpy())
    else:
        truth = stats.nbinom(r.numpy(), (r / (r + mean)).numpy())
        torch.testing.assert_close(found.variance, mean + mean**2 / r)
    torch.testing.assert_close(found.log_prob(x), torch.tensor(truth.logpmf(x)).sum(-1))
    torch.testing.assert_close(found.mean, mean)


def test_a_large_r_is_the_poisson():
    z, x = torch.randn(6, 2, dtype=torch.float64), torch.randint(9, (6, 4)).double()
    model = models.count_vae(4, 2, hidden=(5,)).double()
    model.module_of("x").assign("total_count", torch.full((4,), 1e7, dtype=torch.float64))
    logits = model.module_of("x").nets["net"].body[-1]
    with torch.no_grad():
        logits.bias.fill_(math.log(3.0 / 1e7))
    mean, _ = parts(model, z)
    truth = torch.tensor(stats.poisson(mean.numpy()).logpmf(x)).sum(-1)
    torch.testing.assert_close(model.module_of("x")({"z": z}).log_prob(x), truth, rtol=0, atol=1e-4)


def score(counts: str, data: Tensor) -> Tensor:
    """Bounds of the last 200 data, of a model fitted to the others."""
    pyro.set_rng_seed(0)
    model = models.count_vae(data.shape[1], 1, hidden=(10,), counts=counts).double()
    settings = {"epochs": 25, "batch_size": 50, "lr": 2e-2, "device": "cpu", "progress": False}
    pvae.fit(model, data[:-200], **settings)
    return pvae.bounds.iwae(pvae.log_weights(model, data[-200:], num_particles=200))


def test_overdispersed_counts_need_the_negative_binomial():
    """Each x a draw of NB(r = 2, mean 10): a Poisson lets z say what is noise, and cannot."""
    r, mean = 2.0, 10.0
    x = stats.nbinom(r, r / (r + mean)).rvs((1200, 6), random_state=0)
    truth = torch.tensor(stats.nbinom(r, r / (r + mean)).logpmf(x[-200:])).sum(-1)
    poisson, negative_binomial = (
        score(counts, torch.tensor(x).double()) for counts in ("poisson", "negative binomial")
    )
    lost = truth - negative_binomial
    assert -4.5 * lost.std() / 200**0.5 < lost.mean() < 0.2
    gained = negative_binomial - poisson
    assert gained.mean() > 4.5 * gained.std() / 200**0.5


def test_large_counts_do_not_saturate_the_guide():
    """A datum ten times as large has another code: read as it is, it moves that by 0.02."""
    moved = []
    for _ in range(20):
        model = models.count_vae(8, 2)
        x = torch.randint(500, 1000, (5, 8)).float()
        moved.append((model.encode(x)["z"] - model.encode(10 * x)["z"]).abs().mean())
    assert torch.stack(moved).mean() > 0.04


def test_an_unknown_kind_of_counts_names_the_known_ones():
    message = "`counts` must be one of poisson, negative binomial; got 'binomial'"
    with pytest.raises(ValueError, match=message):
        models.count_vae(counts="binomial")
