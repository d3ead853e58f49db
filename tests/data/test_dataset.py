import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pvae.data import Data, DataSpec, load_data
from pvae.data.dataset import observe

LEVELS = torch.arange(17.0) / 16


def noisy(values: torch.Tensor, split: str = "train", **noise: str) -> Data:
    spec = DataSpec(
        name="grey",
        split=split,
        event_shape=tuple(values.shape[1:]),
        image_shape=None,
        binarisation=noise.get("binarisation", "none"),
        dequantisation=noise.get("dequantisation", "none"),
        levels=17,
        seed=0,
    )
    return Data(values, None, spec, resampled=True)


@pytest.fixture
def binary() -> Data:
    return noisy(LEVELS.expand(2000, 17), binarisation="dynamic")


@pytest.fixture
def dequantised() -> Data:
    return noisy(LEVELS.expand(2000, 17), dequantisation="uniform")


@pytest.mark.parametrize("draw", [lambda data: data[:], lambda data: data.realised().values])
def test_bits_are_one_with_the_probability_of_their_grey_level(binary, draw):
    bits = draw(binary)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(bits[:, 0], torch.zeros(2000))
    assert torch.equal(bits[:, -1], torch.ones(2000))
    standard_error = (LEVELS * (1 - LEVELS) / 2000).sqrt().clamp(min=1e-9)
    assert ((bits.mean(dim=0) - LEVELS) / standard_error).abs().max() < 4.5


@pytest.mark.parametrize("draw", [lambda data: data[:], lambda data: data.realised().values])
def test_dequantised_values_are_uniform_within_their_level(dequantised, draw):
    within = draw(dequantised) * 17 - torch.arange(17.0)  # U[0, 1)
    assert within.min() > -1e-5
    assert within.max() < 1 + 1e-5
    standard_error = math.sqrt(1 / 12 / 2000)
    assert ((within.mean(dim=0) - 0.5) / standard_error).abs().max() < 4.5
    assert ((within.square().mean(dim=0) - 1 / 3) / math.sqrt(4 / 45 / 2000)).abs().max() < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_brightest_dequantised_value_stays_below_one(dtype):
    spec = noisy(LEVELS.expand(1, 17), dequantisation="uniform").spec
    highest = 1 - torch.finfo(dtype).eps / 2
    x = observe(torch.ones(1, dtype=dtype), torch.full((1,), highest, dtype=dtype), spec)
    assert 16 / 17 < x.item() < 1
    assert x.dtype == dtype


def test_batches_are_fresh_and_follow_the_global_generator(binary):
    index = torch.tensor([3, 1, 2])
    torch.manual_seed(1)
    first, second = binary.batch(index), binary.batch(index)
    torch.manual_seed(1)
    assert torch.equal(binary.batch(index), first)
    assert not torch.equal(first, second)


def test_realising_draws_once_and_leaves_the_random_state(binary):
    before = torch.get_rng_state()
    realised = binary.realised()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(binary.realised().values, realised.values)
    assert not realised.resampled
    assert realised.realised() is realised
    assert realised.spec == binary.spec
    index = torch.tensor([5, 5])
    assert torch.equal(realised.batch(index), realised.values[index])
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_do_not_share_their_noise(binary):
    other = noisy(binary.values, split="test", binarisation="dynamic")
    assert not torch.equal(other.realised().values, binary.realised().values)


def test_indexing_by_number_slice_and_tensor():
    data = Data.of(torch.arange(12.0).reshape(6, 2))
    assert len(data) == 6
    assert data[1].tolist() == [2, 3]
    assert data[4:].tolist() == [[8, 9], [10, 11]]
    assert data[torch.tensor([5, 0])].tolist() == [[10, 11], [0, 1]]
    assert data[[2]].tolist() == [[4, 5]]


