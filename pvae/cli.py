"""The command `pvae`: demo, fit, evaluate, compare, models, data.

    pvae fit MODEL --folder RUN  -->  a run's folder  -->  pvae evaluate RUN, pvae compare RUN RUN

Beside its checkpoint a run keeps `command.json`: what was fitted to which data, so that `evaluate`
finds both again. Nothing in a folder is run as code; a model that is code is named again by
`--model`. What goes wrong is told in a sentence, unless `--debug` asks for the traceback.
"""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pvae import named

if TYPE_CHECKING:
    from pvae.data import Data
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
Other = Annotated[
    str | None,
    typer.Option(
        help="Other data than the run's, given the same noise and scale: a name (its test split), "
        "or all of a file or folder."
    ),
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
    data: Annotated[
        str, typer.Option(help="A name from `pvae data`, or a file or folder of your own.")
    ] = "digits",
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
        str | None,
        typer.Option(
            help='"dynamic", "fixed", "threshold" or "none"; by default "dynamic" for grey images '
            'of `pvae data`, "none" for all else.'
        ),
    ] = None,
    dequantisation: Annotated[
        str, typer.Option(help='"none", or "uniform" for densities.')
    ] = "none",
    standardisation: Annotated[
        str, typer.Option(help='"none", or "columns": mean 0 and deviation 1 in train.')
    ] = "none",
    missing: Annotated[
        bool, typer.Option("--missing", help="Blanks (NaN) of your own data were not seen.")
    ] = False,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Fit a model by stochastic variational inference.

    The weights of the best epoch on validation data are kept. A FILE.py holds a function that
    returns a model, named as the file or after a colon; its `data_size` is filled in, or its
    `image_shape`, and then images stay images. A model of data and a label gets that of the data.
    Data of your own are an .npy, .npz, .csv or .parquet file, or a folder of images.

    \b
    pvae fit vae --folder runs/vae
    pvae fit vae --folder runs/iwae --objective iwae-50 --set latent_size=8 --set hidden=128,128
    pvae fit gaussian_vae --folder runs/gaussian --dequantisation uniform
    pvae fit ppca --folder runs/ppca --data my_table.csv --standardisation columns --missing
    pvae fit my_model.py --folder runs/mine --data mnist --root ~/data
    """
    import torch

    from pvae import checkpoint, svi

    bound = named.objective_of(objective)
    function = named.function_of(model)
    told: dict[str, Any] = {
        "model": model,
        "set": settings or [],
        "data": named.lasting(data),
        "binarisation": binarisation,
        "dequantisation": dequantisation,
        "standardisation": standardisation,
        "missing": missing,
        "flatten": "image_shape" not in inspect.signature(function).parameters,
    }
    splits = named.load(told, root)
    torch.manual_seed(seed)
    declared = named.declare(model, function, told["set"], splits)
    train, valid = (named.columns_for(declared, part) for part in (splits.train, splits.valid))
    if not checkpoint.has_checkpoint(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMMAND).write_text(json.dumps(told, indent=1))
    result = svi.fit(
        declared,
        train,
        bound,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        validation=valid,
        device=device,
        folder=folder,
    )
    typer.echo(f"{result}\nNext: pvae evaluate {folder}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, from `pvae fit`.")],
    data: Other = None,
    num_particles: Particles = 5000,
    proposal: Annotated[
        str | None,
        typer.Option(
            help='"guide" (default); "refined" for each datum; "defensive", by which a mode that '
            'the guide misses shows; or "prior", to see naive Monte Carlo fail.'
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="FILE.py again, where the model is code of your own.")
    ] = None,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Bound log p(x) of a run's test data.

    Prints bounds over a grid of K, their standard errors and diagnostics, and writes the table to
    evaluation.csv in the run's folder; by another proposal, to evaluation-PROPOSAL.csv; of other
    data, to evaluation-DATA.csv.

    \b
    pvae evaluate runs/vae
    pvae evaluate runs/vae --num-particles 50000
    pvae evaluate runs/vae --proposal refined
    """
    from pvae import evaluation

    fitted, test = _load_run(run, data, model, root)
    result = evaluation.evaluate(
        fitted.model,
        named.columns_for(fitted.model, test),
        num_particles,
        proposal=proposal,
        device=device,
        progress=True,
    )
    words = ["evaluation", Path(named.lasting(data)).stem if data else "", proposal or ""]
    path = run / f"{'-'.join(filter(None, words))}.csv"
    result.summary().assign(model=result.model, data=result.spec.space()).to_csv(path)
    typer.echo(f"{result}\nWritten to {path}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs on the same data.")],
    data: Other = None,
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
        fitted, test = _load_run(run, data, None, root)
        results[str(run)] = evaluation.evaluate(
            fitted.model,
            named.columns_for(fitted.model, test),
            num_particles,
            device=device,
            progress=True,
        )
    typer.echo(evaluation.compare(results))


