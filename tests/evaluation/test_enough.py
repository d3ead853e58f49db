"""As many draws as each datum needs: how many those are, and what they give."""

import math

import pytest
import torch
from torch.testing import assert_close

import pvae
from pvae.evaluation.enough import Target
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()


def test_draws_grow_with_the_square_of_the_error_to_be_halved():
    """One and a half times as many as that, as the next power of two times K, up to the most."""
    se = torch.tensor([0.01, 0.05, 0.1, 0.2, 0.4, math.nan, math.inf])
    needed = Target(0.1, 100, 2000).needed(se)
    assert needed.tolist() == [100, 100, 200, 800, 2000, 2000, 2000]
    assert int(Target(0.1, 100).needed(se)[-1]) == 10_000


def test_each_datum_reaches_the_error_or_is_named():
    x = TRUTH.sample(30)
    x[:3] *= 4  # where the guide of too small a spread is worse
    result = pvae.evaluate(TRUTH.pair(0.6), x, 200, target_se=0.05, max_particles=3200, grid=[1])
    se = result.per_datum["bound_own_se"].values
    draws = result.per_datum["draws"].values
    assert set(draws) <= {200, 400, 800, 1600, 3200}
    assert len(set(draws)) > 1
    assert result.not_reached.tolist() == (se > 0.05).nonzero()[0].tolist()
    assert (se <= 0.05).mean() > 0.5
    assert f"{len(result.not_reached)} of 30" in str(result)


def test_fresh_draws_are_unbiased():
    """Two hundred data alike: had the pilot's draws been kept, those that stopped were too low."""
    x = TRUTH.sample(1).expand(200, -1)
    result = pvae.evaluate(TRUTH.pair(2.0), x, 30, target_se=0.1, grid=[1])
    ratio = torch.tensor((result.log_p - float(TRUTH.log_prob(x[:1]))).values).exp()
    assert len(set(result.per_datum["draws"].values)) > 1
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(200)


def test_bounds_of_the_grid_are_those_of_the_pilot():
    x = TRUTH.sample(5)
    plain = pvae.evaluate(TRUTH.pair(1.5), x, 60)
    more = pvae.evaluate(TRUTH.pair(1.5), x, 60, target_se=0.01, max_particles=120)
    assert_close(more.per_datum["bound"].values, plain.per_datum["bound"].values)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_se": 0.0}, "`target_se` must be above zero, in nats; got 0.0"),
        ({"target_se": 0.1, "max_particles": 5}, "at least `num_particles`, 10, with which all"),
        ({"max_particles": 50}, "`max_particles` is the limit of `target_se`; give that as well"),
    ],
)
def test_targets_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        pvae.evaluate(TRUTH.pair(), TRUTH.sample(3), 10, **settings)
