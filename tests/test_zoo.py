"""The table of all models: budgets, what is said of each fit, and how a table shows it."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import pvae
from benchmarks import jobs, zoo
from benchmarks.zoo import STUDIES, Job
from pvae.baselines import Autoencoder
from pvae.data import Data, Splits
from tests.models.test_ring import log_prob as in_polar_coordinates

BRIEF = {"num_test": 10, "num_particles": 30, "compile": False}
SMALL = {"latent_size": 2, "hidden": (5,), "latent_sizes": (3, 2), "hidden_top": (4,)}
SMALL |= {"data_size": 64, "image_shape": (1, 8, 8), "channels": (3,), "hidden_flow": (5,)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The studies of digits and of the ring, their models tiny; one thread."""
    for name in [name for name in STUDIES if not name.startswith("MNIST")]:
        monkeypatch.setitem(STUDIES, name, replace(STUDIES[name], sizes=SMALL))
    monkeypatch.setattr(jobs, "TOGETHER", 1)  # Pyro's handlers are the whole process's
    monkeypatch.setattr(zoo, "EPOCHS", 2)
    monkeypatch.setattr(zoo, "BATCHES", 2)


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


# ------------------------------------------------------------------------------ a fit


@pytest.mark.parametrize(
    ("study", "model", "by"),
    [(study, *row) for study in STUDIES if "MNIST" not in study for row in STUDIES[study].rows],
)
def test_every_row_is_a_model_that_can_be_fitted_and_judged(study, model, by):
    found = zoo.work(Job(study, model, by, steps=2, **BRIEF))
    assert np.isfinite(found["squared error"])
    assert ("log p" in found) == (found["kind"] != Autoencoder.why_no_log_p)
    assert found.get("log p", 0.0) < 500
    if "L_1" in found:
        assert found["L_1"] < found["log p"] + 1e-3  # equal where the guide is the posterior
    if by not in zoo.AT_ONCE:
        assert found["updates"] == 2


def test_rows_of_mnist_are_those_of_digits_and_fit_its_shapes():
    for space in ("binary", "continuous", "counts"):
        study = STUDIES[f"MNIST, {space}"]
        assert study.rows == STUDIES[f"digits, {space}"].rows
        for model, by in study.rows:
            if by not in (*zoo.ITERATED, *zoo.AT_ONCE, "squared error"):
                x = zoo.called(model, vars(pvae.models), study.sizes).inputs["x"].shape
                image = (1, 28, 28) if "conv" in model else (784,)
                assert x == ((49,) if space == "counts" else image)


def test_every_row_is_of_a_known_model_and_none_is_twice():
    for study in STUDIES.values():
        assert len(set(study.rows)) == len(study.rows)
        for model, _ in study.rows:
            name = model.partition("(")[0]
            assert name in {*pvae.models.__all__, "pca", "autoencoder"}


def test_an_exact_model_is_judged_by_its_own_log_p():
    """`fit_ppca` has a log p(x) of its own, apart from `evaluate`."""
    found = zoo.work(Job("digits, continuous", "ppca()", "closed form", steps=1, **BRIEF))
    train, _, test = pvae.load_data("digits", dequantisation="uniform")
    expected = pvae.fit_ppca(train, 2).log_prob(test[:10])
    assert found["kind"] == "exact"
    assert found["log p"] == pytest.approx(float(expected.mean()), abs=1e-3)
    assert found["error over data"] == pytest.approx(float(expected.std()) / 10**0.5, rel=1e-3)


def test_reconstructions_are_those_of_scikit_learn():
    found = zoo.work(Job("digits, continuous", "pca()", "closed form", steps=1, **BRIEF))
    train, _, test = pvae.load_data("digits", dequantisation="uniform")
    peer = PCA(2).fit(train.realised().values.double())
    x = test[:10].double().numpy()
    expected = ((peer.inverse_transform(peer.transform(x)) - x) ** 2).sum(1).mean()
    assert found["squared error"] == pytest.approx(expected, rel=1e-4)
    assert found["kind"] == "deterministic: no p(x)"
    assert "log p" not in found