def test_a_data_loader_serves_it(binary):
    data = Data.of(torch.arange(12.0).reshape(6, 2))
    assert torch.equal(torch.cat(list(DataLoader(data, batch_size=4))), data.values)
    batch = next(iter(DataLoader(binary, batch_size=4)))
    assert batch.shape == (4, 17)
    assert set(batch.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (np.arange(6).reshape(3, 2), torch.float32),
        (np.ones((3, 2)), torch.float64),
        (np.ones((3, 2), np.float16), torch.float32),
        ([[True, False], [False, True], [True, True]], torch.float32),
        (torch.ones(3, 2, dtype=torch.bfloat16), torch.float32),
        (torch.ones(3, 2, dtype=torch.uint8), torch.float32),
        (torch.ones(3, 2, dtype=torch.float64, requires_grad=True), torch.float64),
    ],
)
def test_of_takes_what_is_like_an_array(source, dtype):
    data = Data.of(source, name="mine")
    assert data.values.shape == (3, 2)
    assert data.values.dtype == dtype
    assert not data.values.requires_grad
    assert data.spec.space() == "mine, values as given, 2 dimensions"
    assert (data.spec.split, data.labels, data.resampled) == ("all", None, False)
    assert Data.of(data) is data


def test_of_copies_an_array_so_that_later_changes_do_not_reach_it():
    array = np.zeros((2, 2), np.float32)
    data = Data.of(array)
    array[:] = 1
    assert data.values.sum() == 0


@pytest.mark.parametrize(
    ("event_shape", "image_shape"),
    [
        ((4,), None),
        ((4, 5), (4, 5)),
        ((1, 4, 5), (4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((2, 4, 5), None),
    ],
)
def test_of_sees_which_data_are_images(event_shape, image_shape):
    assert Data.of(torch.zeros(2, *event_shape)).spec.image_shape == image_shape


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (np.zeros((0, 3)), ValueError, r"'mine' must have shape .* N >= 1, got \(0, 3\)"),
        (torch.tensor(1.0), ValueError, r"N >= 1, got \(\)"),
        (torch.tensor([[0.0], [math.nan], [math.inf]]), ValueError, "in 2 of 3 rows, .* is row 1"),
        (np.array([[1.0], [-np.inf]]), ValueError, "in 1 of 2 rows, the first is row 1"),
        (["a", "b"], TypeError, "array of real numbers, got list of dtype <U1"),
        (np.ones(2, complex), TypeError, "array of real numbers, got ndarray of dtype complex128"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
        (object(), TypeError, "array of real numbers, got object"),
    ],
)
def test_of_refuses_what_is_no_data(source, error, match):
    with pytest.raises(error, match=match):
        Data.of(source, name="mine")


def test_shapes_that_contradict_the_specification_are_refused():
    data = Data.of(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"shape \(N, \*\(2,\)\) with N >= 1, got \(3, 4\)"):
        Data(torch.zeros(3, 4), None, data.spec)
    with pytest.raises(ValueError, match=r"label for each of its 3 rows, got .* \(2,\)"):
        Data(data.values, torch.zeros(2, dtype=torch.int64), data.spec)


def test_the_fingerprint_tells_observations_apart_but_not_their_layout(binary):
    x = torch.rand(6, 4)
    same = Data.of(x).fingerprint()
    assert len(same) == 16
    assert Data.of(x.reshape(6, 2, 2)).fingerprint() == same
    assert Data.of(x.double()).fingerprint() == same
    others = [x[:5], x.flip(0), x.reshape(4, 6), x + 1e-6]
    assert same not in {Data.of(other).fingerprint() for other in others}
    assert binary.fingerprint() == binary.realised().fingerprint()


def test_moving_keeps_everything(binary):
    moved = Data(binary.values, torch.arange(2000), binary.spec, resampled=True).to("meta")
    assert moved.values.device.type == moved.labels.device.type == "meta"
    assert (moved.spec, moved.resampled) == (binary.spec, True)


def test_printing_says_what_it_is_and_not_each_value(binary):
    assert repr(binary) == (
        "Data(train, (2000, 17): grey, binary (Bernoulli draws of grey levels, seed 0), "
        "17 dimensions, drawn anew for each batch)"
    )


def test_a_subset_keeps_labels_and_specification():
    test = load_data("digits").test
    for index in (slice(10, 20), torch.arange(10, 20)):
        some = test.subset(index)
        assert torch.equal(some.values, test.values[10:20])
        assert torch.equal(some.labels, test.labels[10:20])
        assert some.spec == test.spec
    assert some.fingerprint() != test.fingerprint()
    with pytest.raises(ValueError, match="with N >= 1"):
        test.subset(slice(0))
