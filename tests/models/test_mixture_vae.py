"""p(x) and p(c | z) by hand, and clusters that were put into the data."""

import torch
from scipy import stats
from torch import Tensor

import pvae
from pvae import LatentModel
from tests.fitting import binary, fit


def tiny() -> LatentModel:
    """Of one latent dimension, its components apart from each other."""
    model = pvae.models.mixture_vae(data_size=6, latent_size=1, hidden=(5,), num_components=3)
    model.double()
    model.module_of("c").assign("logits", torch.tensor([0.2, 0.3, 0.5]).double().log())
    model.module_of("z").assign("loc", torch.tensor([[-2.0], [0.0], [3.0]]).double())
    model.module_of("z").assign("scale", torch.tensor([[0.5], [1.0], [0.3]]).double())
    return model


def log_joint(z: Tensor) -> Tensor:
    """log pi_c N(z; mu_c, sigma_c^2) by SciPy, (3, *z)."""
    numbers = zip([0.2, 0.3, 0.5], [-2.0, 0.0, 3.0], [0.5, 1.0, 0.3], strict=True)
    return torch.stack([torch.tensor(pi * stats.norm(m, s).pdf(z)) for pi, m, s in numbers]).log()


def test_log_p_is_the_integral_over_z_of_the_sum_over_c():
    model, x = tiny(), binary().double()
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    logits = model.module_of("x").nets["net"](z.unsqueeze(-1))["logits"].detach()
    log_lik = (logits.sigmoid().log() @ x.T) + ((-logits).sigmoid().log() @ (1 - x).T)
    expected = (log_joint(z).logsumexp(0).unsqueeze(1) + log_lik).logsumexp(0) + torch.log(
        z[1] - z[0]
    )
    torch.testing.assert_close(pvae.exact.log_prob(model, x), expected, rtol=0, atol=1e-3)


def test_responsibilities_are_bayes_rule_on_z_alone():
    model, x = tiny(), binary().double()
    particles = model.draw(x, 4)
    joint = log_joint(particles.values["z"].detach().squeeze(-1))
    expected = (joint - joint.logsumexp(0)).exp()
    torch.testing.assert_close(particles.log_responsibilities().exp(), expected)


def test_draws_from_the_prior_have_its_density():
    drawn = tiny().prior_predictive(20_000)
    z, c = drawn["z"].squeeze(-1), drawn["c"]
    q = torch.tensor(stats.norm(2.0, 0.8).pdf(z))
    ratio = q / log_joint(z).exp().sum(0)  # of mean one where the density is right
    error = float(ratio.std()) / 20_000**0.5
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1) < 4.5 * error
    counts = torch.bincount(c, minlength=3)
    assert stats.chisquare(counts, torch.tensor([4000, 6000, 10_000])).pvalue > 1e-5


def test_it_finds_clusters_that_were_put_in():
    patterns = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0]])
    patterns = torch.cat([patterns, 1 - patterns.sum(0, keepdim=True)])
    truth = torch.arange(300) % 3
    x = (patterns[truth] - torch.bernoulli(torch.full((300, 9), 0.05))).abs()
    model = pvae.models.mixture_vae(data_size=9, latent_size=2, hidden=(20,), num_components=3)
    fit(model, x, steps=199, batch_size=300, lr=0.03)
    found = model.posterior(x, 25)["c"].mode(0).values
    table = torch.bincount(3 * truth + found, minlength=9).reshape(3, 3)
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2]
    assert int(table.amax(1).sum()) >= 255
