"""Data that stream by: the same fit as from memory, whatever the loader draws."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pvae
from pvae import svi
from pvae.batches import Resident, Streamed, source_of
from tests.fitting import assert_same_fit, binary, declare, fit, masked_by_a_column, same, traced

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 8, "epochs": 4, "lr": 1e-2, "seed": 5}  # 20 data: 8, 8 and 4


def vae():
    return declare("vae")


def eager(*args, **settings):
    return fit(*args, compile=False, **settings)


def rows() -> Dataset:
    return TensorDataset(binary())


class SameOrder:
    """Batches of indices in the order in which data in memory are gone through.

    A source looks at the first batch before the first epoch, for its shapes.
    """

    def __init__(self, resident: Resident):
        self.resident, self.begun = resident, 0

    def __iter__(self):
        number = max(1, self.begun)
        self.begun += 1
        for (index,), _ in self.resident.epoch(number):
            yield index.tolist()

    def __len__(self):
        return self.resident.num_batches


def in_same_order(model, data, dataset, **settings) -> DataLoader:
    resident = source_of(model, data, SETTINGS["batch_size"], SETTINGS["seed"], CPU)
    assert isinstance(resident, Resident)
    return DataLoader(dataset, batch_sampler=SameOrder(resident), **settings)


# ------------------------------------------------------------------------------ as from memory


@pytest.mark.parametrize("objective", [pvae.ELBO(), pvae.IWAE(3)], ids=repr)
@pytest.mark.parametrize("run", [eager, traced])
def test_streaming_in_the_order_of_memory_is_the_same_fit(run, objective):
    loader = in_same_order(vae(), binary(), rows())
    found = run(vae(), loader, objective, **SETTINGS)
    assert_same_fit(run(vae(), binary(), objective, **SETTINGS), found)
    assert found.history.index[-1] == 4
    assert found.history["step"].iloc[-1] == 12


class Mappings(Dataset):
    def __init__(self, columns: dict[str, Tensor]):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


@pytest.mark.parametrize("run", [eager, traced])
def test_columns_by_name_stream_as_from_memory(run):
    data = {"x": binary(), "seen": binary()[:, :1]}
    loader = in_same_order(masked_by_a_column(), data, Mappings(data))
    found = run(masked_by_a_column(), loader, **SETTINGS)
    assert_same_fit(run(masked_by_a_column(), data, **SETTINGS), found)


class Swapping(Mappings):
    """Whose columns come in another order for every other row, and so for some of the batches."""

    def __getitem__(self, i):
        named = super().__getitem__(i)
        return named if i % 2 else dict(reversed(named.items()))


@pytest.mark.parametrize("run", [eager, traced])
def test_columns_that_change_their_order_are_told_by_name(run):
    data = {"x": binary(), "seen": binary()[:, :1]}
    loader, same = (in_same_order(masked_by_a_column(), data, Swapping(data)) for _ in range(2))
    orders = [list(batch) for batch in same]
    assert ["x", "seen"] in orders
    assert ["seen", "x"] in orders
    found = run(masked_by_a_column(), loader, **SETTINGS)
    assert_same_fit(run(masked_by_a_column(), data, **SETTINGS), found)


def test_labels_beside_images_are_left_alone():
    pairs = TensorDataset(binary(), torch.arange(20))
    found = eager(vae(), in_same_order(vae(), binary(), pairs), **SETTINGS)
    assert_same_fit(eager(vae(), binary(), **SETTINGS), found)


def test_a_worker_process_loads_the_same():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*use of fork", DeprecationWarning
        )  # Python's, of threads
        loader = in_same_order(vae(), binary(), rows(), num_workers=1)
        found = eager(vae(), loader, **SETTINGS | {"epochs": 2})
    assert_same_fit(eager(vae(), binary(), **SETTINGS | {"epochs": 2}), found)


class Flowing(IterableDataset):
    """Of unknown length, though it does end."""

    def __iter__(self):
        yield from binary()


@pytest.mark.parametrize("speed", ["eager", "traced"])
def test_an_iterable_without_length_is_gone_through_in_its_own_order(monkeypatch, speed):
    monkeypatch.setattr(svi, "_speed", lambda *args: speed)
    expected = fit(vae(), DataLoader(rows(), batch_size=8), **SETTINGS)
    loaded = fit(vae(), DataLoader(Flowing(), batch_size=8), **SETTINGS)
    itself = fit(vae(), Flowing(), **SETTINGS)
    assert_same_fit(expected, loaded)
    assert_same_fit(expected, itself)
    assert loaded.history["step"].tolist() == [3, 6, 9, 12]
    assert loaded.settings["num_data"] is None
    by_steps = fit(vae(), Flowing(), **SETTINGS | {"epochs": None, "steps": 7})
    assert (by_steps.stopped, by_steps.history["step"].iloc[-1]) == ("steps", 7)


def test_an_iterable_of_unknown_length_is_not_taken_for_a_long_one():
    """A few epochs of few data are over sooner than they are compiled."""
    assert fit(vae(), Flowing(), **SETTINGS).settings["compiled"] is False


# ------------------------------------------------------------------------------ the order of data


def order(data, seed: int, number: int) -> Tensor:
    source = source_of(vae(), data, 8, seed, CPU)
    assert isinstance(source, Streamed)
    return torch.cat([rows for (rows,), _ in source.epoch(number)])


def distinct() -> Tensor:
    """20 data, no two of them equal."""
    return (torch.arange(1, 21)[:, None] // 2 ** torch.arange(6) % 2).float()


@pytest.mark.parametrize(
    "load",
    [lambda data: data, lambda data: DataLoader(data, 8, shuffle=True)],
    ids=["set", "loader"],
)
def test_a_random_order_is_that_of_the_seed_and_the_epoch(load):
    data = load(TensorDataset(distinct()))
    first = order(data, seed=0, number=1)
    assert torch.equal(first, order(data, seed=0, number=1))
    assert not torch.equal(first, order(data, seed=1, number=1))
    assert not torch.equal(first, order(data, seed=0, number=2))
    assert sorted(first.tolist()) == sorted(distinct().tolist())


def test_batches_are_numbered_through():
    source = source_of(vae(), rows(), 8, 0, CPU)
    numbers = [index.tolist() for _, index in source.epoch(1)]
    assert numbers == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


@pytest.mark.parametrize("run", [eager, traced])
def test_a_fit_with_a_random_order_repeats_with_its_seed(run):
    one, again, other = (
        run(vae(), DataLoader(rows(), 8, shuffle=True), **SETTINGS | {"seed": seed})
        for seed in (0, 0, 1)
    )
    assert_same_fit(one, again)
    assert not same(one.model, other.model)


class Drawing(Dataset):
    """Draws a random number for each datum, which it adds, times `size`, to it."""

    def __init__(self, size: float):
        self.size = size

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.randn(6, generator=torch.Generator().manual_seed(i)) + self.size * torch.rand(
            6
        )


def test_what_a_loader_draws_disturbs_neither_particles_nor_the_caller():
    def model():
        return declare("gaussian_vae")

    still = TensorDataset(torch.stack([Drawing(0.0)[i] for i in range(20)]))
    state = torch.get_rng_state()
    fits = [eager(model(), DataLoader(d, batch_size=8), **SETTINGS) for d in (still, Drawing(0.0))]
    assert_same_fit(*fits)
    torch.set_rng_state(state)
    noisy = [eager(model(), DataLoader(Drawing(1.0), batch_size=8), **SETTINGS)]
    torch.rand(3)
    noisy.append(eager(model(), DataLoader(Drawing(1.0), batch_size=8), **SETTINGS))
    assert_same_fit(*noisy)
    assert not same(noisy[0].model, fits[0].model)


@pytest.mark.parametrize("run", [eager, traced])
def test_the_callers_random_state_stays_as_it_was(run):
    loader = DataLoader(rows(), 8, shuffle=True)
    model = pvae.models.vae(6, 2, (5,))
    state = torch.get_rng_state()
    run(model, loader, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------ bad batches


def ready(*batches) -> DataLoader:
    """A loader of these batches, as they are."""
    return DataLoader(list(batches), batch_size=None)


def spoilt(value: float) -> Tensor:
    x = binary(8)
    x[3, 2] = value
    return x


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (binary(8)[:, :5], ValueError, r"shape \(N, 6\), got \(8, 5\)"),
        (spoilt(torch.nan), ValueError, "NaN or infinite values in 1 of 8 rows"),
        (spoilt(2.0), ValueError, "outside .*support"),
        ("text", TypeError, r"A loader must yield tensors \(B, \*event\), .*; got str"),
        ([1.0, 2.0], TypeError, "A loader must yield tensors .*; got list"),
    ],
    ids=["shape", "nan", "support", "text", "numbers"],
)
def test_bad_batches_are_refused_as_they_come(bad, error, match, first):
    batches = [bad] if first else [binary(8), binary(8), bad]
    with pytest.raises(error, match=match):
        eager(vae(), ready(*batches), epochs=1)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="yields no batch: expected at least one"):
        eager(vae(), ready(), epochs=1)


def test_a_nan_is_told_by_its_number_in_the_stream():
    """The weights are too large to square after the first step: the second one fails."""
    settings = {"lr": 1e30, "optimizer": torch.optim.SGD, "epochs": 1}
    match = r"at step 2, epoch 1: first in .*datum (8|9|1[0-5])\. The model keeps its last good"
    with pytest.raises(FloatingPointError, match=match):
        eager(vae(), DataLoader(rows(), batch_size=8), **settings)


# ------------------------------------------------------------------------------ the fit around it


@pytest.mark.parametrize("run", [eager, traced])
def test_a_run_on_a_loader_resumes_to_the_same_numbers(tmp_path, run):
    def go(epochs, **settings):
        loader = DataLoader(rows(), 8, shuffle=True)
        return run(vae(), loader, **SETTINGS | {"epochs": epochs} | settings)

    go(2, folder=tmp_path)
    resumed = go(5, folder=tmp_path)
    assert_same_fit(go(5), resumed)


def test_settings_and_summary_say_that_data_were_streamed():
    fitted = eager(vae(), DataLoader(rows(), batch_size=8), **SETTINGS)
    assert fitted.settings["data"] == "streamed by TensorDataset"
    assert fitted.settings["batch_size"] == 8
    assert fitted.settings["num_data"] == 20
    assert fitted.summary().loc["data", "value"] == "streamed by TensorDataset"
    assert "streamed by TensorDataset" in repr(fitted)


def test_batches_that_are_ready_are_not_counted_as_data():
    fitted = eager(vae(), ready(binary(8), binary(8)), epochs=1)
    assert fitted.settings["num_data"] in (None, 16)


@pytest.mark.parametrize("run", [eager, traced])
def test_validation_and_patience_go_with_a_loader(run):
    """At rate 0 no epoch is better than the first."""
    settings = SETTINGS | {"lr": 0.0, "epochs": 9, "patience": 2, "validation": binary(10)}
    fitted = run(vae(), DataLoader(rows(), batch_size=8), **settings)
    assert (fitted.stopped, fitted.best_epoch, len(fitted.history)) == ("patience", 1, 3)
    assert fitted.settings["num_validation"] == 10
    assert fitted.history["valid"].nunique() == 1
