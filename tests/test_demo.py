import contextlib
import io

import pytest
import torch
from tqdm import tqdm

from pvae import demo as module
from pvae.demo import SPACES, demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quick demo: what it printed, the folder it filled, and whether it left torch alone."""
    folder = tmp_path_factory.mktemp("demo") / "pictures"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo(folder, quick=True)
    same = bool((torch.get_rng_state() == state).all()) and torch.get_num_threads() == threads
    return printed.getvalue(), folder, same


def test_the_demo_writes_the_pictures_it_names(run):
    printed, folder, _ = run
    written = {str(path) for path in folder.iterdir()}
    named = {line.strip() for line in printed.splitlines() if line.endswith(".png")}
    assert named == written
    kinds = ("training", "samples", "reconstructions", "interpolations", "bounds")
    expected = {f"{space.short}-{kind}.png" for space in SPACES for kind in kinds}
    assert {path.name for path in folder.iterdir()} >= expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_the_demo_reports_every_model_in_a_table_of_its_space(run):
    printed, _, _ = run
    for number, space in enumerate(SPACES, 1):
        _, _, table = printed.partition(f"\n{number}. {space.title}\n")
        table, _, _ = table.partition("\nNote:")
        header, *rows = table.strip().splitlines()[2:]
        assert header.split()[:4] == ["ELBO", "L_50", "L_100", "exact"]
        assert len(rows) == len(space.entries)
        assert all(any(row.startswith(entry.name) for row in rows) for entry in space.entries)
    assert "cannot be compared" in printed


def test_ppca_has_its_exact_value_beside_its_bounds(run):
    printed, folder, _ = run
    (row,) = [line for line in printed.splitlines() if line.startswith("PPCA") and "." in line]
    elbo, low, high, exact = map(float, row.removeprefix("PPCA, ELBO").split()[:4])
    assert elbo < low < high < exact
    assert (folder / "continuous-bounds-and-exact.png").exists()


def test_the_demo_leaves_torch_as_it_was(run):
    assert run[2]


def test_the_demo_gives_the_same_numbers_each_time():
    one, two = (_numbers() for _ in range(2))
    assert one == two


def _numbers() -> dict[str, float]:
    silent = contextlib.redirect_stdout(io.StringIO())
    with module._reproducible(), tqdm(disable=True) as bar, silent:
        results = module._run(SPACES[0], quick=True, bar=bar)
    return {name: float(result.log_p.mean()) for name, result in results.evaluations.items()}
