"""The command `pvae`: demo, fit, evaluate, compare, models, data.

    pvae fit MODEL --folder RUN  -->  a run's folder  -->  pvae evaluate RUN, pvae compare RUN RUN

Beside its checkpoint a run keeps `command.json`: what was fitted to which data, so that `evaluate`
finds both again. Nothing in a folder is run as code; a model that is code is named again by
`--model`. What goes wrong is told in a sentence, unless `--debug` asks for the traceback.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pvae.data.load import Splits
    from pvae.objectives import Objective
    from pvae.svi import Fit

__all__ = ["app", "main"]

COMMAND = "command.json"


class Commands(TyperGroup):
    """Commands whose errors end in one message and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\npvae: interrupted.", err=True)
        except BrokenPipeError:
            raise  # `pvae models | head`: typer ends in silence
        except Exception as error:
            # Exits and wrong usage are typer's (or, in older versions, click's) to report.
            if type(error).__module__.startswith(("typer", "click")) or ctx.params["debug"]:
                raise
            typer.echo(f"pvae: {_message(error)}", err=True)
        raise typer.Exit(1)


def _message(error: Exception) -> str:
    """pvae's own messages as they are; others, from a user's file say, with their kind."""
    if isinstance(error, ValueError | TypeError | OSError | FloatingPointError):
        return str(error)
    return f"{type(error).__name__}: {error}. `pvae --debug` shows where."


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help='"cpu", "cuda" or, CUDA where there is one, "auto".')]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder of the data's files; by default $PVAE_DATA, or ~/.cache/pvae/data."),
]
Particles = Annotated[int, typer.Option(help="K, particles drawn for each datum.", min=1)]


