import json
from dataclasses import replace

import pytest
import torch

from pvae.data import DataSpec
from pvae.data.spec import local_generator

DIGITS = DataSpec(
    name="digits",
    split="test",
    event_shape=(64,),
    image_shape=(8, 8),
    binarisation="dynamic",
    dequantisation="none",
    levels=17,
    seed=0,
)
PLAIN = {"binarisation": "none", "dequantisation": "none"}


@pytest.mark.parametrize(
    ("changes", "space"),
    [
        ({}, "digits, binary (Bernoulli draws of grey levels, seed 0), 64 dimensions"),
        ({"binarisation": "threshold"}, "digits, binary (threshold 1/2), 64 dimensions"),
        (PLAIN, "digits, 17 grey levels in [0, 1], 64 dimensions"),
        (PLAIN | {"levels": None}, "digits, values as given, 64 dimensions"),
        (
            {"binarisation": "none", "dequantisation": "uniform", "seed": 3},
            "digits, continuous in [0, 1] (uniform dequantisation of 17 levels, seed 3), "
            "64 dimensions",
        ),
    ],
)
def test_the_space_is_named(changes, space):
    assert replace(DIGITS, **changes).space() == space


def test_layout_and_dynamic_against_fixed_do_not_change_the_space():
    same = replace(DIGITS, event_shape=(1, 8, 8), binarisation="fixed", split="valid")
    assert same.space() == DIGITS.space()


@pytest.mark.parametrize("spec", [DIGITS, replace(DIGITS, image_shape=None, event_shape=())])
def test_json_round_trip(spec):
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_written_before_data_had_a_scale_is_read():
    old = DIGITS.to_json()
    del old["location"], old["scale"]
    assert DataSpec.from_json(json.loads(json.dumps(old))) == DIGITS


def test_printing_leaves_the_scale_of_each_pixel_out():
    spec = replace(DIGITS, **PLAIN, location=(7.25,) * 64, scale=(3.5,) * 64)
    assert "7.25" not in repr(spec)
    assert spec != replace(spec, location=(7.0,) * 64)


def test_json_of_another_kind_is_refused():
    d = DIGITS.to_json() | {"color": "red"}
    del d["seed"]
    with pytest.raises(ValueError, match="missing or unknown color, seed"):
        DataSpec.from_json(d)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"binarisation": "dynamical"}, "`binarisation` must be one of none, .* got 'dynamical'"),
        ({"dequantisation": "gaussian"}, "`dequantisation` must be one of none, uniform; got"),
        ({"dequantisation": "uniform"}, "not both: got binarisation='dynamic'"),
        (
            {"binarisation": "none", "dequantisation": "uniform", "levels": None},
            "needs the number of its grey levels",
        ),
        ({"scale": (1.0,) * 64, "location": (0.0,) * 64}, "Bits are not standardised"),
        (PLAIN | {"scale": (1.0,) * 64}, "each of its 64 dimensions, got 0 and 64"),
        (PLAIN | {"location": (0.0,) * 64}, "each of its 64 dimensions, got 64 and 0"),
        (PLAIN | {"scale": (1.0,), "location": (0.0,)}, "each of its 64 dimensions, got 1 and 1"),
        (PLAIN | {"scale": (0.0,) * 64, "location": (0.0,) * 64}, "must be positive and finite"),
    ],
)
def test_contradictions_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(DIGITS, **changes)


def test_streams_differ_by_seed_and_purpose_and_leave_the_global_state():
    before = torch.get_rng_state()
    draws = {
        (seed, purpose): torch.rand(4, generator=local_generator(seed, purpose))
        for seed in (0, 1, -1)
        for purpose in ("train", "test")
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)
    again = torch.rand(4, generator=local_generator(0, "train"))
    assert torch.equal(again, draws[0, "train"])
    assert torch.equal(torch.get_rng_state(), before)
