"""ArviZ's own functions on pvae's trees: summaries, plots, k-hats, comparisons."""

from dataclasses import replace

import arviz as az
import numpy as np
import pytest
import torch
from matplotlib import pyplot

import pvae
from tests.exact import TwoCategoricals
from tests.fitting import binary
from tests.test_inference_data import TRUTH, VAGUE, X


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def test_arviz_summarises_and_draws_a_tree():
    tree = pvae.to_datatree(VAGUE.pair(), VAGUE.sample(4), 300)
    table = az.summary(tree, var_names=["z"], kind="stats", round_to="none")
    np.testing.assert_allclose(
        table["mean"], tree.posterior.z.mean(("chain", "draw")).values.ravel()
    )
    assert len(az.summary(tree)) == 4 * 3
    az.plot_forest(tree, var_names=["z"], combined=True)
    az.plot_ppc_dist(tree, num_samples=5)
    az.plot_ppc_dist(tree, group="prior_predictive", num_samples=5)
    az.plot_prior_posterior(tree, var_names=["z"])


def test_arviz_takes_a_tree_of_bits():
    torch.manual_seed(0)
    tree = pvae.to_datatree(pvae.models.vae(6, 2, (5,)), binary(10), 50)
    assert len(az.summary(tree)) == 20
    az.plot_forest(tree, combined=True)
    with pytest.warns(UserWarning, match="look binary"):  # ArviZ would rather see calibration
        az.plot_ppc_dist(tree, num_samples=5, kind="ecdf")


@pytest.mark.parametrize("spread", [0.05, 1.0, 2.0])
def test_arviz_draws_khats(spread):
    """Of a guide that is too narrow, of an exact one, and of one that is broad enough."""
    result = pvae.evaluate(TRUTH.pair(spread), X, num_particles=300)
    plot = az.plot_khat(pvae.to_elpd(result))
    drawn = plot.viz["khat"]["pareto_k"].item().get_offsets()[:, 1]
    np.testing.assert_allclose(drawn, result.per_datum["khat"])


def test_arviz_draws_and_compares_bounds_without_khats_and_exact_values():
    """A bound without k-hat is no good one, so that it is counted as bad, and is not drawn."""
    truth, x = TwoCategoricals.drawn(), torch.arange(4)
    chains = pvae.ais(TRUTH.declared(), X, 4, num_temperatures=10)
    lone = replace(chains, per_datum=chains.per_datum.drop_vars("exact"))
    enumerated = pvae.evaluate(truth.declared(), x)
    for result, khats in ((lone, []), (chains, [0.0] * 5), (enumerated, [0.0] * 4)):
        elpd = pvae.to_elpd(result)
        offsets = az.plot_khat(elpd).viz["khat"]["pareto_k"].item().get_offsets()
        assert offsets[:, 1].compressed().tolist() == khats
        bad = 0 if khats else 5
        assert f"(1, Inf)   (very bad)    {bad}" in str(elpd)
    az.compare({"AIS": pvae.to_elpd(lone), "exact": pvae.to_elpd(chains)})


def test_arviz_compares_log_p():
    x = TRUTH.sample(120)
    results = {
        "exact": pvae.evaluate(TRUTH.pair(), x, num_particles=100),
        "ELBO": pvae.evaluate(TRUTH.pair(spread=4.0), x, num_particles=1),
    }
    table = az.compare({name: pvae.to_elpd(r) for name, r in results.items()}, round_to="none")
    difference = (results["ELBO"].log_p - results["exact"].log_p).values
    assert list(table.index) == ["exact", "ELBO"]
    assert table.loc["ELBO", "elpd_diff"] == pytest.approx(difference.sum())
    ours = pvae.compare(results).table.loc["ELBO"]
    assert table.loc["ELBO", "elpd_diff"] == pytest.approx(120 * ours["difference"])


def test_leaving_one_out_where_data_say_little_of_z_finds_log_p():
    x = VAGUE.sample(4)
    found = az.loo(pvae.to_datatree(VAGUE.pair(), x, 4000), pointwise=True)
    truth = VAGUE.log_prob(x).numpy()
    np.testing.assert_allclose(found.elpd_i, truth, rtol=0, atol=0.1)
    assert np.ptp(truth) > 1
