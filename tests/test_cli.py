import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import pvae
from pvae import cli, named
from pvae.data import DATASETS, TABLES, load_data
from pvae.objectives import ELBO, IWAE, Renyi

COMMANDS = ("demo", "fit", "evaluate", "compare", "models", "data")

MY_MODEL = """
from torch import nn
from beside import SIZE
from pyro.distributions import Bernoulli, Normal
from pvae import Latent, LatentModel, Observed
from pvae.nets import MLP


class Own(nn.Linear):
    pass


def my_model(data_size, latent_size=SIZE, net=None):
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Bernoulli, data_size, given="z", net=net or MLP(4)),
        guide={"z": Latent(Normal, latent_size, given="x", net=MLP(4))},
        name="mine",
    )


def with_own_net(data_size):
    return my_model(data_size, net=Own(SIZE, data_size))


def no_model():
    return "nothing"
"""

MY_PAIR = """
import pvae, pyro, torch
from pyro.distributions import Bernoulli, Normal


def my_pair(data_size):
    decoder, encoder = torch.nn.Linear(2, data_size), torch.nn.Linear(data_size, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(encoder(x), 1.0).to_event(1))

    return pvae.PyroPair(model, guide)
"""

GIVEN_NUMBERS = """
from pyro.distributions import Normal
from pvae import Given, Latent, LatentModel, Observed
from pvae.nets import Linear


def given_numbers(data_size):
    return LatentModel(
        u=Given(3),
        z=Latent(Normal, 2),
        x=Observed(Normal, data_size, given=("z", "u"), net=Linear()),
    )
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    Path("my_model.py").write_text(MY_MODEL)
    Path("my_pair.py").write_text(MY_PAIR)
    Path("given_numbers.py").write_text(GIVEN_NUMBERS)
    Path("beside.py").write_text("SIZE = 3\n")


def pvae_command(line: str, **env: str) -> Result:
    return CliRunner().invoke(cli.app, line, env=env, prog_name="pvae")


def works(line: str) -> str:
    result = pvae_command(line)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(line: str, code: int = 1) -> str:
    result = pvae_command(line)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return " ".join(result.stderr.split())


VAE = "fit vae --epochs 1 --set latent_size=2 --set hidden=4 --folder"
CONV = "fit conv_vae --epochs 1 --set latent_size=2 --set channels=4 --folder"
CONDITIONAL = "fit conditional_vae --epochs 1 --set latent_size=2 --set hidden=4 --folder"


# ---------------------------------------------------------------------------------- it teaches


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_shows_how_to_call_it(command):
    assert f"\n  pvae {command}" in works(f"{command} --help")


def test_the_overview_names_every_command_and_the_version():
    overview = works("--help")
    assert all(f"\n  {command} " in overview for command in COMMANDS)
    assert works("--version") == f"pvae {pvae.__version__}\n"


def test_models_and_data_are_listed_with_what_can_be_set():
    listed = works("models")
    assert all(f"{name}\n" in listed for name in pvae.models.__all__)
    assert "  data_size=784, latent_size=50, hidden=(200, 200)\n" in listed
    assert "p(c) = Categorical(pi), p(x | c) = Bernoulli(p_c)." in listed
    rows = {line.split()[0]: line for line in works("data").splitlines() if line}
    assert rows.keys() >= DATASETS.keys() | TABLES.keys()
    assert rows["digits"].split()[1:8] == ["1257", "180", "360", "8", "x", "8", "17"]
    assert rows["wine"].split()[1:5] == ["142", "18", "18", "13"]
    assert rows["ring"].split()[1:5] == ["8000", "1000", "1000", "2"]
    known = DATASETS | TABLES
    assert len({rows[name].index(known[name].title) for name in known}) == 1, "in one column"


# ---------------------------------------------------------------------------------- it works


def test_fit_then_evaluate_agrees_with_the_library():
    assert "Next: pvae evaluate run" in works(f"{VAE} run --objective iwae-3 --batch-size 100")
    printed = works("evaluate run --num-particles 20 --device cpu")
    result = pvae.evaluate(pvae.load("run").model, load_data("digits").test, 20)
    assert result.verdict in printed
    table = pd.read_csv("run/evaluation.csv", index_col=0)
    expected = result.summary()
    pd.testing.assert_series_equal(table["value"], expected["value"], check_names=False)
    assert set(table["data"]) == {result.spec.space()}
    settings = pvae.load("run").settings
    assert settings["objective"] == "IWAE(num_particles=3)"
    assert settings["batch_size"] == 100
    assert pvae.load("run").model.sites["z"].shape == (2,)


def test_the_same_command_continues_a_run():
    works(f"{VAE} run")
    works(f"{VAE} run --epochs 3")
    works(f"{VAE} whole --epochs 3")
    continued, whole = pvae.load("run").history, pvae.load("whole").history
    assert continued["train"].to_list() == whole["train"].to_list()
    assert len(whole) == 3


def test_a_run_remembers_its_data_and_can_be_evaluated_by_another_proposal():
    works("fit gaussian_vae --epochs 1 --set hidden=4 --dequantisation uniform --folder run")
    printed = works("evaluate run --num-particles 20 --proposal prior")
    assert "uniform dequantisation of 17 levels" in printed
    assert "20 particles from the prior" in printed


def test_another_proposal_leaves_the_tables_of_others_as_they_are():
    works("fit ppca --set latent_size=2 --folder run --epochs 1 --dequantisation uniform")
    works("evaluate run --num-particles 20")
    before = Path("run/evaluation.csv").read_text()
    assert "from the refined guide" in works("evaluate run --num-particles 20 --proposal refined")
    assert Path("run/evaluation.csv").read_text() == before
    assert Path("run/evaluation-refined.csv").exists()


def test_seeds_give_initial_weights():
    for run, seed in (("one", 1), ("again", 1), ("two", 2)):
        works(f"{VAE} {run} --seed {seed}")
    one, again, two = (pvae.load(run).history["train"].item() for run in ("one", "again", "two"))
    assert one == again != two


def test_compare_ranks_runs():
    works(f"{VAE} vae")
    works("fit mixture_of_bernoullis --epochs 1 --set num_components=2 --folder mixture")
    printed = works("compare vae mixture --num-particles 20")
    test = load_data("digits").test
    results = {run: pvae.evaluate(pvae.load(run).model, test, 20) for run in ("vae", "mixture")}
    assert repr(pvae.compare(results)) in printed


def test_images_stay_images_for_models_that_take_their_shape():
    works(f"{CONV} run")
    works(f"{VAE} flat")
    works("evaluate run --num-particles 20 --device cpu")
    model, images = pvae.load("run").model, load_data("digits", flatten=False).test
    assert model.inputs["x"].shape == (1, 8, 8)
    expected = pvae.evaluate(model, images, 20).summary()["value"]
    found = pd.read_csv("run/evaluation.csv", index_col=0)["value"]
    pd.testing.assert_series_equal(found, expected, check_names=False)
    assert "flat" in works("compare run flat --num-particles 2")  # of the same bits


@pytest.mark.parametrize("model", ["conditional_vae", "semi_supervised_vae"])
def test_a_model_that_takes_a_category_gets_the_datas_labels(model):
    fit = CONDITIONAL.replace("conditional_vae", model)
    works(f"{fit} run")
    works("evaluate run --num-particles 20 --device cpu")
    test = load_data("digits").test
    expected = pvae.evaluate(pvae.load("run").model, {"x": test, "y": test.labels}, 20)
    found = pd.read_csv("run/evaluation.csv", index_col=0)["value"]
    pd.testing.assert_series_equal(found, expected.summary()["value"], check_names=False)
    works(f"{fit} other --seed 1")
    assert "other" in works("compare run other --num-particles 2")


def test_a_users_own_table_is_found_again_from_any_folder(monkeypatch):
    frame = pd.DataFrame(np.random.default_rng(0).normal(5.0, 2.0, (200, 3)), columns=[*"abc"])
    frame.to_csv("my_table.csv", index=False)
    settings = "--data my_table.csv --standardisation columns"
    works(f"fit ppca --epochs 1 --set latent_size=1 {settings} --folder run")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    printed = works("evaluate ../run --num-particles 2")
    assert "20 data of my_table, values as given, columns standardised" in printed
    test = load_data("../my_table.csv", standardisation="columns").test
    expected = float(pvae.exact.log_prob(pvae.load("../run").model, test).mean())
    found = pd.read_csv("../run/evaluation.csv", index_col=0).loc["log p(x)", "value"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_users_own_images_and_their_labels():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = Path("my_images", f"kind {number % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    own = "--data my_images"
    works(f"{CONV} run --set pixels=normal --dequantisation uniform {own}")
    assert pvae.load("run").model.inputs["x"].shape == (3, 4, 5)
    assert "uniform dequantisation of 256 levels" in works("evaluate run --num-particles 2")
    works(f"{CONDITIONAL} labelled --binarisation threshold --set categories=2 {own}")
    assert pvae.load("labelled").model.inputs["y"].categories == 2


def test_a_run_of_the_first_version_told_neither_standardisation_nor_layout():
    works(f"{VAE} run")
    path = Path("run", cli.COMMAND)
    told = json.loads(path.read_text())
    kept = {key: told[key] for key in told if key not in named.OF_LATER}
    assert len(kept) == len(told) - 3
    path.write_text(json.dumps(kept))
    assert "log p(x) >=" in works("evaluate run --num-particles 2")


def test_models_of_the_users_own_files():
    works("fit my_model.py --epochs 1 --set latent_size=5 --folder run")
    assert pvae.load("run").model.sites["z"].shape == (5,)
    works("evaluate run --num-particles 2")  # its declaration is data, so the file is not needed


@pytest.mark.parametrize("model", ["my_model.py:with_own_net", "my_pair.py"])
def test_models_that_are_code_are_named_again(model):
    works(f"fit {model} --epochs 1 --folder run")
    assert "run is code of your own, which is not run unasked" in fails("evaluate run")
    assert "log p(x) >=" in works(f"evaluate run --num-particles 2 --model {model}")


@pytest.mark.parametrize(
    ("text", "kind", "num_particles"),
    [
        ("elbo", ELBO, 1),
        ("ELBO-7", ELBO, 7),
        ("iwae", IWAE, 50),
        ("iwae-5", IWAE, 5),
        ("IWAE(5, gradient='dreg')", IWAE, 5),
        ("Renyi(7, alpha=-inf)", Renyi, 7),
        ("ELBO(beta=WarmUp(100))", ELBO, 1),
    ],
)
def test_objectives_by_name(text, kind, num_particles):
    objective = named.objective_of(text)
    assert type(objective) is kind
    assert objective.num_particles == num_particles


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("0.5", 0.5), ("16,8", (16, 8)), ("(4,)", (4,)), ("per pixel", "per pixel")],
)
def test_settings_are_read_as_python_writes_them(text, value):
    assert named.setting(f"name={text}") == ("name", value)


# ---------------------------------------------------------------------------------- other data


PPCA = "fit ppca --epochs 1 --set latent_size=1 --folder"


def a_table(name: str, scale: float = 1.0) -> pd.DataFrame:
    """Of 100 rows and three columns."""
    frame = pd.DataFrame(np.random.default_rng(0).normal(5.0, 2.0, (100, 3)), columns=[*"abc"])
    (scale * frame).to_csv(name, index=False)
    return frame


def found_in(path: str) -> pd.Series:
    return pd.read_csv(path, index_col=0)["value"]


def test_other_data_are_put_on_the_scale_of_the_runs_own():
    raw = a_table("mine.csv")
    a_table("large.csv", 1000)
    works(f"{PPCA} run --data mine.csv --standardisation columns")
    works("evaluate run --num-particles 20 --device cpu")
    before = Path("run", "evaluation.csv").read_bytes()
    works("evaluate run --data large.csv --num-particles 20 --device cpu")
    assert Path("run", "evaluation.csv").read_bytes() == before
    spec = load_data("mine.csv", standardisation="columns").train.spec
    x = torch.from_numpy(1000 * raw.to_numpy()) - torch.tensor(spec.location)
    model = pvae.load("run").model
    expected = pvae.exact.log_prob(model, (x / torch.tensor(spec.scale)).float()).mean()
    found = found_in("run/evaluation-large.csv")["log p(x)"]
    assert found == pytest.approx(float(expected), rel=1e-4), "all rows, on the run's scale"
    assert found < -1000


def test_a_run_from_python_is_evaluated_on_data_that_are_named():
    splits = load_data("digits")
    model = pvae.models.vae(64, latent_size=2, hidden=(4,))
    pvae.fit(model, splits.train, epochs=1, folder="run", progress=False)
    assert "no command.json tells its test data. Name them by --data" in fails("evaluate run")
    works("evaluate run --data digits --num-particles 20 --device cpu")
    expected = pvae.evaluate(pvae.load("run").model, splits.test, 20).summary()["value"]
    found = found_in("run/evaluation-digits.csv")
    pd.testing.assert_series_equal(found, expected, check_names=False)
    works("compare run run --data digits --num-particles 2")


def test_a_run_that_did_not_finish_says_so(monkeypatch):
    saves = []

    def killed(*args, **kwargs):
        if len(saves) == 3:  # before the first epoch, and after each
            raise KeyboardInterrupt
        saves.append(write(*args, **kwargs))

    write = pvae.checkpoint.write
    monkeypatch.setattr(pvae.checkpoint, "write", killed)
    pvae_command("fit vae --epochs 5 --set latent_size=2 --set hidden=4 --folder run")
    assert pvae.load("run").stopped == "unfinished"
    result = pvae_command("evaluate run --num-particles 20 --device cpu")
    assert "Note: run is unfinished, after 2 epochs." in result.stderr
    assert result.exit_code == 0


def test_blanks_of_a_table_are_missing_where_that_is_said():
    frame = a_table("full.csv")
    frame.loc[::4, "b"] = np.nan
    frame.to_csv("mine.csv", index=False)
    assert "has NaN or infinite values" in fails(f"{PPCA} run --data mine.csv")
    works(f"{PPCA} run --data mine.csv --missing")
    works("evaluate run --num-particles 20 --device cpu")
    works(f"{PPCA} whole --data full.csv")
    assert "has entries that are missing (NaN)" in fails("evaluate whole --data mine.csv")
    test = load_data("mine.csv", missing=True).test
    expected = pvae.exact.log_prob(pvae.load("run").model, test).mean()
    assert found_in("run/evaluation.csv")["log p(x)"] == pytest.approx(float(expected), rel=1e-4)


def test_blank_labels_are_summed_out():
    bits = pd.DataFrame(np.random.default_rng(0).integers(0, 2, (60, 4)), columns=[*"abcd"])
    bits["label"] = np.where(np.arange(60) < 40, np.arange(60) % 3, np.nan)
    bits.to_csv("mine.csv", index=False)
    line = "--epochs 1 --set latent_size=2 --set hidden=4 --set categories=3 --missing"
    works(f"fit semi_supervised_vae --folder run --data mine.csv {line}")
    assert "log p(x, y) >= " in works("evaluate run --num-particles 20 --device cpu")
    works("evaluate run --data mine.csv --num-particles 20 --device cpu")
    expected = pvae.Data.of("mine.csv", missing=True)
    y = expected.labels.double().masked_fill(expected.labels < 0, np.nan)
    result = pvae.evaluate(pvae.load("run").model, {"x": expected, "y": y}, 20)
    pd.testing.assert_series_equal(
        found_in("run/evaluation-mine.csv"), result.summary()["value"], check_names=False
    )
    line = f"fit conditional_vae --folder other --data mine.csv {line}"
    assert "labels of 'mine' go from -1 to 2" in fails(line)


# ---------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fit vea --folder run", "There is no model 'vea'. Did you mean 'vae'?"),
        ("fit vae --set size=3 --folder run", "Model 'vae' has no setting 'size'; it has data_si"),
        ("fit vae --data minst --folder run", "Did you mean 'mnist'"),
        ("fit vae --binarisation none --folder run", "grey levels"),
        ("fit ppca --standardisation rows --folder run", "must be one of none, columns; got 'rows"),
        ("fit ppca --data mine.csv --folder run", "There is no data file 'mine.csv'"),
        (f"{CONV} run --data wine", "takes images (colours, height, width), and a datum of 'wine'"),
        (f"{CONDITIONAL} run --data ring", "takes labels, 'y', and data 'ring' have none"),
        (f"{CONDITIONAL} run --set categories=3", "0 to 2, and labels of 'digits' go from 0 to 9"),
        (
            "fit given_numbers.py --folder run",
            "takes the columns u, x, and here the only one beside",
        ),
        ("fit vae --device moon --folder run", "No device 'moon' here"),
        ("fit none.py --folder run", "There is no file none.py to read the model from"),
        ("fit my_model.py:other --folder run", "my_model.py has no function 'other'"),
        ("fit my_model.py:no_model --folder run", "must return a LatentModel or a PyroPair, got"),
        ("fit broken.py --folder run", "broken.py cannot be run: NameError: name 'nothing'"),
        ("evaluate run", "run holds no run: make one by `pvae fit MODEL --folder run`"),
        ("compare run other", "run holds no run"),
    ],
)
def test_errors_are_one_message(line, message):
    Path("broken.py").write_text("nothing\n")
    said = fails(line)
    assert said.startswith("pvae: ")
    assert message in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fit vae --folder run --objective vi", 'expected "elbo", "iwae-50", or a call such as'),
        ("fit vae --folder run --objective print(1)", "print is none of them"),
        ("fit vae --folder run --objective IWAE(0)", "`num_particles` must be at least 1, got 0"),
        ("fit vae --folder run --set latent_size", "expected NAME=VALUE, got 'latent_size'"),
        ("fit vae --folder run --epochs 0", "--epochs"),
        ("fit vae", "--folder"),
        ("evaluate", "run"),
        ("nothing", "nothing"),
    ],
)
def test_wrong_usage_is_told_by_exit_code_2(line, message):
    assert message in fails(line, code=2)


def test_runs_that_cannot_be_used_are_refused():
    works(f"{VAE} run")
    assert "run holds another run" in fails(f"{VAE} run --lr 0.1")
    works("fit gaussian_vae --epochs 1 --set hidden=4 --dequantisation uniform --folder other")
    said = fails("compare run other --num-particles 2")
    assert "different observation spaces" in said
    Path("run", cli.COMMAND).write_text("{")
    assert "command.json is damaged" in fails("evaluate run")
    Path("run", cli.COMMAND).write_text(json.dumps({"data": "digits"}))
    assert "command.json is damaged (KeyError('set'))" in fails("evaluate run")
    Path("run", cli.COMMAND).unlink()
    assert "run was fitted from Python" in fails("evaluate run")


def test_interruption_is_no_traceback(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pvae.svi.fit", interrupt)
    assert fails(f"{VAE} run") == "pvae: interrupted."


@pytest.mark.parametrize("line", ["--debug evaluate run", "evaluate run"])
def test_debugging_shows_the_error_itself(line):
    result = pvae_command(line, PVAE_DEBUG="" if "--debug" in line else "1")
    assert isinstance(result.exception, FileNotFoundError)


def test_a_process_fails_with_a_message_and_no_traceback():
    code = "from pvae.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", "vea", "--folder", "run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pvae: There is no model 'vea'.")


def test_an_error_of_the_users_own_function_is_one_message_with_its_kind():
    Path("broken.py").write_text("def broken(data_size):\n    return {}['missing']\n")
    assert "KeyError: 'missing'. `pvae --debug` shows where." in fails("fit broken.py --folder run")