@app.command()
def models() -> None:
    """List the declared models and their settings.

    Each setting can be changed by `--set`; `data_size` and `image_shape` the data tell.

    \b
    pvae models
    pvae fit mixture_of_bernoullis --folder runs/mixture --set num_components=50
    """
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
    """List the data sets: images, tables, and toys whose density is known.

    \b
    pvae data
    pvae fit vae --folder runs/mnist --data mnist --root ~/data
    pvae fit ppca --folder runs/wine --data wine --standardisation columns
    """
    from pvae.data import DATASETS, TABLES
    from pvae.data.archives import data_root

    row = "{:16}{:>8}{:>8}{:>8}   {:12}{:>6}   {}".format
    typer.echo(row("name", "train", "valid", "test", "size", "levels", "what it is"))
    for name, info in DATASETS.items():
        size = " x ".join(map(str, info.image_shape))
        typer.echo(row(name, *info.splits, size, info.levels, info.title))
    for name, table in TABLES.items():
        typer.echo(row(name, *table.splits, table.dimensions, "", table.title))
    typer.echo(
        f"\nFiles lie in {data_root(None)}, and are downloaded there when they are missing; name "
        "another folder by --root or PVAE_DATA. The digits, tables and toys need none.\n"
        "Data of your own are named by their path: .npy, .npz, .csv, .parquet, or a folder of "
        "images."
    )


# ---------------------------------------------------------------------------------- what they use


def _load_run(
    run: Path, data: str | None, model: str | None, root: Path | None
) -> "tuple[Fit, Data]":
    """A run's fit, and its test data, as its `command.json` tells; or other data."""
    from pvae import checkpoint, svi

    if not checkpoint.has_checkpoint(run):
        raise FileNotFoundError(f"{run} holds no run: make one by `pvae fit MODEL --folder {run}`.")
    if model is not None:
        told = _told(run)
        splits = named.load(told, root)
        declared = named.declare(model, named.function_of(model), told["set"], splits)
        declared.prepare(splits.test[:2])
        fitted = svi.load(run, declared)
    elif "sites" not in checkpoint.read(run)[0]["declaration"]:
        raise ValueError(
            f"The model of {run} is code of your own, which is not run unasked: name its file by "
            f"`pvae evaluate {run} --model FILE.py`; to compare it, use pvae.compare in Python."
        )
    else:
        fitted = svi.load(run)
    if fitted.stopped == "unfinished":
        typer.echo(f"Note: {run} is unfinished, after {len(fitted.history)} epochs.", err=True)
    if data is None:
        return fitted, named.load(_told(run), root).test
    if not fitted.specs:
        raise ValueError(
            f"{run} was written by an earlier pvae, and does not tell the scale of its data: "
            "evaluate it on others in Python, by pvae.evaluate(pvae.load(folder).model, data)."
        )
    return fitted, named.like(data, next(iter(fitted.specs.values())), root)


def _told(run: Path) -> dict[str, Any]:
    """What `pvae fit` was told."""
    path = run / COMMAND
    if not path.exists():
        raise FileNotFoundError(
            f"{run} was fitted from Python: no {COMMAND} tells its test data. Name them by --data, "
            "or evaluate it in Python: pvae.evaluate(pvae.load(folder).model, data)."
        )
    try:
        told = json.loads(path.read_text())
        later = {key: told[key] for key in named.OF_LATER if key in told}
        return {key: told[key] for key in ("set", "data", *named.NOISE)} | later
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): fit again in a new folder.") from error
