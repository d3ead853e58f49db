"""A run killed at any moment resumes to the same numbers, and a folder is data, never code."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, checkpoint
from pvae.nets import Linear
from tests.fitting import TRUTH, parameters, ppca, same

X = TRUTH.sample(50)


def fit(model, folder=None, **settings):
    defaults = {"batch_size": 20, "epochs": 4, "lr": 0.01, "progress": False, "folder": folder}
    return pvae.fit(model, settings.pop("data", X), **{**defaults, **settings})


def numbers(fitted) -> pd.DataFrame:
    return fitted.history.drop(columns="seconds")


def assert_same(one, other) -> None:
    """Bit for bit."""
    assert same(one.model, other.model)
    pd.testing.assert_frame_equal(numbers(one), numbers(other), check_exact=True)
    assert (one.stopped, one.best_epoch) == (other.stopped, other.best_epoch)


# ------------------------------------------------------------------------------ killed and resumed

# A process that forks the same run again and again, and kills it at a random moment after it has
# got one checkpoint further. torch and Pyro are imported once.
KILLED = """
import os, pathlib, random, signal, sys, time
import torch
import pvae

folder, moments = sys.argv[1], random.Random(0)
digits = pvae.load_data("digits")  # binarised anew for each batch

def run(folder):
    torch.manual_seed(0)
    model = pvae.models.vae(data_size=64, latent_size=2, hidden=(8,))
    optimizer = lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)
    scheduler = lambda o: torch.optim.lr_scheduler.StepLR(o, 5)
    pvae.fit(model, digits.train, pvae.IWAE(2), epochs=25, batch_size=256, lr=0.01, patience=20,
             optimizer=optimizer, scheduler=scheduler, validation=digits.valid, clip_norm=5.0,
             device="cpu", progress=False, folder=folder)

def saved():
    path = pathlib.Path(folder, "run.json")
    return path.read_text() if path.exists() else ""

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

