"""What `pvae demo` does: declare, fit and compare models of real digits, in two spaces.

    SPACES  --fit, evaluate-->  {name: Fit}, {name: Evaluation}  --compare, plots-->  report

Everything is seeded and runs on one thread of the CPU: nets this small gain little from more, and
the numbers are the same each time, however many cores there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from pvae import models, plots
from pvae.baselines import fit_em
from pvae.data import Data, load_data
from pvae.data.load import Splits
from pvae.declare import LatentModel
from pvae.evaluation import Comparison, Evaluation, compare, evaluate
from pvae.objectives import ELBO, IWAE, Objective
from pvae.svi import Fit, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SPACES", "Entry", "Space", "demo"]

HIDDEN = (128, 128)
NUM_PARTICLES = 5000
EVALUATION = 80  # cost of an evaluation, in epochs by the ELBO


@dataclass(frozen=True)
class Entry:
    """A model of the demo.

    Args:
        name: what tables and pictures call it.
        declare: makes it, from the training data; fitted already where there is no objective.
        objective: what SVI maximises.
        epochs: passes over the data.
        lr: learning rate at the start; it falls to zero along a cosine.
        batch_size: data a step.
    """

    name: str
    declare: Callable[[Data], LatentModel]
    objective: Objective | None = None
    epochs: int = 0
    lr: float = 1e-2
    batch_size: int = 128

    @property
    def cost(self) -> int:
        """Of an epoch, in epochs by the ELBO; it only moves the progress bar."""
        return 1 if self.objective is None else 1 + self.objective.num_particles // 10


@dataclass(frozen=True)
class Space:
    """An observation space, and the models of it."""

    title: str
    short: str
    data: dict[str, Any]
    entries: tuple[Entry, ...]


NOTES = """
The bounds of a row rise with K towards log p(x), in expectation. "difference" is to the best model,
paired by datum, between exact values where they are known and the largest bounds where not.
The two tables cannot be compared: probabilities of bits and densities of grey levels are different
quantities.
"""

SPACES = (
    Space(
        "Binary pixels: log p(x) is the logarithm of a probability",
        "binary",
        {"binarisation": "dynamic"},
        (
            Entry("VAE, ELBO", lambda _: models.vae(64, 8, HIDDEN), ELBO(), epochs=400),
            Entry("VAE, IWAE-50", lambda _: models.vae(64, 8, HIDDEN), IWAE(50), epochs=120),
            Entry(
                "two-layer VAE, ELBO",
                lambda _: models.hierarchical_vae(64, (16, 8), HIDDEN, (64, 64)),
                ELBO(),
                epochs=300,
                lr=5e-3,
            ),
            Entry(
                "mixture of 100 Bernoullis",
                lambda _: models.mixture_of_bernoullis(64, 100),
                ELBO(),
                epochs=150,
                lr=0.1,
            ),
        ),
    ),
    Space(
        "Continuous grey levels: log p(x) is the logarithm of a density, and may be positive",
        "continuous",
        {"dequantisation": "uniform"},
        (
            Entry(
                "Gaussian VAE, ELBO",
                lambda _: models.gaussian_vae(64, 16, HIDDEN, sigma="predicted"),
                ELBO(),
                epochs=300,
            ),
            Entry(
                "mixture of 50 Gaussians, EM",
                lambda data: fit_em(data, 50, regularisation=1e-4, device="cpu").to_model(),
            ),
            Entry(
                "PPCA, ELBO",
                lambda _: models.ppca(64, 16),
                ELBO(),
                epochs=200,
                lr=3e-2,
                batch_size=64,
            ),
        ),
    ),
)


@dataclass
class Results:
    """What the entries of one space came to, by name."""

    data: Splits
    models: dict[str, LatentModel] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def demo(folder: str | Path = "pvae-demo", quick: bool = False) -> None:
    """Fit and evaluate every entry, print a table for each space, write pictures to the folder.

    Args:
        folder: made where it does not exist; pictures of the same name are replaced.
        quick: two epochs and few particles, to see it run: the numbers mean nothing.

    Raises:
        OSError: if the folder cannot be written to.
    """
    from tqdm.auto import tqdm

    Path(folder).mkdir(parents=True, exist_ok=True)
    print("pvae demo: models of 8 x 8 handwritten digits, in two observation spaces\n", flush=True)
    total = sum(_cost(entry, quick) for space in SPACES for entry in space.entries)
    layout = "{percentage:3.0f} %|{bar:30}| {elapsed} < {remaining}  {desc}"
    with _reproducible(), tqdm(total=total, bar_format=layout, leave=False, mininterval=0.5) as bar:
        results = {space.title: _run(space, quick, bar) for space in SPACES}
        bar.set_description_str("drawing", refresh=True)
        pictures = {
            Path(folder, f"{space.short}-{name}.png"): figure
            for space in SPACES
            for name, figure in _pictures(results[space.title]).items()
        }
        for path, figure in pictures.items():
            figure.savefig(path)
    _report(results)
    print("Pictures:", *(f"  {path}" for path in pictures), sep="\n")
    print("\nNext: `pvae models` lists the models, `pvae fit --help` shows how to fit one.")


@contextmanager
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _epochs(entry: Entry, quick: bool) -> int:
    return min(entry.epochs, 2) if quick else entry.epochs


def _cost(entry: Entry, quick: bool) -> int:
    return _epochs(entry, quick) * entry.cost + EVALUATION


def _run(space: Space, quick: bool, bar: Any) -> Results:
    """Fit and evaluate the space's entries, each from the same seed."""
    results = Results(load_data("digits", **space.data))
    bar.write(f"{space.title}:")
    for entry in space.entries:
        bar.set_description_str(entry.name, refresh=True)
        torch.manual_seed(0)
        model = results.models[entry.name] = entry.declare(results.data.train)
        if entry.objective is not None:
            results.fits[entry.name] = _fit(entry, model, results.data, _epochs(entry, quick), bar)
        evaluation = evaluate(
            model, results.data.test, 100 if quick else NUM_PARTICLES, device="cpu"
        )
        results.evaluations[entry.name] = evaluation
        bar.update(EVALUATION)
        log_p = float(evaluation.log_p.mean())
        bar.write(f"  {entry.name:28} {log_p:7.2f} nats per datum, {evaluation.kind}")
    return results