def main() -> None:
    """Entry point of the command `pvae`."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from pvae import __version__

        typer.echo(f"pvae {__version__}")
        raise typer.Exit


@app.callback()
def pvae(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="PVAE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Declare a latent-variable model, fit it, and learn how well log p(x) is known.

    \b
    pvae demo                                  models of real digits, compared
    pvae fit vae --folder runs/vae             fit one of `pvae models` to digits
    pvae fit my_model.py --folder runs/mine    fit a model of your own
    pvae evaluate runs/vae                     bounds on log p(x) of the test data
    pvae compare runs/vae runs/mine            which is better, and how surely
    """


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to write the pictures.")] = Path("pvae-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Train for seconds: the numbers mean nothing.")
    ] = False,
) -> None:
    """Fit seven models to real digits and compare them.

    Prints a table for binary and one for continuous pixels, and draws pictures. Takes two to three
    minutes on one core, and needs no network.

    \b
    pvae demo
    pvae demo --folder pictures
    """
    from pvae.demo import demo as run

    run(folder, quick)


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(help="A name from `pvae models`, or FILE.py, or FILE.py:FUNCTION.")
    ],
    folder: Annotated[
        Path, typer.Option(help="The run's folder. Killed, the same command continues it.")
    ],
    data: Annotated[str, typer.Option(help="A name from `pvae data`.")] = "digits",
    objective: Annotated[
        str,
        typer.Option(
            help='"elbo", "iwae" (50 particles), "iwae-5", or as in Python: \'IWAE(5, "dreg")\'.'
        ),
    ] = "elbo",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.", min=1)] = 100,
    batch_size: Annotated[int, typer.Option(help="Data a step.", min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of initial weights, batches and noise.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model; repeatable."),
    ] = None,
    binarisation: Annotated[
        str | None, typer.Option(help='"dynamic" (default), "fixed", "threshold" or "none".')
    ] = None,
    dequantisation: Annotated[
        str, typer.Option(help='"none", or "uniform" for densities.')
    ] = "none",
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Fit a model by stochastic variational inference.

    The weights of the best epoch on validation data are kept. A FILE.py holds a function that
    returns a model, named as the file or after a colon; its `data_size` is filled in.

    \b
    pvae fit vae --folder runs/vae
    pvae fit vae --folder runs/iwae --objective iwae-50 --set latent_size=8 --set hidden=128,128
    pvae fit gaussian_vae --folder runs/gaussian --dequantisation uniform
    pvae fit my_model.py --folder runs/mine --data mnist --root ~/data
    """
    import torch

    from pvae import checkpoint, svi

    told: dict[str, Any] = {
        "model": model,
        "set": settings or [],
        "data": data,
        "binarisation": binarisation,
        "dequantisation": dequantisation,
    }
    bound = _objective(objective)
    splits = _load_data(told, root)
    torch.manual_seed(seed)
    declared = _declare(model, told["set"], splits)
    if not checkpoint.has_checkpoint(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMMAND).write_text(json.dumps(told, indent=1))
    result = svi.fit(
        declared,
        splits.train,
        bound,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        validation=splits.valid,
        device=device,
        folder=folder,
    )
    typer.echo(f"{result}\nNext: pvae evaluate {folder}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, from `pvae fit`.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's, by name.")] = None,
    num_particles: Particles = 5000,
    proposal: Annotated[
        str, typer.Option(help='"guide", or "prior" to see naive Monte Carlo fail.')
    ] = "guide",
    model: Annotated[
        str | None, typer.Option(help="FILE.py again, where the model is code of your own.")
    ] = None,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Bound log p(x) of a run's test data.

    Prints bounds over a grid of K, their standard errors and diagnostics, and writes the table to
    evaluation.csv in the run's folder.

    \b
    pvae evaluate runs/vae
    pvae evaluate runs/vae --num-particles 50000
    pvae evaluate runs/vae --proposal prior
    """
    from pvae import evaluation

    fitted, splits = _load_run(run, data, model, root)
    result = evaluation.evaluate(
        fitted.model,
        splits.test,
        num_particles,
        proposal=proposal,
        device=device,
        progress=True,
    )
    path = run / "evaluation.csv"
    result.summary().assign(model=result.model, data=result.spec.space()).to_csv(path)
    typer.echo(f"{result}\nWritten to {path}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs on the same data.")],
    num_particles: Particles = 5000,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Rank runs by log p(x) of their test data.

    Differences are paired by datum, so that what makes a datum hard for all models cancels.
    Runs in different observation spaces are refused: their log p(x) are different quantities.

    \b
    pvae compare runs/vae runs/iwae
    """
    from pvae import evaluation

    results = {}
    for run in runs:
        fitted, splits = _load_run(run, None, None, root)
        results[str(run)] = evaluation.evaluate(
            fitted.model, splits.test, num_particles, device=device, progress=True
        )
    typer.echo(evaluation.compare(results))


@app.command()
def models() -> None:
    """List the declared models and their settings.

    Each setting can be changed by `--set`, but for `data_size`, which the data tell.

    \b
    pvae models
    pvae fit mixture_of_bernoullis --folder runs/mixture --set num_components=50
    """
    import inspect

    from pvae import models as declared

    for name in declared.__all__:
        function = getattr(declared, name)
        about = inspect.getdoc(inspect.getmodule(function)) or ""
        formula = (inspect.getdoc(function) or "").splitlines()
        known = inspect.signature(function).parameters.values()
        settings = ", ".join(f"{setting.name}={setting.default!r}" for setting in known)
        typer.echo(f"{name}\n  {about.splitlines()[0]}\n  {formula[0]}\n  {settings}\n")


@app.command("data")
def list_data() -> None:
    """List the data sets.

    \b
    pvae data
    pvae fit vae --folder runs/mnist --data mnist --root ~/data
    """
    from pvae.data import DATASETS
    from pvae.data.archives import data_root

    row = "{:16}{:>8}{:>8}{:>8}   {:9}{:>6}   {}".format
    typer.echo(row("name", "train", "valid", "test", "size", "levels", "what it is"))
    for name, info in DATASETS.items():
        size = " x ".join(map(str, info.image_shape))
        typer.echo(row(name, *info.splits, size, info.levels, info.title))
    typer.echo(
        f"\nFiles lie in {data_root(None)}, and are downloaded there when they are missing; name "
        "another folder by --root or PVAE_DATA. The digits need none."
    )


# ---------------------------------------------------------------------------------- what they use


def _objective(text: str) -> "Objective":
    """ "elbo", "iwae-50", or a call as in Python: 'IWAE(50, gradient="dreg")'."""
    from pvae import objectives

    match = re.fullmatch(r"(elbo|iwae)(?:-(\d+))?", text.lower())
    if match is not None:
        text = f"{match[1].upper()}({match[2] or ''})"
    try:
        return _called(ast.parse(text, mode="eval").body, vars(objectives), objectives.__all__)
    except (SyntaxError, TypeError, ValueError) as error:
        raise typer.BadParameter(
            f'expected "elbo", "iwae-50", or a call such as IWAE(50, gradient="dreg") of one of '
            f"{', '.join(objectives.__all__)}; got {text!r} ({error}).",
            param_hint="--objective",
        ) from None


def _called(node: Any, known: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of a call of a known name with literal arguments, or of a literal."""
    if not isinstance(node, ast.Call):
        return -math.inf if ast.unparse(node) == "-inf" else ast.literal_eval(node)
    name = ast.unparse(node.func)
    if name not in names:
        raise ValueError(f"{name} is none of them")
    args = [_called(value, known, names) for value in node.args]
    kwargs = {str(key.arg): _called(key.value, known, names) for key in node.keywords}
    return known[name](*args, **kwargs)