run(folder + "-whole")
kills = 0
while True:
    before, child = saved(), os.fork()
    if child == 0:
        run(folder)
        os._exit(0)
    while saved() == before and not ended(child):
        time.sleep(0.001)
    time.sleep(moments.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        break
    kills += 1
print(kills)
"""


def test_a_process_killed_at_random_moments_resumes_to_the_same_numbers(tmp_path):
    folder = str(tmp_path / "run")
    command = [sys.executable, "-c", KILLED, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "too few kills to show anything"
    resumed, whole = pvae.load(folder), pvae.load(folder + "-whole")
    assert len(whole.history) == 25
    assert_same(resumed, whole)


class Killed(BaseException):
    """What no `except Exception` or `except OSError` catches."""


def interrupt(monkeypatch, moment: int, error: BaseException) -> None:
    """Raise before the n-th of all operations that change files."""
    count = 0

    def counted(operation):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                raise error
            return operation(*args, **kwargs)

        return run

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


# 7 operations write a checkpoint, and from the second one on 2 more remove the one before.
@pytest.mark.parametrize("moment", range(1, 26))
def test_a_run_killed_between_two_file_operations_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, moment
):
    settings = {"epochs": 3, "validation": X[:10]}
    with monkeypatch.context() as context:
        interrupt(context, moment, Killed())
        with pytest.raises(Killed):
            fit(ppca(), tmp_path, **settings)
    if checkpoint.has_checkpoint(tmp_path):
        meta, weights, training = checkpoint.read(tmp_path)
        state = checkpoint.unpack(meta["state"], training)
        assert len(state["history"]) == max(0, (moment - 6) // 9)
        assert weights.keys() == checkpoint.module_tensors(ppca()).keys()
    else:
        assert moment <= 7
    assert_same(fit(ppca(), tmp_path, **settings), fit(ppca(), **settings))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + 2 * [".safetensors"]


def one_cycle(optimizer):
    return OneCycleLR(optimizer, 0.05, total_steps=8)


OPTIMISERS = {
    "adam": torch.optim.Adam,
    "adamw amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
    "nadam": torch.optim.NAdam,
    "sgd momentum": lambda p, lr: torch.optim.SGD(p, lr=lr / 1000, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "lr tensor": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr)),
}
SCHEDULERS = {
    "step": lambda o: StepLR(o, 2),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "one cycle": one_cycle,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMISERS.values(), ids=OPTIMISERS)
def test_any_optimiser_resumes(tmp_path, optimizer, dtype):
    settings = {"optimizer": optimizer, "data": X.to(dtype)}
    half = fit(ppca().to(dtype), tmp_path, epochs=3, **settings)
    resumed = fit(ppca().to(dtype), tmp_path, epochs=6, **settings)
    whole = fit(ppca().to(dtype), epochs=6, **settings)
    assert not torch.equal(parameters(half.model), parameters(whole.model))
    assert_same(resumed, whole)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_any_scheduler_resumes(tmp_path, scheduler):
    settings = {"scheduler": scheduler, "validation": X[:20]}
    fit(ppca(), tmp_path, epochs=3, **settings)
    whole = fit(ppca(), epochs=6, **settings)
    assert whole.history["lr"].nunique() > 2
    assert_same(fit(ppca(), tmp_path, epochs=6, **settings), whole)


def test_early_stopping_resumes_with_its_best_weights(tmp_path):
    """Validation data at which the first epochs are the best, so that patience ends the run."""
    settings = {"validation": -X, "patience": 4, "lr": 0.02}
    whole = fit(ppca(), epochs=50, **settings)
    assert whole.stopped == "patience"
    fit(ppca(), tmp_path, epochs=whole.best_epoch + 2, **settings)
    assert_same(fit(ppca(), tmp_path, epochs=50, **settings), whole)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = fit(ppca(), tmp_path, validation=X[:10])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = fit(ppca(seed=5), tmp_path, validation=X[:10])
    assert_same(again, first)
    assert again.history.equals(first.history)  # seconds as well
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_buffers_and_tied_weights_resume(tmp_path):
    whole = fit(normalised())
    fit(normalised(), tmp_path, epochs=2)
    resumed = fit(normalised(), tmp_path)
    assert_same(resumed, whole)
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert any(name.endswith("running_mean") for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Normalised(nn.Module):
    """Batch normalisation, and one layer used twice under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)
        self.second = self.first

    def forward(self, z: Tensor) -> Tensor:
        h = self.second(self.norm(self.first(z.reshape(-1, 3)))).tanh()
        return self.last(h).reshape(*z.shape[:-1], 5)


