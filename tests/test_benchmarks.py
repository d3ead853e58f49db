"""The benchmarks' bookkeeping: ratios, verdicts, exponents and the workers' protocol.

Nothing is timed here, and no peer need be installed: times are canned, and the peer is a fake one.
"""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checks, driver, inputs, table, worker, works
from benchmarks.peers import FILES
from benchmarks.peers.pvae_ import vae

ROOT = Path(__file__).parents[1]


def a_result(**changes):
    settings = {
        "name": "training step",
        "unit": "step",
        "targets": {"fast": 1.0, "slow": 0.5, "shown": None},
        "values": {
            "pvae": [1e-3, 2e-3, 3e-3],
            "fast": [1e-3, 1e-3, 1e-3],
            "slow": [4e-3, 4e-3, 60.0],
            "shown": [1e-6, 1e-6, 1e-6],
        },
    }
    return driver.Result(**(settings | changes))


# ---------------------------------------------------------------------- tables


def test_the_ratio_is_the_median_of_ratios_within_rounds():
    result = a_result()
    assert table.ratio(result, "fast") == pytest.approx(2.0)
    assert table.ratio(result, "slow") == pytest.approx(0.25)


def test_verdicts_follow_targets_and_checks():
    result = a_result(checks={"slow": (False, "losses"), "fast": (True, "losses")})
    assert table.verdict(result, "fast") == "**missed**"
    assert table.verdict(result, "slow") == "met, **results differ**"
    assert table.verdict(result, "shown") == ""


def test_a_ratio_that_equals_its_target_meets_it():
    assert table.verdict(a_result(targets={"fast": 2.0}), "fast") == "met"


def test_the_table_has_a_row_for_each_peer():
    lines = table.markdown([a_result()]).splitlines()
    assert lines[0].startswith("| work | unit | pvae | peer |")
    assert lines[2] == (
        "| training step | step | 2.00 ms | fast | 1.00 ms | 2.00 | 1 | **missed** |"
    )
    assert lines[3] == "| training step | step | 2.00 ms | slow | 4.00 ms | 0.25 | 0.5 | met |"
    assert lines[4].split("|")[5:9] == [" 1.00 µs ", " 2000.00 ", "  ", "  "]


def test_a_peer_without_values_gets_a_row_that_says_why():
    values = {"pvae": [1.0]}
    result = a_result(
        targets={"fast": 1.0}, values=values, failed={"fast": "not installed (a | b)"}
    )
    assert table.markdown([result]).splitlines()[2] == (
        "| training step | step | 1.00 s | fast |  |  | 1 | not installed (a / b) |"
    )


def test_without_pvae_itself_there_are_no_ratios():
    result = a_result(values={"fast": [1.0]}, failed={"pvae": "RuntimeError: no compiler"})
    assert [row[2] for row in table.rows(result)] == ["failed"] * 3
    assert {row[-1] for row in table.rows(result)} == {"RuntimeError: no compiler"}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.001234, "step", "1.23 ms"),
        (12.34, "demo", "12.3 s"),
        (123.4, "demo", "123 s"),
        (2.5e-7, "datum and draw", "250 ns"),
        (1546.4, "MB", "1546 MB"),
    ],
)
def test_values_are_shown_in_three_digits(value, unit, text):
    assert table.shown(value, unit) == text


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    sizes = [3, 10, 50, 1000]
    assert table.exponent(sizes, [7e-4 * size**power for size in sizes]) == pytest.approx(power)


def test_the_exponent_of_noisy_costs_is_that_of_polyfit():
    sizes, values = [1, 10, 100], [1.0, 4.0, 90.0]
    slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
    assert table.exponent(sizes, values) == pytest.approx(slope)


def test_exponents_are_tabled_by_peer():
    series = [
        {"name": "batch", "sizes": (10, 100), "exponents": {"pvae": 0.5, "NumPyro": 0.25}},
        {"name": "latent size", "sizes": (1, 2), "exponents": {"pvae": 1.0}},
    ]
    assert table.growth(series).splitlines()[2:] == [
        "| batch | 10, 100 | 0.50 | 0.25 |",
        "| latent size | 1, 2 | 1.00 |  |",
    ]


def test_the_summary_is_data_with_medians_and_quartiles():
    summary = json.loads(json.dumps(table.summary(a_result())))
    assert summary["quartiles"]["pvae"] == pytest.approx([1.5e-3, 2e-3, 2.5e-3])
    assert summary["ratios"]["fast"] == pytest.approx(2.0)
    assert summary["verdicts"] == {"fast": "missed", "slow": "met", "shown": ""}


# ---------------------------------------------------------------------- README


def test_text_between_marks_is_replaced_and_the_rest_kept():
    text = "above\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nbelow\n"
    once = table.between_marks(text, "cpu", "new")
    assert once == "above\n<!-- cpu: begin -->\n\nnew\n\n<!-- cpu: end -->\nbelow\n"
    assert table.between_marks(once, "cpu", "new") == once


def test_missing_marks_are_named():
    with pytest.raises(ValueError, match="must have the lines <!-- cuda: begin -->"):
        table.between_marks("<!-- cuda: end --> <!-- cuda: begin -->", "cuda", "new")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_readme_has_the_marks_of_each_device(device):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert table.between_marks(text, device, "new") != text


# ---------------------------------------------------------------------- works


def all_works():
    for device, quick in (("cpu", False), ("cpu", True), ("cuda", False)):
        yield from works.works(quick, device)
    for series in works.SCALING:
        yield from series.works()


def test_every_work_names_known_peers_with_a_target_or_none():
    for work in all_works():
        assert work.targets, work.name
        assert work.targets.keys() <= FILES.keys(), work.name
        for target in work.targets.values():
            assert target is None or 0 < target < 2, work.name