def test_a_conditional_model_gets_the_labels_of_its_data_and_says_so():
    job = Job("digits, binary", "conditional_vae()", "ELBO()", steps=1, **BRIEF)
    model = zoo.called(job.model, vars(pvae.models), SMALL)
    test = pvae.load_data("digits").test.subset(slice(10))
    data = zoo.columns(model, test)
    assert data["x"] is test
    assert torch.equal(data["y"], test.labels)
    kind = zoo.evaluated(model, data, job)["kind"]
    assert kind == "lower bound L_30 of log p(x given y)"


def test_labels_that_may_be_missing_are_few_in_training_and_none_in_a_test():
    job = Job("digits, binary", "semi_supervised_vae()", "ELBO()", steps=1, **BRIEF)
    model = zoo.called(job.model, vars(pvae.models), SMALL)
    train = pvae.load_data("digits").train.subset(slice(35))
    some, none = (zoo.columns(model, train, every)["y"] for every in (10, None))
    seen = torch.tensor([0, 10, 20, 30])
    assert torch.equal((~some.isnan()).nonzero()[:, 0], seen)
    assert torch.equal(some[seen], train.labels[seen].float())
    assert none.isnan().all()
    assert zoo.evaluated(model, zoo.columns(model, train), job)["kind"] == "lower bound L_30"


def test_the_rings_exact_value_is_that_of_an_integral_in_polar_coordinates():
    found = zoo.work(Job("ring", "ring()", "quadrature", steps=1, **BRIEF))
    x = pvae.load_data("ring").test[: BRIEF["num_test"]].double()
    assert found["kind"] == "exact"
    assert found["log p"] == pytest.approx(float(in_polar_coordinates(x, 0.1).mean()), abs=1e-3)


# ------------------------------------------------------------------------------ data


def test_digits_are_counts_of_dots_as_scikit_learn_has_them():
    splits = STUDIES["digits, counts"].data("count_vae()")
    rows = np.concatenate([part.values.numpy() for part in splits])
    order, expected = np.lexsort(rows.T), load_digits().data
    assert np.array_equal(rows[order], expected[np.lexsort(expected.T)])


def test_dots_of_mnist_are_counted_in_blocks(monkeypatch):
    """With images of random bits in its place."""
    bits = torch.rand(3, 5, 1, 28, 28).round()

    def load(name, **settings):
        assert (name, settings) == ("mnist", {"binarisation": "threshold", "flatten": False})
        return Splits(*map(Data.of, bits))

    monkeypatch.setattr(pvae, "load_data", load)
    _, _, test = STUDIES["MNIST, counts"].data("count_vae()")
    expected = bits[2].reshape(5, 7, 4, 7, 4).sum((2, 4)).flatten(1)
    assert torch.equal(test.values, expected)


# ------------------------------------------------------------------------------ budgets


def test_each_row_gets_as_many_steps_as_fit_into_the_budget(monkeypatch, tmp_path):
    rows = (("ppca()", "ELBO()"), ("ppca()", "closed form"), ("mixture_of_gaussians()", "EM"))
    study = replace(STUDIES["digits, continuous"], rows=rows, seconds=3.0, num_test=20)
    monkeypatch.setitem(STUDIES, "digits, continuous", study)
    rates, done = {"ELBO()": 0.1, "EM": 0.5}, []

    def do(job: Job):
        done.append(job)
        if not job.steps:
            return {"rate": rates[job.by]}
        return a_record(job.model, job.by, -20.0 - job.seed)

    def run(seeds: int) -> list[tuple[str, int, int]]:
        done.clear()
        zoo.compared("digits, continuous", seeds, tmp_path / "zoo.json", do)
        return [(job.by, job.seed, job.steps) for job in done]

    first = [("ELBO()", 0, 30), ("closed form", 0, 1), ("EM", 0, 6)]
    assert run(1) == [("ELBO()", 0, 0), ("EM", 0, 0), *first]
    assert run(1) == []
    assert run(2) == [("ELBO()", 1, 30), ("EM", 1, 6)], "a closed form is the same for each seed"
    assert {job.num_test for job in done} == {20}


