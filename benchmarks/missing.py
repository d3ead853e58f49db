"""What is missing of a table, imputed: error and log p(x_seen) against the share that is missing.

    breast cancer with holes  --fit, impute-->  docs/missing.md, results/missing.json

`python -m benchmarks.missing` takes some minutes on one thread. Entries are missing in training as
in the test, completely at random; columns are standardised. Beside the declared models are the mean
of each column and scikit-learn's IterativeImputer, which regresses each column on all others. Then
digits of which a hundred have labels: the semi-supervised VAE against logistic regression on those.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor

import pvae
from benchmarks import machine, table
from pvae import Latent, LatentModel, Learned, Observed
from pvae.data import Data
from pvae.nets import MLP, Linear, Net

__all__ = ["METHODS", "markdown", "measure"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "missing.json"
PAGE = ROOT / "docs" / "missing.md"
SHARES = (0.1, 0.3, 0.5, 0.7)
SEEDS = (0, 1)
CHOICES = range(5)  # of the labels
REPEATS = 10  # of data with a label, so that about as many have one as have none
HEAD = ("missing", "method", "RMSE", "log p(x_seen), nats", "CPU seconds")

Found = tuple[Tensor, float]  # imputed test data, mean of log p(x_seen) or of its bound


def by_mean(train: Data, valid: Data, test: Data, seed: int) -> Found:
    """Each column by its mean; as a model, independent Gaussians."""
    seen = ~train.values.isnan()
    mean = train.values.nanmean(0)
    variance = (train.values - mean).square().nan_to_num(0.0).sum(0) / seen.sum(0)
    log_p = torch.distributions.Normal(mean, variance.sqrt()).log_prob(test.values.nan_to_num(0.0))
    log_p = torch.where(test.values.isnan(), 0.0, log_p).sum(1)
    return torch.where(test.values.isnan(), mean, test.values), float(log_p.mean())


def by_regression(train: Data, valid: Data, test: Data, seed: int) -> Found:
    """scikit-learn's IterativeImputer, which has no density."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401, its own way in
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ten rounds have not converged
        imputer = IterativeImputer(random_state=seed).fit(train.values.numpy())
    return torch.from_numpy(imputer.transform(test.values.numpy())).float(), math.nan


def declared(latent_size: int, decoder: Net) -> LatentModel:
    """Of noise that differs by column; its guide has a full covariance."""
    z = Latent(MultivariateNormal, latent_size, given="x", net=MLP(128))
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Normal, 30, given="z", net=decoder, scale=Learned(0.5, 30), missing=True),
        guide={"z": z},
    )


def by_model(latent_size: int, decoder: Net) -> Callable[..., Found]:
    """Fitted by IWAE, 20 particles, until the bound on valid falls; imputed by refined guides."""

    def impute(train: Data, valid: Data, test: Data, seed: int) -> Found:
        torch.manual_seed(seed)
        how: dict[str, Any] = {"batch_size": 64, "lr": 3e-3, "seed": seed, "device": "cpu"}
        how |= {"validation": valid, "patience": 20, "epochs": 200, "progress": False}
        model = pvae.fit(declared(latent_size, decoder), train, pvae.IWAE(20), **how).model
        result = pvae.evaluate(model, test, 1000, proposal="refined", device="cpu")
        imputed = pvae.impute(model, test, 1000, 1, proposal="refined").mean["x"]
        return imputed, float(result.log_p.mean())

    return impute


METHODS: dict[str, Callable[..., Found]] = {
    "mean": by_mean,
    "IterativeImputer": by_regression,
    "factor analysis, 10 factors": by_model(10, Linear()),
    "VAE (MIWAE), 8 latents": by_model(8, MLP(128)),
}


def measure(share: float, seed: int, methods: dict[str, Callable[..., Found]]) -> dict[str, Any]:
    """Every method on data of which this share is missing."""
    whole = pvae.load_data("breast-cancer", standardisation="columns", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        data.masked(torch.rand(data.values.shape, generator=generator) >= share) for data in whole
    ]
    truth, absent = whole.test.values, parts[2].values.isnan()
    found = {}
    for name, method in methods.items():
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


def markdown(report: dict[str, Any]) -> str:
    """The table, means over repetitions with their standard errors."""
    rows = []
    for share, runs in report["runs"].items():
        for name in runs[0]:
            rmse, log_p, seconds = (
                torch.tensor([run[name][key] for run in runs], dtype=torch.float64)
                for key in ("rmse", "log p", "seconds")
            )
            told = "" if log_p.isnan().any() else _told(log_p)
            rows.append((f"{float(share):.0%}", name, _told(rmse), told, f"{seconds.mean():.0f}"))
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
    shares, seeds = (SHARES[1:2], SEEDS[:1]) if options.quick else (SHARES, SEEDS)
    runs = {str(share): [measure(share, seed, METHODS) for seed in seeds] for share in shares}
    labels = [classify(choice) for choice in (CHOICES[:1] if options.quick else CHOICES)]
    report = {"machine": machine.describe("cpu"), "runs": runs, "labels": labels}
    if options.quick:
        print(markdown(report), accuracies(labels), sep="\n\n")
        return
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    page = table.between_marks(PAGE.read_text(), "breast cancer", markdown(report))
    PAGE.write_text(table.between_marks(page, "labels", accuracies(labels)))


if __name__ == "__main__":
    main()