def _load_data(told: dict[str, Any], root: Path | None) -> "Splits":
    from pvae.data import load_data

    noise = {key: told[key] for key in ("binarisation", "dequantisation")}
    return load_data(told["data"], root=root, **noise)


def _declare(model: str, settings: list[str], splits: "Splits") -> Any:
    """The named model, with the data's size where its function takes one."""
    import inspect

    from pvae.pair import Pair

    function = _function(model)
    known = inspect.signature(function).parameters
    values = dict(_setting(text) for text in settings)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"Model {model!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}."
        )
    for name, value in values.items():
        if isinstance(known[name].default, tuple) and not isinstance(value, tuple):
            values[name] = (value,)
    if "data_size" in known:
        values.setdefault("data_size", math.prod(splits.train.spec.event_shape))
    declared = function(**values)
    if not isinstance(declared, Pair):
        raise TypeError(
            f"Model {model!r} must return a LatentModel or a PyroPair, got {declared!r}."
        )
    if declared.name == Pair.name:  # its author gave none
        declared.name = function.__name__
    return declared


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it, or else as it stands."""
    from ast import literal_eval

    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}.", param_hint="--set")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _function(model: str) -> Any:
    """The function that declares a model, by the model's name or from a file."""
    from difflib import get_close_matches

    from pvae import models as declared

    file, _, name = model.partition(":")
    if file.endswith(".py"):
        return _function_of_file(Path(file), name)
    if model not in declared.__all__:
        near = get_close_matches(model, declared.__all__, n=1, cutoff=0.0)
        raise ValueError(
            f"There is no model {model!r}. Did you mean {near[0]!r}? Known: "
            f"{', '.join(declared.__all__)}; or name a file of your own, my_model.py."
        )
    return getattr(declared, model)


def _function_of_file(path: Path, name: str) -> Any:
    """`name` in the user's file, or the function named as the file."""
    import sys
    from importlib.util import module_from_spec, spec_from_file_location

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} to read the model from.")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(
        0, str(path.parent.absolute())
    )  # for what lies beside it, as `python FILE` does
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be run: {type(error).__name__}: {error}. --debug shows the traceback."
        ) from error
    function = getattr(module, name or path.stem, None)
    if not callable(function):
        raise ValueError(
            f"{path} has no function {name or path.stem!r} that returns a model. Write one, or "
            f"name another: {path}:FUNCTION."
        )
    return function


def _load_run(
    run: Path, data: str | None, model: str | None, root: Path | None
) -> "tuple[Fit, Splits]":
    """A run's fit and data, as its `command.json` tells."""
    from pvae import checkpoint, svi

    if not checkpoint.has_checkpoint(run):
        raise FileNotFoundError(f"{run} holds no run: make one by `pvae fit MODEL --folder {run}`.")
    told = _told(run)
    splits = _load_data(told | ({"data": data} if data else {}), root)
    if model is not None:
        declared = _declare(model, told["set"], splits)
        declared.prepare(splits.test[:2])
        return svi.load(run, declared), splits
    if "sites" not in checkpoint.read(run)[0]["declaration"]:
        raise ValueError(
            f"The model of {run} is code of your own, which is not run unasked: name its file by "
            f"`pvae evaluate {run} --model FILE.py`; to compare it, use pvae.compare in Python."
        )
    return svi.load(run), splits


def _told(run: Path) -> dict[str, Any]:
    """What `pvae fit` was told."""
    path = run / COMMAND
    if not path.exists():
        raise FileNotFoundError(
            f"{run} was fitted from Python: no {COMMAND} tells its data. Evaluate it there: "
            "pvae.evaluate(pvae.load(folder).model, data)."
        )
    try:
        told = json.loads(path.read_text())
        return {key: told[key] for key in ("set", "data", "binarisation", "dequantisation")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): fit again in a new folder.") from error