@pytest.mark.parametrize(
    ("model", "by"),
    [
        ("ppca()", "ELBO()"),
        ("mixture_of_gaussians(num_components=5)", "EM"),
        ("autoencoder()", "squared error"),
    ],
)
def test_a_step_takes_time(model, by):
    assert 0 < zoo.work(Job("digits, continuous", model, by, **BRIEF))["rate"] < 10


def test_a_fit_that_fails_is_recorded_and_one_that_cannot_be_timed_is_told(monkeypatch):
    def fail(do, job):
        raise RuntimeError("FloatingPointError: NaN at step 3")

    monkeypatch.setattr(jobs, "in_a_process", fail)
    words = {"failed": "FloatingPointError: NaN at step 3"}
    assert zoo.in_a_process(Job("digits, binary", "vae()", "ELBO()", steps=10)) == words
    with pytest.raises(RuntimeError, match=r"vae\(\) by ELBO\(\) could not be timed: .* at step 3"):
        zoo.in_a_process(Job("digits, binary", "vae()", "ELBO()"))


def test_each_job_has_a_process_of_its_own_and_its_last_words_are_told():
    found = {jobs.in_a_process(eval, "__import__('os').getpid()") for _ in range(2)}
    assert len(found | {os.getpid()}) == 3
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        jobs.in_a_process(eval, "1 / 0")


# ------------------------------------------------------------------------------ tables


def a_record(model: str = "vae()", by: str = "ELBO()", *log_p: float, **changes):
    found = {"kind": "lower bound L_5000", "updates": 1000, "seconds": 4.0, "squared error": 0.5}
    if log_p:
        found |= {"log p": log_p[0], "error over data": 0.3}
    return {"model": model, "by": by} | found | changes


def test_the_table_has_means_over_seeds_and_the_standard_error_of_log_p():
    extra = {"L_1": -23.0, "k-hat fails": 0.25}
    records = [
        a_record("vae()", "ELBO()", -20.0, **extra, units={"z1": [3, 4], "z2": [2, 2]}),
        a_record("ppca()", "closed form", -25.0, kind="exact", updates=0),
        a_record("vae()", "ELBO()", -22.0, **extra, units={"z1": [4, 4], "z2": [2, 2]}),
    ]
    head, _, first, second = map(cells_of, zoo.markdown(records).splitlines())
    assert head[-1] == "seconds"
    numbers = [
        "-21.00",
        "1.00",
        "0.30",
        "lower bound L5000",
        "2.00",
        "z1 3.5 of 4, z2 2.0 of 2",
        "25%",
    ]
    assert first == ["`vae()`", "ELBO()", *numbers, "1,000", "4.0"]
    assert second == [
        "`ppca()`",
        "closed form",
        "-25.00",
        "",
        "0.30",
        "exact",
        "",
        "",
        "",
        "",
        "4.0",
    ]


def test_what_has_no_p_of_x_is_shown_by_its_reconstructions():
    none = a_record("pca()", "closed form", kind=Autoencoder.why_no_log_p, updates=0)
    head, _, first, second = map(
        cells_of, zoo.markdown([a_record("vae()", "ELBO()", -20.0), none]).splitlines()
    )
    assert head[-1] == "squared error"
    assert first[-1] == second[-1] == "0.500"
    assert second[2:6] == ["", "", "", "deterministic: no p(x)"]


def test_a_fit_that_failed_is_in_the_table():
    records = [a_record("vae()", "ELBO()", -20.0), a_record(failed="FloatingPointError")]
    row = cells_of(zoo.markdown(records).splitlines()[-1])
    assert row[2:6] == ["", "", "", "failed for 1 of 2 seeds"]
    assert len(row) == 11


def test_the_page_has_a_place_for_each_table():
    page = zoo.PAGE.read_text()
    for name in STUDIES:
        assert page.index(f"<!-- {name}: begin -->") < page.index(f"<!-- {name}: end -->")
