"""What is named on the command line: an objective, a model with its settings, and data.

    'IWAE(50, "dreg")'  --objective_of-->  Objective
    "vae", "my_model.py:FUNCTION"  --function_of, declare-->  a model of the data's size
    "mnist", "my_table.csv"  --load-->  Splits  --columns_for-->  what the model takes of them

Only a model's own file, FILE.py, is run as code; all other words are names and literals.
"""

import ast
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pvae.data import Data, DataSpec
    from pvae.data.load import Splits
    from pvae.objectives import Objective
    from pvae.pair import Pair

__all__ = [
    "NOISE",
    "OF_LATER",
    "columns_for",
    "declare",
    "function_of",
    "lasting",
    "like",
    "load",
    "objective_of",
    "setting",
]

NOISE = ("binarisation", "dequantisation")
OF_LATER = ("standardisation", "flatten", "missing")  # which runs of version 0.1.0 did not tell


def objective_of(text: str) -> "Objective":
    """ "elbo", "iwae-50", or a call as in Python: 'IWAE(50, gradient="dreg")'."""
    from pvae import objectives

    match = re.fullmatch(r"(elbo|iwae)(?:-(\d+))?", text.lower())
    if match is not None:
        text = f"{match[1].upper()}({match[2] or ''})"
    try:
        return _called(ast.parse(text, mode="eval").body, vars(objectives), objectives.__all__)
    except (SyntaxError, TypeError, ValueError) as error:
        why = "" if "malformed node" in str(error) else f" ({error})"
        raise typer.BadParameter(
            f'expected "elbo", "iwae-50", or a call such as IWAE(50, gradient="dreg") of one of '
            f"{', '.join(objectives.__all__)}; got {text!r}{why}.",
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


def lasting(data: str) -> str:
    """A name, or the whole path of data of one's own, by which every folder finds them again."""
    from pvae.data import DATASETS, TABLES

    path = Path(data).expanduser()
    return str(path.absolute()) if data not in {*DATASETS, *TABLES} and path.exists() else data


def load(told: dict[str, Any], root: Path | None) -> "Splits":
    """The data that `pvae fit` was told of, with their noise and scale, images flat or not."""
    from pvae.data import load_data

    how = {key: told[key] for key in (*NOISE, *OF_LATER) if key in told}
    return load_data(told["data"], root=root, **how)


def like(data: str, spec: "DataSpec", root: Path | None) -> "Data":
    """Other data than a run's, with the noise and the scale of what it was fitted to.

    The test split of a known set, all of a file.
    """
    from pvae.data import DATASETS, TABLES, Data, load_data

    if data not in {*DATASETS, *TABLES}:
        # Blanks are the model's to refuse, where it takes none.
        return Data.of(Path(data).expanduser(), like=spec, missing=True)
    test = load_data(data, binarisation="none", root=root, seed=spec.seed).test
    return Data.of(test, like=spec)


def columns_for(model: "Pair", data: "Data") -> Any:
    """The data as the model takes them: with their labels, where one of its sites is a category.

    Raises:
        ValueError: if the data have no labels, or the model takes any other column.
    """
    from pvae.declare import LatentModel

    if not isinstance(model, LatentModel) or len(columns := model.given + model.observed) == 1:
        return data
    indices = [name for name in columns if not (i := model.inputs[name]).shape and i.categories]
    others = [name for name in columns if name not in indices]
    if (len(indices), len(others)) != (1, 1) or others[0] in model.given:
        raise ValueError(
            f"{model.name!r} takes the columns {', '.join(columns)}, and here the only one beside "
            "the data are their labels, for one site of categories, such as Given((), categories). "
            "Fit it in Python: pvae.fit(model, {name: values, ...})."
        )
    name, labels = indices[0], data.labels
    size = int(model.inputs[name].categories or 0)
    if labels is None:
        raise ValueError(
            f"{model.name!r} takes labels, {name!r}, and data {data.spec.name!r} have none."
        )
    least, most = int(labels.min()), int(labels.max())
    if not (0 if name in model.given else -1) <= least <= most < size:
        raise ValueError(
            f"{model.name!r} takes {name!r} of {size} categories, 0 to {size - 1}, and labels of "
            f"{data.spec.name!r} go from {least} to {most}. Tell their number, as by --set "
            "categories=26."
        )
    if (labels < 0).any():  # blank in a file
        labels = labels.double().masked_fill(labels < 0, math.nan)
    return {others[0]: data, name: labels}


def declare(model: str, function: Any, settings: list[str], splits: "Splits") -> Any:
    """The named model, of the data's size or shape where its function takes one."""
    from pvae.declare import LatentModel
    from pvae.pair import Pair

    known = inspect.signature(function).parameters
    values = dict(setting(text) for text in settings)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"Model {model!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}."
        )
    for name, value in values.items():
        if isinstance(known[name].default, tuple) and not isinstance(value, tuple):
            values[name] = (value,)
    shape = splits.train.spec.event_shape
    if "data_size" in known:
        values.setdefault("data_size", math.prod(shape))
    if "image_shape" in known:
        values.setdefault("image_shape", shape)
        if len(shape) != 3:
            raise ValueError(
                f"Model {model!r} takes images (colours, height, width), and a datum of "
                f"{splits.train.spec.name!r} has shape {shape}."
            )
    declared = function(**values)
    if not isinstance(declared, Pair):
        raise TypeError(
            f"Model {model!r} must return a LatentModel or a PyroPair, got {declared!r}."
        )
    if splits.train.spec.missing and isinstance(declared, LatentModel):
        declared = declared.with_missing()
    if declared.name == Pair.name:  # its author gave none
        declared.name = function.__name__
    return declared


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it, or else as it stands."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}.", param_hint="--set")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def function_of(model: str) -> Any:
    """The function that declares a model, by the model's name or from a file."""
    from pvae import models

    file, _, name = model.partition(":")
    if file.endswith(".py"):
        return _function_of_file(Path(file), name)
    if model not in models.__all__:
        near = get_close_matches(model, models.__all__, n=1, cutoff=0.0)
        raise ValueError(
            f"There is no model {model!r}. Did you mean {near[0]!r}? Known: "
            f"{', '.join(models.__all__)}; or name a file of your own, my_model.py."
        )
    return getattr(models, model)


def _function_of_file(path: Path, name: str) -> Any:
    """`name` in the user's file, or the function named as the file."""
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
