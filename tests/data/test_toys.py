"""Toys: their densities against formulas and integrals of SciPy's, and their draws against both."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pvae.data import TOYS, load_data
from pvae.data.spec import local_generator

PLANE = ("ring", "two-moons", "pinwheel")
MOONS = (
    lambda t: np.array([math.cos(t), math.sin(t)]),
    lambda t: np.array([1 - math.cos(t), 0.5 - math.sin(t)]),
)


def grid(half: float, num: int) -> tuple[torch.Tensor, float]:
    """Midpoints of a square around the origin, and the area of a cell."""
    side = 2 * half / num
    middle = -half + side * (torch.arange(num, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(middle, middle), side**2


@cache
def log_density(name: str) -> tuple[torch.Tensor, float]:
    """log p on a square that holds nearly all of it, and the area of a cell."""
    points, area = grid(3.5, 280)
    return TOYS[name].log_prob(points), area


@pytest.mark.parametrize("name", PLANE)
def test_densities_integrate_to_one(name):
    log_p, area = log_density(name)
    total = log_p.exp().sum() * area
    # The ring has a kink at its inner edge; the others are smooth, and the rule exact.
    assert total.item() == pytest.approx(1, abs=2e-3 if name == "ring" else 1e-6)


@pytest.mark.parametrize("name", TOYS)
def test_draws_have_the_entropy_of_the_density(name):
    """The mean of -log p over draws is the entropy, had from the density by another way."""
    toy = TOYS[name]
    if name == "linear-gaussian":
        covariance = (toy.W @ toy.W.T).numpy() + 0.25 * np.eye(5)
        entropy = stats.multivariate_normal(toy.b.numpy(), covariance).entropy()
    else:
        log_p, area = log_density(name)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e6)).sum().item() * area
    x, _ = toy.sample(20_000, local_generator(1, "test"))
    surprise = -toy.log_prob(x)
    tolerance = 4.5 * surprise.std().item() / math.sqrt(len(x)) + 3e-3 * (name == "ring")
    assert surprise.mean().item() == pytest.approx(entropy, abs=tolerance)


@pytest.mark.parametrize("name", PLANE)
def test_draws_fill_cells_as_the_density_says(name):
    """Counts in cells against integrals over them: chi squared, which no wrong shape survives."""
    toy, fine, coarse = TOYS[name], 120, 12
    points, area = grid(2.4, fine)
    masses = toy.log_prob(points).exp().reshape(coarse, fine // coarse, coarse, fine // coarse)
    expected = 20_000 * area * masses.sum((1, 3)).flatten().numpy()
    x, _ = toy.sample(20_000, local_generator(2, "test"))
    counts = np.histogram2d(*x.T.numpy(), bins=coarse, range=[[-2.4, 2.4]] * 2)[0].flatten()
    kept = expected > 10
    squares = (counts[kept] - expected[kept]) ** 2 / expected[kept]
    assert kept.sum() > 20
    assert (squares.sum() - kept.sum()) / math.sqrt(2 * kept.sum()) < 4.5


def test_the_ring_is_the_image_of_normal_draws():
    """g(z) = z/10 + z/|z| as the tutorial has it; its radius is 1 + a Rayleigh draw / 10."""
    toy = TOYS["ring"]
    radius = torch.tensor([1.01, 1.1, 1.3], dtype=torch.float64)
    x = torch.stack([radius * math.cos(2), radius * math.sin(2)], dim=-1)
    expected = stats.rayleigh(loc=1, scale=0.1).logpdf(radius) - np.log(2 * np.pi * radius.numpy())
    np.testing.assert_allclose(toy.log_prob(x), expected, rtol=1e-12)
    assert toy.log_prob(torch.tensor([0.3, 0.4])).item() == -math.inf
    assert toy.log_prob(torch.zeros(2)).item() == -math.inf


@pytest.mark.parametrize("x", [(0.0, 0.0), (0.5, 0.25), (-9.0, 5.0)])
def test_the_moons_agree_with_scipys_adaptive_quadrature(x):
    toy = TOYS["two-moons"]
    got = toy.log_prob(torch.tensor(x, dtype=torch.float64)).item()

    def relative(t: float) -> float:
        logs = [stats.norm(moon(t), 0.1).logpdf(x).sum() - got for moon in MOONS]
        return np.exp(logs).sum() / (2 * math.pi)

    edges = np.linspace(0, math.pi, 17)
    total = sum(integrate.quad(relative, *pair)[0] for pair in pairwise(edges))
    assert math.log(total) == pytest.approx(0, abs=1e-9)


def test_the_pinwheel_is_a_mixture_of_bent_normals():
    """The end of an axis of a blade, bent by hand, has the density of the normal's own middle."""
    angle = 2 * math.pi * 3 / 5 + math.e / 4  # of blade 3 at radius 1
    x = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    others = stats.norm([1, 0], [0.3, 0.1])
    turned = [2 * math.pi * k / 5 for k in range(5)]
    density = sum(others.pdf([math.cos(t), math.sin(t)]).prod() for t in turned) / 5
    assert TOYS["pinwheel"].log_prob(x).item() == pytest.approx(math.log(density), abs=1e-12)


def test_labels_say_which_part_a_draw_is_of():
    x, label = TOYS["two-moons"].sample(2000, local_generator(0, "test"))
    nodes = np.linspace(0, math.pi, 200)
    distance = [
        np.linalg.norm(x.numpy()[:, None] - np.stack([moon(t) for t in nodes]), axis=-1).min(1)
        for moon in MOONS
    ]
    own = np.where(label.numpy() == 0, *distance)
    assert own.max() < 0.5
    assert np.where(label.numpy() == 1, *distance).max() > 0.9
    x, label = TOYS["pinwheel"].sample(2000, local_generator(0, "test"))
    angle = torch.atan2(x[:, 1], x[:, 0]) - x.norm(dim=-1).exp() / 4 - 2 * math.pi * label / 5
    assert angle.cos().mean() > 0.97  # of N(0, 0.1) across at 1 along


@pytest.mark.parametrize("name", TOYS)
def test_loaded_toys_are_those_that_the_density_speaks_of(name):
    train, valid, test = load_data(name)
    toy = TOYS[name]
    assert [len(data) for data in (train, valid, test)] == [8000, 1000, 1000]
    assert test.values.dtype == toy.log_prob(test.values).dtype == torch.float32
    assert toy.log_prob(test.values).isfinite().all()
    assert (test.labels is None) == (name in ("ring", "linear-gaussian"))
    surprise = [
        -toy.log_prob(train.values),
        -toy.log_prob(toy.sample(8000, local_generator(3, ""))[0]),
    ]
    error = math.sqrt(sum(float(s.var()) / len(s) for s in surprise))
    assert abs(float(surprise[0].mean() - surprise[1].mean())) < 4.5 * error
    assert not torch.equal(load_data(name, seed=1).test.values, test.values)
    assert toy.exact == ("quadrature" if name == "two-moons" else "closed form")


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"`x` of Ring must have shape \(..., 2\), got \(4, 3\)"):
        TOYS["ring"].log_prob(torch.zeros(4, 3))
