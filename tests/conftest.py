"""What every test starts from (a seed, an empty param store, a home of its own), and must leave.

Set before torch and matplotlib are imported, since both read the environment only once.
"""

import os
import tempfile
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the environment of the first process
    home = tempfile.TemporaryDirectory(prefix="pvae-tests-")
    os.environ["HOME"] = home.name  # caches, kernels' histories and data sets belong to no user
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["OMP_NUM_THREADS"] = "1"  # for each process, also for those that tests start
    for elsewhere in ("PVAE_DATA", "MPLCONFIGDIR", "IPYTHONDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        os.environ.pop(elsewhere, None)

import pyro
import pytest
import torch


def global_state() -> dict[str, object]:
    """Settings of the whole process that a test, or the library under test, could leave changed."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return {
        "distributions validated": torch.distributions.Distribution._validate_args,
        "default dtype": torch.get_default_dtype(),
        "gradients recorded": torch.is_grad_enabled(),
        "denormals flushed": bool(smallest / 2 == 0),  # torch can set the flag, not tell it
    }


@pytest.fixture(autouse=True)
def fresh_global_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed everything; afterwards demand the global state back, and Pyro's param store empty."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    before = global_state()
    yield
    after = global_state()
    left_params = sorted(pyro.get_param_store())
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)
    torch.set_grad_enabled(True)
    assert after == before, "the test changed the state of the whole process"
    if not request.node.get_closest_marker("uses_param_store"):
        assert left_params == [], "the test left parameters in Pyro's global param store"