def normalised() -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(Normal, 3),
        x=Observed(Normal, 5, given="z", net=Normalised(), scale=1.0),
        guide={"z": Latent(Normal, 3, given="x", net=Linear())},
    ).double()


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"lr": 0.02}, "lr: 0.01 there, 0.02 here"),
        ({"batch_size": 10}, "batch_size: 20 there, 10 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"clip_norm": 1.0}, "clip_norm: None there, 1.0 here"),
        ({"patience": 2}, "patience: None there, 2 here"),
        ({"objective": pvae.IWAE(2)}, r"objective: 'ELBO\(num_particles=1\)' there, 'IWAE\("),
        ({"optimizer": torch.optim.SGD}, "optimizer: 'Adam' there, 'SGD' here"),
        ({"scheduler": one_cycle}, "scheduler: None there, 'one_cycle' here"),
        ({"data": X[:49]}, r"num_data: 50 there, 49 here; data_fingerprint: '\w+' there, '\w+' h"),
        ({"data": X + 1}, r"\(data_fingerprint: '\w+' there, '\w+' here\)"),
        ({"validation": X[10:20]}, r"\(validation_fingerprint: '\w+' there, '\w+' here\)"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, found):
    settings = {"validation": X[:10]}
    fit(ppca(), tmp_path, epochs=1, **settings)
    with pytest.raises(ValueError, match=rf"holds another run \(.*{found.lstrip(chr(92) + '(')}"):
        fit(ppca(), tmp_path, **{**settings, **changed})


def test_another_model_is_refused(tmp_path):
    fit(ppca(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"\(declaration: 'its own' there, \"this model's\" here"):
        fit(ppca(latent_size=2), tmp_path)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", [9, 12, 14])  # while weights, state, run.json are written
def test_a_full_disk_says_so_and_keeps_the_checkpoint_before(tmp_path, monkeypatch, moment):
    with monkeypatch.context() as context:
        interrupt(context, moment, FULL)
        with pytest.raises(OSError, match=r"could not be written to .*No space left.*untouched"):
            fit(ppca(), tmp_path)
    assert len(pvae.load(tmp_path).history) == 0
    assert not list(tmp_path.glob("*.part"))
    assert_same(fit(ppca(), tmp_path), fit(ppca()))


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written to .*file.*choose another `folder`"):
        fit(ppca(), tmp_path / "file" / "run")


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: .*run\.json is missing"):
        pvae.load(tmp_path / "nowhere")


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    "json cut off": (lambda folder: truncate(folder / "run.json"), "is damaged: "),
    "json of another kind": (lambda folder: (folder / "run.json").write_text("[1]"), "is damaged"),
    "no text": (lambda folder: (folder / "run.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "another format": (lambda folder: edit(folder, format=99), "damaged: format 99, expected 1"),
    "parts missing": (lambda folder: edit(folder, files={}), "is damaged: 'weights'"),
    "weights cut off": (lambda f: truncate(f / "weights.1.safetensors"), "weights of .* damaged"),
    "state cut off": (lambda f: truncate(f / "training.1.safetensors"), "weights of .* damaged"),
    "weights missing": (lambda f: (f / "weights.1.safetensors").unlink(), "damaged: No such file"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_told(tmp_path, damage, match):
    fit(ppca(), tmp_path, epochs=1)
    damage(tmp_path)
    with pytest.raises(ValueError, match=match):
        pvae.load(tmp_path)
    with pytest.raises(ValueError, match=match):
        fit(ppca(), tmp_path)


# ------------------------------------------------------------------------------ loading


def test_a_loaded_model_has_the_best_weights_and_evaluates_equally(tmp_path):
    settings = {"validation": -X, "patience": 2, "lr": 0.05, "epochs": 50}
    fitted, loaded = fit(ppca(), tmp_path, **settings), pvae.load(tmp_path)
    assert fitted.stopped == "patience"
    assert_same(loaded, fitted)
    assert loaded.history.equals(fitted.history)
    assert loaded.settings == fitted.settings
    assert repr(loaded) == repr(fitted)
    assert next(loaded.model.parameters()).dtype == torch.float64
    one, other = (pvae.evaluate(f.model, X, num_particles=40) for f in (fitted, loaded))
    assert one.per_datum.equals(other.per_datum)


class Subclass(LatentModel):
    """Overrides a program, as the contract allows: code that no folder holds."""

    def model(self, batch=None, num_data=None):
        return super().model(batch, num_data)


def subclass() -> LatentModel:
    torch.manual_seed(0)
    return Subclass(z=Latent(Normal, 2), x=Observed(Normal, 5, given="z", net=Linear()))


def pair() -> PyroPair:
    torch.manual_seed(0)
    net = nn.Linear(3, 5).double()

    def model(x: Tensor) -> None:
        decoder = pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param(
            "scale", x.new_ones(3), constraint=torch.distributions.constraints.positive
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x[:, :3], scale).to_event(1))

    return PyroPair(model, guide)


@pytest.mark.parametrize("make", [subclass, normalised, pair])
def test_a_model_that_is_code_is_passed_by_the_caller(tmp_path, make):
    fitted = fit(make(), tmp_path)
    with pytest.raises(ValueError, match=r"is code: build it, and pass it by `model=`"):
        pvae.load(tmp_path)
    model = make()
    assert_same(pvae.load(tmp_path, model=model), fitted)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    fit(ppca(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"of another shape \['guide_modules.*when it was fitted"):
        pvae.load(tmp_path, model=ppca(latent_size=2))
    with pytest.raises(ValueError, match=r"missing \['model_modules\.\w+.*', .*unknown \['guide_m"):
        pvae.load(tmp_path, model=pvae.models.mixture_of_gaussians(5, 2))


@pytest.mark.parametrize(
    ("site", "change", "match"),
    [
        ("x", {"distribution": "os.system"}, r"pyro\.distributions has no .* 'os\.system'"),
        ("x", {"distribution": "constraints"}, r"has no distribution 'constraints'"),
        ("x", {"net": {"net": "os.system", "hidden": ["id"]}}, r"names the net 'os\.system'"),
        ("z", {"distribution": "__import__"}, r"has no distribution '__import__'"),
    ],
)
def test_loading_runs_no_code(tmp_path, monkeypatch, site, change, match):
    fit(ppca(), tmp_path, epochs=1)
    declaration = json.loads((tmp_path / "run.json").read_text())["declaration"]
    declaration["sites"][site] |= change
    edit(tmp_path, declaration=declaration)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("code was run"))
    with pytest.raises(ValueError, match=match):
        pvae.load(tmp_path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    """Names in run.json are names in the folder, whatever path they pretend."""
    fit(ppca(), tmp_path / "other", epochs=1)
    fit(ppca(), tmp_path / "run", epochs=1)
    (tmp_path / "run" / "weights.1.safetensors").unlink()
    files = {"weights": "../other/weights.1.safetensors", "training": "training.1.safetensors"}
    edit(tmp_path / "run", files=files)
    with pytest.raises(ValueError, match="is damaged: No such file"):
        pvae.load(tmp_path / "run")


# ------------------------------------------------------------------------------ plain data


def equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and (one == other or one != one)


def test_nested_state_survives_json():
    """What the optimisers of torch keep: numbered dictionaries, lists of tensors, infinities."""
    shared = torch.arange(3.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "old_dirs": [shared, shared[1:]], "al": None}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.999], "params": [0, 1], "maximize": False}],
        "best": float("-inf"),
        "worst": float("inf"),
        "loss": float("nan"),
        "same tensor again": shared,
        "empty": {},
        "items": {"tensor": "a name that looks like the format's own", "items": []},
        "bytes": torch.get_rng_state(),
        "name": "adam",
    }
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(checkpoint.pack("state", state, tensors), allow_nan=False))
    assert equal(checkpoint.unpack(packed, tensors), state)


def test_the_state_of_lbfgs_survives_the_disk(tmp_path):
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.LBFGS([parameter], max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tensors: dict[str, Tensor] = {}
    meta = {"state": checkpoint.pack("state", optimizer.state_dict(), tensors)}
    checkpoint.write(tmp_path, meta, {"p": parameter}, tensors, stamp=1)
    meta, weights, tensors = checkpoint.read(tmp_path)
    assert equal(checkpoint.unpack(meta["state"], tensors), optimizer.state_dict())
    assert torch.equal(weights["p"], parameter.detach())


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(TypeError, match=r"state\.hook holds a function, which a checkpoint cannot"):
        checkpoint.pack("state", {"hook": one_cycle}, {})


def test_a_run_that_ended_within_an_epoch_does_not_go_on(tmp_path):
    settings = {"batch_size": 8, "progress": False, "folder": tmp_path}
    x = torch.randn(20, 5)  # three steps an epoch
    pvae.fit(ppca(), x, steps=4, **settings)
    with pytest.raises(ValueError, match="ended within an epoch, after 4 steps of 3 an epoch"):
        pvae.fit(ppca(), x, steps=9, **settings)
    assert len(pvae.fit(ppca(), x, steps=4, **settings).history) == 2
