"""Global state is as it was when a fence ends, whatever happened inside."""

import pyro
import pytest
import torch
from pyro import infer, poutine
from torch import nn
from torch.distributions import Distribution

from pvae.fence import evaluating, fenced, module_device, resolve_device

CPU = torch.device("cpu")


class Broken(Exception):
    """What goes wrong inside a fence."""


def denormals_vanish(size: int = 1000) -> bool:
    """Half of the smallest normal number is a denormal."""
    values = torch.full((size,), torch.finfo(torch.float32).tiny)
    vanish = values / 2 == 0
    assert vanish.all() or not vanish.any(), "threads differ"
    return bool(vanish.all())


def validation() -> list[bool]:
    flags = [pyro.distributions.is_validation_enabled(), poutine.is_validation_enabled()]
    return [*flags, infer.is_validation_enabled(), Distribution._validate_args]


@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_are_flushed_inside_and_as_before_outside(flushed):
    torch.set_flush_denormal(flushed)
    with fenced(0, CPU):
        assert denormals_vanish()
    assert denormals_vanish() is flushed
    torch.set_flush_denormal(False)


def test_denormals_are_flushed_in_every_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert not denormals_vanish(10**6)
    with fenced(0, CPU):
        assert denormals_vanish(10**6)
    assert not denormals_vanish(10**6)
    torch.set_num_threads(threads)


def test_a_fence_within_a_fence_leaves_the_outer_one_whole():
    with fenced(0, CPU):
        with fenced(0, CPU):
            assert denormals_vanish()
        assert denormals_vanish()
        assert not any(validation())
    assert not denormals_vanish()
    assert all(validation())


@pytest.mark.parametrize("pyros", [False, True])
@pytest.mark.parametrize("torchs", [False, True])
def test_validation_is_off_inside_and_as_before_outside(pyros, torchs):
    """torch's flag is not always what Pyro set: other libraries set it on import."""
    pyro.enable_validation(pyros)
    Distribution.set_default_validate_args(torchs)
    before = validation()
    with fenced(0, CPU):
        assert not any(validation())
    assert validation() == before
    pyro.enable_validation(True)


@pytest.mark.parametrize("seed", [0, None])
def test_the_random_state_is_as_before_outside(seed):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with fenced(seed, CPU):
        torch.randn(100)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_names_the_draws_inside_and_none_continues():
    with fenced(7, CPU):
        first = torch.randn(3)
    torch.manual_seed(8)
    with fenced(7, CPU):
        assert torch.equal(torch.randn(3), first)
    torch.manual_seed(7)
    with fenced(None, CPU):
        assert torch.equal(torch.randn(3), first)


def test_all_is_restored_after_an_exception():
    def break_inside() -> None:
        with fenced(0, CPU):
            torch.randn(3)
            raise Broken

    before = torch.get_rng_state()
    with pytest.raises(Broken):
        break_inside()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(validation())
    assert not denormals_vanish()


def mixed_modes() -> nn.Sequential:
    """A frozen batch norm in a network that trains."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    module[1][0].eval()
    return module


def test_evaluating_has_every_module_in_evaluation_mode_without_gradients():
    module = mixed_modes()
    with evaluating(module):
        assert not any(child.training for child in module.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [None, Broken])
def test_evaluating_puts_each_mode_back(error):
    module = mixed_modes()
    before = [child.training for child in module.modules()]
    assert len(set(before)) == 2
    try:
        with evaluating(module):
            if error:
                raise error
    except Broken:
        pass
    assert [child.training for child in module.modules()] == before
    assert torch.is_grad_enabled()


def test_batch_norms_statistics_stay_while_evaluating():
    module = nn.BatchNorm1d(2)
    with evaluating(module):
        module(torch.randn(10, 2))
    assert module.num_batches_tracked == 0
    assert (module.running_mean == 0).all()


def test_auto_is_cuda_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cpu") == resolve_device(CPU) == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(ValueError, match=rf"No device '{device}' here \((.|\n)*Try device='auto'"):
        resolve_device(device)


def test_a_modules_device_is_that_of_its_parameters():
    assert module_device(nn.Linear(1, 1)) == CPU
    assert module_device(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert module_device(nn.Identity()) == CPU
