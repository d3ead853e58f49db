"""What is missing of a table and of images: error and log p(x_seen) against the share missing.

    breast cancer, digits, with holes  --fit, impute-->  docs/missing.md, results/missing.json

`python -m benchmarks.missing` takes some minutes on one thread. Entries are missing in training as
in the test, completely at random (columns are standardised, digits are bits); or of a test digit
the upper half, after training on whole ones. Beside the declared models are the mean of each column
and scikit-learn's IterativeImputer, which regresses each column on all others. Then digits of which
a hundred have labels: the semi-supervised VAE against logistic regression on those.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.distributions import Bernoulli, MultivariateNormal, Normal
from torch import Tensor

import pvae
from benchmarks import machine, table
from pvae import Latent, LatentModel, Learned, Observed
from pvae.data import Data, Splits
from pvae.nets import MLP, Linear, Net

__all__ = ["IMAGES", "TABLE", "markdown", "measure"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "missing.json"
PAGE = ROOT / "docs" / "missing.md"
UPPER = "upper half"
SEEDS = (0, 1)
CHOICES = range(5)  # of the labels
REPEATS = 10  # of data with a label, so that about as many have one as have none
HEAD = ("missing", "method", "RMSE", "log p(x_seen), nats", "CPU seconds")

Found = tuple[Tensor, float]  # imputed test data, mean of log p(x_seen) or of its bound
Method = Callable[[Data, Data, Data, int], Found]


class Study(NamedTuple):
    """Data of a seed, shares that are missing of them, and methods by name."""

    data: Callable[[int], Splits]
    shares: tuple[float | str, ...]
    methods: dict[str, Method]


def by_mean(train: Data, valid: Data, test: Data, seed: int) -> Found:
    """Each column by its mean; as a model, independent Gaussians, or bits."""
    seen, mean = ~train.values.isnan(), train.values.nanmean(0)
    if train.spec.binarisation == "none":
        variance = (train.values - mean).square().nan_to_num(0.0).sum(0) / seen.sum(0)
        independent: Any = Normal(mean, variance.sqrt())
    else:  # one more of each, or what never was would be impossible
        ones = train.values.nan_to_num(0.0).sum(0)
        independent = Bernoulli((ones + 1) / (seen.sum(0) + 2))
    log_p = independent.log_prob(test.values.nan_to_num(0.0))
    log_p = torch.where(test.values.isnan(), 0.0, log_p).sum(1)
    return torch.where(test.values.isnan(), mean, test.values), float(log_p.mean())


def by_regression(train: Data, valid: Data, test: Data, seed: int) -> Found:
    """scikit-learn's IterativeImputer, which has no density."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401, its own way in
    from sklearn.impute import IterativeImputer

    # Without limits what it says of bits leaves all bounds.
    limits = {"min_value": 0, "max_value": 1} if train.spec.binarisation != "none" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ten rounds have not converged
        imputer = IterativeImputer(random_state=seed, **limits).fit(train.values.numpy())
    return torch.from_numpy(imputer.transform(test.values.numpy())).float(), math.nan


def of_table(latent_size: int, decoder: Net) -> LatentModel:
    """Of noise that differs by column; its guide has a full covariance."""
    z = Latent(MultivariateNormal, latent_size, given="x", net=MLP(128))
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Normal, 30, given="z", net=decoder, scale=Learned(0.5, 30), missing=True),
        guide={"z": z},
    )


def by_model(declare: Callable[[], LatentModel], objective: Any, lr: float) -> Method:
    """Fitted until the bound on valid falls; imputed by refined guides, or exactly."""

    def impute(train: Data, valid: Data, test: Data, seed: int) -> Found:
        torch.manual_seed(seed)
        how: dict[str, Any] = {"batch_size": 64, "lr": lr, "seed": seed, "device": "cpu"}
        how |= {"validation": valid, "patience": 20, "epochs": 200, "progress": False}
        model: Any = pvae.fit(declare().with_missing(), train, objective, **how).model
        proposal: Any = None if pvae.exact.method(model) else "refined"
        result = pvae.evaluate(model, test, 1000, proposal=proposal, device="cpu")
        imputed = pvae.impute(model, test, 1000, 1, proposal=proposal).mean["x"]
        return imputed, float(result.log_p.mean())

    return impute


OTHERS: dict[str, Method] = {"mean": by_mean, "IterativeImputer": by_regression}
IWAE = pvae.IWAE(20)
TABLE = Study(
    lambda seed: pvae.load_data("breast-cancer", standardisation="columns", seed=seed),
    (0.1, 0.3, 0.5, 0.7),
    {
        **OTHERS,
        "factor analysis, 10 factors": by_model(partial(of_table, 10, Linear()), IWAE, 3e-3),
        "VAE (MIWAE), 8 latents": by_model(partial(of_table, 8, MLP(128)), IWAE, 3e-3),
    },
)
IMAGES = Study(
    lambda seed: pvae.load_data("digits", binarisation="threshold", seed=seed),
    (0.3, 0.5, 0.7, UPPER),
    {
        **OTHERS,
        "mixture of Bernoullis, 30 components": by_model(
            partial(pvae.models.mixture_of_bernoullis, 64, num_components=30), pvae.ELBO(), 0.05
        ),
        "VAE (MIWAE), 8 latents": by_model(partial(pvae.models.vae, 64, 8, (128,)), IWAE, 3e-3),
    },
)