def _fit(entry: Entry, model: LatentModel, data: Splits, epochs: int, bar: Any) -> Fit:
    return fit(
        model,
        data.train,
        entry.objective,
        epochs=epochs,
        batch_size=entry.batch_size,
        lr=entry.lr,
        scheduler=lambda optimizer: _Annealed(optimizer, epochs, bar, entry.cost),
        validation=data.valid,
        device="cpu",
        compile=False,
        progress=False,
    )


class _Annealed(CosineAnnealingLR):
    """A learning rate that falls to zero; it moves the bar, since `fit` steps it each epoch."""

    def __init__(self, optimizer: Optimizer, epochs: int, bar: Any, cost: int):
        self.bar, self.cost = bar, 0  # the constructor takes a step of its own
        super().__init__(optimizer, T_max=epochs)
        self.cost = cost

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.bar.update(self.cost)


def _pictures(results: Results) -> "dict[str, Figure]":
    """The pictures of a space, by name."""
    x, spec = results.data.test[:49], results.data.test.spec
    shape, space = spec.image_shape or (), spec.space()
    torch.manual_seed(0)
    drawn = {name: m.prior_predictive(len(x))["x"] for name, m in results.models.items()}
    decoded = {name: m.reconstruct(x[:16])["x"] for name, m in results.models.items()}
    between = {
        name: m.interpolate(x[:6], x[10:16], steps=9)["x"] for name, m in results.models.items()
    }
    known = {n: e for n, e in results.evaluations.items() if e.is_exact and "bound" in e.per_datum}
    pictures = {
        "training": plots.training_curves(results.fits),
        "samples": plots.samples({"data": x, **drawn}, shape, space),
        "reconstructions": plots.reconstructions(x[:16], decoded, shape, space),
        "interpolations": plots.interpolations(between, shape, space),
        "bounds": plots.bounds(results.evaluations),
    }
    return pictures | ({"bounds-and-exact": plots.bounds(known)} if known else {})


def _report(results: dict[str, Results]) -> None:
    for number, (title, of_space) in enumerate(results.items(), 1):
        comparison = compare(of_space.evaluations)
        print(f"\n{number}. {title}\n   {comparison.num_data} data of {comparison.space}\n")
        print(_table(of_space.evaluations, comparison))
        print(fill(f"Note: {comparison.caution}.", 100, subsequent_indent="      "))
    print(NOTES)


def _table(evaluations: dict[str, Evaluation], comparison: Comparison) -> str:
    """Bounds and exact values, best model first, beside the paired differences of `compare`."""
    import pandas as pd

    table = pd.DataFrame(index=comparison.table.index.rename(None))
    for name, evaluation in evaluations.items():
        if "bound" in evaluation.per_datum:
            bound = evaluation.per_datum["bound"].mean("datum")
            for size in (1, 50, evaluation.num_particles):
                column = "ELBO" if size == 1 else f"L_{size}"
                table.loc[name, column] = float(bound.sel(particles=size))
    for name, evaluation in evaluations.items():
        if evaluation.is_exact:
            table.loc[name, "exact"] = float(evaluation.log_p.mean())
    table["difference"] = comparison.table["difference"]
    table["± s.e."] = comparison.table["se of difference"]
    table["k-hat too high (%)"] = comparison.table["k-hat too high (%)"]
    return table.to_string(float_format="{:.2f}".format, na_rep="")
