"""The comparison of objectives: budgets, records that are kept, and the table they make."""

import math
from dataclasses import replace

import pytest

from benchmarks import estimators, jobs
from benchmarks.estimators import Job

CALLS = ("ELBO(1)", "ELBO(1, beta=WarmUp(steps // 5))")
NAMES = ["L_K", "L_1", "active units", "k-hat fails"]


def a_record(call: str = CALLS[0], *values: float, **changes):
    job = {"study": "digits", "objective": call, "seed": 0, "steps": 1000}
    return job | dict(zip(NAMES, values, strict=False)) | changes


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.fixture
def tiny(monkeypatch):
    """Two objectives, timed twice on four steps, in this process."""
    changes = {"calls": CALLS, "rounds": 2, "seconds": 0.2, "num_test": 10}
    study = replace(estimators.STUDIES["digits"], **changes)
    monkeypatch.setitem(estimators.STUDIES, "digits", study)
    for name, value in {"EPOCHS": 2, "BATCHES": 4}.items():
        monkeypatch.setattr(estimators, name, value)
    monkeypatch.setattr(jobs, "TOGETHER", 1)  # Pyro's handlers are the whole process's
    done: list[Job] = []

    def work(job: Job):
        done.append(job)
        return estimators.work(replace(job, num_particles=20, compile=False))

    return work, done


def test_each_objective_gets_as_many_steps_as_fit_into_the_budget(tiny, tmp_path):
    work, done = tiny
    estimators.compared("digits", 1, tmp_path / "found.json", work)
    timed, fitted = done[:4], done[4:]
    assert [job.steps for job in timed] == [0, 0, 0, 0]
    assert [job.objective for job in fitted] == list(CALLS)
    rates = [found["rate"] for found in jobs.run(timed, tmp_path / "found.json", work)]
    fastest = (min(rates[0], rates[2]), min(rates[1], rates[3]))
    assert [job.steps for job in fitted] == [round(0.2 / rate) for rate in fastest]


def test_a_fit_that_has_been_done_is_not_repeated(tiny, tmp_path):
    work, done = tiny
    first = estimators.compared("digits", 1, tmp_path / "found.json", work)
    num_done = len(done)
    assert estimators.compared("digits", 1, tmp_path / "found.json", work) == first
    assert len(done) == num_done
    estimators.compared("digits", 2, tmp_path / "found.json", work)
    assert [job.seed for job in done[num_done:]] == [1, 1]


def test_a_fit_that_fails_is_recorded_and_one_that_cannot_be_timed_is_told(monkeypatch):
    def fail(do, job):
        raise RuntimeError("FloatingPointError: NaN at step 3")

    monkeypatch.setattr(jobs, "in_a_process", fail)
    words = {"failed": "FloatingPointError: NaN at step 3"}
    assert estimators.in_a_process(Job("digits", "CUBO(50)", steps=10)) == words
    with pytest.raises(RuntimeError, match=r"CUBO\(50\) could not be timed: .* NaN at step 3"):
        estimators.in_a_process(Job("digits", "CUBO(50)"))


def test_the_table_has_means_over_seeds_and_the_standard_error_of_the_bound():
    records = [
        a_record(CALLS[0], -20.0, -22.0, 8, 0.25, seed=0),
        a_record("MIWAE(8, 4)", -30.0, -31.0, 4, 0.0, seed=0, steps=50),
        a_record(CALLS[0], -22.0, -23.0, 7, 0.75, seed=1),
    ]
    head, _, first, second = map(cells_of, estimators.markdown(records).splitlines())
    assert head == list(estimators.HEAD)
    assert first == ["`ELBO(1)`", "1", "1,000", "-21.00", "1.00", "1.50", "7.5", "50%"]
    assert second == ["`MIWAE(8, 4)`", "32", "50", "-30.00", "nan", "1.00", "4.0", "0%"]


def test_a_fit_that_failed_is_in_the_table():
    records = [a_record(CALLS[0], -20.0, -22.0, 8, 0.25), a_record(failed="FloatingPointError")]
    row = cells_of(estimators.markdown(records).splitlines()[-1])
    assert row[3:] == ["failed for 1 of 2 seeds", "", "", "", ""]


def test_every_call_makes_an_objective():
    for study in estimators.STUDIES.values():
        for call in study.calls:
            made = estimators.objective(call, 1000)
            assert call.startswith(type(made).__name__)
    assert estimators.objective("Renyi(50, -inf)", 1).alpha == -math.inf
    assert estimators.objective(CALLS[1], 1000).beta.steps == 200
