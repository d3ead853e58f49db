"""The table of log p(x) by every means: its arithmetic, and that each of its calls is one."""

import pytest
import torch

import pvae
from benchmarks import log_p
from tests.fitting import binary, declare

REPORT = {
    "machine": {"processor": "P", "libraries": {"torch": "2"}, "date": "2026-11-21"},
    "epochs": 3,
    "training seconds": 10.4,
    "runs": {
        name: {"log p": -90.0 - i, "se": 0.1, "k-hat fails": 0.25, "seconds": 2.0}
        for i, name in enumerate(reversed(log_p.RUNS))
    },
}


def test_the_table_has_a_row_for_each_run_and_the_claims():
    text = log_p.markdown(REPORT)
    assert "| AIS, 2000 temperatures | 16 chains | -90.00 | 0.10 | 25% | 2 |" in text
    assert "| refined guide, L50 | 50 + 400 |" in text
    assert "Trained for 3 epochs in 10 CPU seconds. P, one thread, torch 2, 2026-11-21." in text
    assert text.count(": met, by +") == 4


def test_a_claim_that_fails_is_said_to():
    runs = REPORT["runs"] | {"refined guide, L500": {"log p": -200.0}}
    claims = log_p.claims(runs)
    assert sum("missed, by -" in claim for claim in claims) == 1
    assert "The refined guide's L500 above it, from a tenth of the draws: missed" in claims[2]


def test_a_record_is_the_mean_and_its_error_over_draws():
    found = pvae.evaluate(declare("vae"), binary(8), 40)
    record = log_p.record(found, 1.5)
    errors = torch.tensor(found.per_datum["bound_se"][-1].values)
    assert record["log p"] == pytest.approx(float(found.log_p.mean()))
    assert record["se"] == pytest.approx(float(errors.square().sum().sqrt()) / 8)
    assert record["seconds"] == 1.5


def test_each_run_is_an_evaluation_of_the_model():
    names = ("guide, L50", "prior, L5000", "refined guide, L50", "guide at Sobol points, L4096")
    runs = {name: log_p.RUNS[name] for name in names}
    found = log_p.measure(declare("vae"), binary(3), runs)
    assert list(found) == list(runs)
    assert found["prior, L5000"]["log p"] == pytest.approx(
        found["guide at Sobol points, L4096"]["log p"], abs=0.2
    )