def measure(study: Study, share: float | str, seed: int) -> dict[str, Any]:
    """Every method on data of which this share is missing, or the upper half of the test."""
    whole = study.data(seed)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(share, str):
        lower = torch.arange(64) >= 32
        parts = [*whole[:2], whole.test.masked(lower)]
    else:
        parts = [d.masked(torch.rand(d.values.shape, generator=generator) >= share) for d in whole]
    truth, absent = whole.test.values, parts[2].values.isnan()
    found = {}
    for name, method in study.methods.items():
        start = time.process_time()
        imputed, log_p = method(*parts, seed)
        rmse = float((imputed - truth)[absent].square().mean().sqrt())
        found[name] = {"rmse": rmse, "log p": log_p, "seconds": time.process_time() - start}
    return found


def classify(seed: int) -> dict[str, float]:
    """Accuracy on digits of ten labels a class, the other images without."""
    from sklearn.linear_model import LogisticRegression

    train, _, test = pvae.load_data("digits", binarisation="threshold")
    assert train.labels is not None
    assert test.labels is not None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    known = torch.cat([order[train.labels[order] == digit][:10] for digit in range(10)])
    x, y = train.values[known], train.labels[known]
    none = torch.full((len(train),), math.nan)
    data = {
        "x": torch.cat([train.values, x.repeat(REPEATS, 1)]),
        "y": torch.cat([none, y.float().repeat(REPEATS)]),
    }
    torch.manual_seed(seed)
    model = pvae.models.semi_supervised_vae(64, latent_size=4, hidden=(64,))
    how: dict[str, Any] = {"epochs": 60, "batch_size": 100, "lr": 5e-3, "seed": seed}
    pvae.fit(model, data, device="cpu", progress=False, **how)
    unknown = {"x": test.values, "y": torch.full((len(test),), math.nan)}
    labels = pvae.impute(model, unknown, 100, 1).mean["y"]
    logistic = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy())
    return {
        "semi-supervised VAE": float((labels == test.labels).float().mean()),
        "logistic regression on the labels": logistic.score(test.values, test.labels),
    }


def accuracies(found: list[dict[str, float]]) -> str:
    """One row a choice of the labels."""
    rows = [
        (str(choice), *(f"{100 * right:.1f}" for right in run.values()))
        for choice, run in enumerate(found)
    ]
    means = [f"{100 * sum(run[name] for run in found) / len(found):.1f}" for name in found[0]]
    return table.lines(("labels, choice", *found[0]), [*rows, ("mean", *means)])


def markdown(report: dict[str, Any], study: str) -> str:
    """The table of a study, means over repetitions with their standard errors."""
    rows = []
    for share, runs in report[study].items():
        for name in runs[0]:
            rmse, log_p, seconds = (
                torch.tensor([run[name][key] for run in runs], dtype=torch.float64)
                for key in ("rmse", "log p", "seconds")
            )
            told = "" if log_p.isnan().any() else _told(log_p)
            missing = share if share == UPPER else f"{float(share):.0%}"
            rows.append((missing, name, _told(rmse), told, f"{seconds.mean():.0f}"))
    where = report["machine"]
    on = f"{where['processor']}, one thread, torch {where['libraries']['torch']}"
    return f"{table.lines(HEAD, rows)}\n\n{on}, {where['date']}."


def _told(values: Tensor) -> str:
    if len(values) == 1:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {values.std() / math.sqrt(len(values)):.2f}"


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.missing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial: prints, writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if options.quick else SEEDS
    report: dict[str, Any] = {"machine": machine.describe("cpu")}
    for name, study in (("runs", TABLE), ("images", IMAGES)):
        shares = study.shares[-1:] if options.quick else study.shares
        report[name] = {str(s): [measure(study, s, seed) for seed in seeds] for s in shares}
    labels = [classify(choice) for choice in (CHOICES[:1] if options.quick else CHOICES)]
    report["labels"] = labels
    if options.quick:
        print(markdown(report, "runs"), markdown(report, "images"), accuracies(labels), sep="\n\n")
        return
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    page = table.between_marks(PAGE.read_text(), "breast cancer", markdown(report, "runs"))
    page = table.between_marks(page, "digits", markdown(report, "images"))
    PAGE.write_text(table.between_marks(page, "labels", accuracies(labels)))


if __name__ == "__main__":
    main()
