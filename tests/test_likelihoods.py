"""Likelihoods with fewer logarithms, against torch's own."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Independent, Normal
from torch import Tensor

from pvae.likelihoods import MOST_FACTORS, CheapLikelihoods, _num_blocks

SIZES = [(1,), (64,), (97,), (784,), (787,), (28, 28), (3, 4, 5)]  # 97 and 787 are primes


def bits(logits: Tensor, event_dims: int) -> Independent:
    """Without validation, for grey values lie outside of the support."""
    return Independent(Bernoulli(logits=logits, validate_args=False), event_dims)


def cheap(program, *args):
    with CheapLikelihoods():
        trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    return trace.nodes["x"]


def cheap_log_prob(fn, x: Tensor) -> Tensor:
    site = cheap(lambda: pyro.sample("x", fn, obs=x))
    assert site["fn"] is not fn
    return site["log_prob"]


def grey(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("values", ["binary", "grey"])
@pytest.mark.parametrize("event", SIZES, ids=str)
def test_the_numbers_are_those_of_torch(event, values):
    logits = 5 * torch.randn(4, 3, *event, dtype=torch.float64)
    x = grey(3, *event) if values == "grey" else grey(3, *event).round()
    fn = bits(logits, len(event))
    found = cheap_log_prob(fn, x)
    assert found.shape == (4, 3)
    torch.testing.assert_close(found, fn.log_prob(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("values", ["binary", "grey"])
@pytest.mark.parametrize("size", [1, 64, 97, 784, 787])
def test_the_numbers_are_those_of_torch_however_large_the_logits_are(size, values):
    """From -1e4 to 1e4, in steps of many sizes: sums of up to 1e7 nats."""
    exponents = torch.linspace(-8, 4, 40 * size, dtype=torch.float64)
    logits = (10**exponents * torch.randn(40 * size).sign()).reshape(size, 40).T
    logits = torch.cat([logits, torch.full((2, size), 1e4) * torch.tensor([[1.0], [-1.0]])])
    x = grey(42, size) if values == "grey" else grey(42, size).round()
    fn = bits(logits, 1)
    torch.testing.assert_close(cheap_log_prob(fn, x), fn.log_prob(x), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("event", SIZES, ids=str)
def test_products_do_not_overflow_in_float32(event):
    """At logits of 0 every factor is 2, the largest there is: log p(x) = -J log 2."""
    found = cheap_log_prob(bits(torch.zeros(2, *event), len(event)), torch.ones(2, *event))
    expected = torch.full((2,), -math.prod(event) * math.log(2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 64, 97, 112, 113, 224, 784, 787])
def test_blocks_are_equal_and_the_fewest(size):
    allowed = [n for n in range(1, size + 1) if size % n == 0 and size / n <= MOST_FACTORS]
    assert _num_blocks(size) == min(allowed)


def test_gradients_in_the_logits_are_those_of_torch():
    logits = torch.randn(3, 97, dtype=torch.float64, requires_grad=True)
    x, fn = grey(3, 97), bits(logits, 1)
    (found,) = torch.autograd.grad(cheap_log_prob(fn, x).sum(), logits)
    torch.testing.assert_close(found, x - logits.sigmoid(), rtol=0, atol=1e-10)


def test_probabilities_serve_as_well_as_logits():
    probs, x = grey(4, 3, 97).clamp(0.01, 0.99), grey(3, 97).round()
    fn = Bernoulli(probs=probs).to_event(1)
    expected = torch.where(x == 1, probs, 1 - probs).log().sum(-1)
    torch.testing.assert_close(cheap_log_prob(fn, x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("event_dims", "shape"), [(0, (4, 3, 5)), (1, (4, 3)), (2, (4,))])
def test_only_the_dimensions_of_the_event_are_summed(event_dims, shape):
    fn, x = bits(torch.randn(4, 3, 5, dtype=torch.float64), event_dims), grey(4, 3, 5).round()
    found = cheap_log_prob(fn, x)
    assert found.shape == shape
    torch.testing.assert_close(found, fn.log_prob(x), rtol=0, atol=1e-10)


def test_a_plate_within_the_datum_keeps_its_dimension():
    logits, x = torch.randn(7, 97, dtype=torch.float64), grey(3, 7, 97).round()

    def program():
        with pyro.plate("data", 7, dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("x", bits(logits, 1), obs=x)

    found = cheap(program)["log_prob"]
    assert found.shape == (3, 7)
    torch.testing.assert_close(found, bits(logits, 1).log_prob(x), rtol=0, atol=1e-10)


def test_scales_and_masks_still_apply():
    logits, x = torch.randn(4, 97, dtype=torch.float64), grey(4, 97).round()
    mask = torch.tensor([True, False, True, True])

    def program():
        with poutine.scale(scale=2.5), poutine.mask(mask=mask):
            pyro.sample("x", bits(logits, 1), obs=x)

    expected = 2.5 * bits(logits, 1).log_prob(x) * mask
    torch.testing.assert_close(cheap(program)["log_prob"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (Normal(torch.zeros(3, 5), 1.0).to_event(1), torch.randn(3, 5)),
        (Bernoulli(logits=torch.zeros(3)), torch.ones(3)),
        (
            Bernoulli(logits=torch.zeros(3, 5)).to_event(1).mask(torch.ones(3) == 1),
            torch.ones(3, 5),
        ),
        (Bernoulli(logits=torch.zeros(3, 5)).to_event(1), None),
    ],
    ids=["normal", "single bits", "masked", "latent"],
)
def test_other_sites_are_left_alone(fn, x):
    site = cheap(lambda: pyro.sample("x", fn, obs=x))
    assert site["fn"] is fn
    assert torch.equal(site["log_prob"], fn.log_prob(site["value"]))


def test_a_subclass_keeps_its_own_log_probability():
    class Tempered(Bernoulli):
        def log_prob(self, value):
            return 0.5 * super().log_prob(value)

    x = grey(3, 8).round()
    fn = Independent(Tempered(logits=torch.randn(3, 8)), 1)
    assert cheap(lambda: pyro.sample("x", fn, obs=x))["fn"] is fn