def test_the_targets_of_the_training_step_at_batch_20():
    (work,) = (w for w in works.works(False, "cpu") if w.name.endswith("batch 20, 1 particle"))
    assert work.targets == {
        "NumPyro": 1.0,
        "PyTorch + torch.compile": 0.9,
        "PyTorch": None,
        "Pyro SVI": 0.35,
        "Pyro SVI, denormals flushed": 0.35,
        "Pyro SVI, JitTrace_ELBO": None,
    }


def test_works_have_names_of_their_own():
    names = [work.name for work in works.works(False, "cpu")]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------- checks


def test_results_are_equal_within_their_noise_only():
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 200)) + 100
    assert checks.compare({"losses": ours.tolist()}, {"losses": theirs.tolist()})[0]
    shifted = (theirs + 1).tolist()  # ten standard errors of sqrt(2 / 200)
    equal, words = checks.compare({"losses": ours.tolist()}, {"losses": shifted})
    assert not equal
    assert f"difference {np.mean(ours - shifted):.3f} ± 0." in words


def test_bounds_are_paired_by_datum():
    """Data differ by much more than estimates do; unpaired, a difference of 0.5 would not show."""
    bounds = np.linspace(-300, -100, 16)
    off = np.tile([0.4, 0.6], 8)
    assert not checks.compare({"bounds": bounds.tolist()}, {"bounds": (bounds + off).tolist()})[0]
    off = np.tile([-0.5, 0.5], 8)
    assert checks.compare({"bounds": bounds.tolist()}, {"bounds": (bounds + off).tolist()})[0]


def test_results_that_are_not_finite_are_not_equal():
    losses = {"losses": [1.0, math.nan, 1.0]}
    assert checks.compare(losses, losses) == (False, "losses, nats per datum: not finite")


@pytest.mark.parametrize(("theirs", "equal"), [(-2000.1, True), (-2001.0, False)])
def test_log_likelihoods_agree_to_four_digits(theirs, equal):
    assert checks.compare({"log_likelihood": -2000.0}, {"log_likelihood": theirs})[0] is equal


def test_a_bare_time_has_nothing_to_compare():
    assert checks.compare({"losses": [1.0]}, {}) == (True, "nothing to compare")


# ---------------------------------------------------------------------- inputs


def test_an_epoch_of_batches_has_each_datum_at_most_once():
    batches = inputs.batches(num_data=50, batch=8, steps=12, seed=1)
    assert batches.shape == (12, 8)
    for epoch in (batches[:6], batches[6:]):
        assert len(np.unique(epoch)) == 48
    assert not np.array_equal(batches[:6], batches[6:])
    assert np.array_equal(batches, inputs.batches(50, 8, 12, seed=1))


def test_first_weights_have_the_declared_model_s_shapes_and_spread():
    model = vae(latent=7)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [
        *[(200, 7), (200,), (200, 200), (200,), (784, 200), (784,)],
        *[(200, 784), (200,), (200, 200), (200,), (14, 200), (14,)],
    ]
    weight = inputs.layers(7)["encoder"][1][0]
    assert np.abs(weight).max() == pytest.approx(math.sqrt(6 / 400), rel=1e-3)


# ---------------------------------------------------------------------- the protocol


class Fake:
    """A peer whose times count up."""

    def __init__(self, sizes, folder, device):
        self.seconds = sizes["first"]

    def check(self):
        return {"losses": [1.0]}

    def time(self):
        self.seconds += 1
        if self.seconds > 3:
            raise ValueError("too long")
        return self.seconds


def asked(*requests):
    answers = io.StringIO()
    lines = [json.dumps(request) for request in requests]
    worker.serve("fake", {("fake", "step"): Fake}, Path(), "cpu", lines, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_answers_each_request_by_a_line():
    start = {"do": "start", "kind": "step", "sizes": {"first": 1}}
    assert asked(start, {"do": "time"}, {"do": "time"}, start, {"do": "time"}) == [
        {"check": {"losses": [1.0]}},
        {"seconds": 2},
        {"seconds": 3},
        {"check": {"losses": [1.0]}},
        {"seconds": 2},
    ]


def test_a_worker_outlives_its_errors(capsys):
    start = {"do": "start", "kind": "step", "sizes": {"first": 3}}
    unknown = {"do": "start", "kind": "flight", "sizes": {}}
    assert asked({"do": "time"}, unknown, start, {"do": "time"}) == [
        {"error": "RuntimeError: No work was started."},
        {"error": "KeyError: ('fake', 'flight')"},
        {"check": {"losses": [1.0]}},
        {"error": "ValueError: too long"},
    ]
    assert "too long" in capsys.readouterr().err


def test_a_process_says_that_its_peer_is_missing(tmp_path, monkeypatch):
    package = tmp_path / "numpyro"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no numpyro here')")
    (tmp_path / "jax.py").write_text("raise ImportError('no jax here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(driver.Missing, match="no jax here"):
        driver.Worker("NumPyro", tmp_path, "cpu")


def test_contenders_alternate_and_one_that_fails_leaves_the_rest():
    asked = []

    def contender(name, fails=False):
        def time():
            asked.append(name)
            if fails:
                raise RuntimeError("out of memory")
            return float(len(asked))

        return time

    contenders = {"a": contender("a"), "b": contender("b", fails=True), "c": contender("c")}
    values, failed = driver.alternate(contenders, rounds=3)
    assert "".join(asked) == "abc" + "ca" + "ac"
    assert values == {"a": [1.0, 5.0, 6.0], "c": [3.0, 4.0, 7.0]}
    assert failed == {"b": "out of memory"}
