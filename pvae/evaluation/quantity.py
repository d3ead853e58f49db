"""What p is of, in an evaluation: x alone, x and labels that were seen, or x given something.

    log p(x),    log p(x, y),    log p(x | y):    different quantities, never compared

A label that was seen for no datum is summed out for all: what is left is log p(x), as of any other
model of x.
"""

from typing import Any

from pvae.pair import Columns, Pair

__all__ = ["quantity"]


def quantity(model: Pair, columns: Columns, measured: int) -> dict[str, Any]:
    """The fields `of`, `dimensions` and `fingerprint` of an evaluation.

    Args:
        model: of the data.
        columns: the data, noise drawn.
        measured: numbers in one x, of all sites but labels, missing entries included.
    """
    absent = {name: column.values.isnan() for name, column in columns.columns.items()}
    labels = [name for name in absent if name in model.summed]
    without = [name for name in labels if bool(absent[name].all())]
    given = [name for name in absent if name in model.given]
    others = [name for name in absent if name not in (*labels, *given)]
    observed = [name for name in absent if name not in (*without, *given)]
    of = ", ".join(observed) if given or len(observed) > 1 else "x"
    missing = sum(int(absent[name].sum()) for name in others)
    seen = sum(int((~absent[name]).sum()) for name in labels)
    return {
        "of": f"{of} | {', '.join(given)}" if given else of,
        "dimensions": measured + (seen - missing) / len(columns),
        "fingerprint": columns.fingerprint(without),
    }
