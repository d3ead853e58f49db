"""Tables of real numbers, offline: scikit-learn's own, and the toys of `toys.py`.

TABLES[name].load(seed)  ->  all rows in random order, (N, dimensions) float32, and labels
"""

from functools import partial

import torch
from torch import Tensor

from pvae.data.record import TableInfo
from pvae.data.spec import local_generator
from pvae.data.toys import TOYS, Toy

__all__ = ["TABLES"]

GENERATED = (8_000, 1_000, 1_000)


def load_embedded(loader: str, seed: int) -> tuple[Tensor, Tensor]:
    """A table of scikit-learn's, ordered by class there and so shuffled here."""
    from sklearn import datasets

    table = getattr(datasets, loader)()
    values = torch.from_numpy(table.data).to(torch.float32)
    labels = torch.from_numpy(table.target).to(torch.int64)
    order = torch.randperm(len(values), generator=local_generator(seed, "split"))
    return values[order], labels[order]


def load_toy(name: str, toy: Toy, seed: int) -> tuple[Tensor, Tensor | None]:
    """Independent draws from a toy."""
    x, labels = toy.sample(sum(GENERATED), local_generator(seed, name))
    return x.to(torch.float32), labels


def _generated(name: str, toy: Toy) -> TableInfo:
    title = f"{toy.title}; log p(x) by {toy.exact}"
    return TableInfo(title, GENERATED, toy.dimensions, "generated", partial(load_toy, name, toy))


TABLES: dict[str, TableInfo] = {
    "breast-cancer": TableInfo(
        title="Measurements of cell nuclei, malignant (0) and benign (1), embedded in scikit-learn",
        splits=(455, 57, 57),
        dimensions=30,
        source="Street, Wolberg & Mangasarian 1993, UCI Breast Cancer Wisconsin (Diagnostic)",
        load=partial(load_embedded, "load_breast_cancer"),
    ),
    "wine": TableInfo(
        title="Chemical analysis of wines from three growers, embedded in scikit-learn",
        splits=(142, 18, 18),
        dimensions=13,
        source="Aeberhard & Forina 1992, UCI Wine",
        load=partial(load_embedded, "load_wine"),
    ),
    **{name: _generated(name, toy) for name, toy in TOYS.items()},
}
