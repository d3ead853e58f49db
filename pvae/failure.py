"""Where a NaN or an infinity first appears: its site, its datum, its parameter, for a message.

Called only once something has failed, with the random state put back to before it did.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pvae.particles import Particles

Batch = Tensor | Mapping[str, Tensor]

__all__ = ["bad_datum_of_gradient", "bad_parameters", "bad_site", "is_bad"]


def is_bad(value: Tensor | None) -> bool:
    """Whether a tensor holds a NaN or an infinity."""
    return value is not None and value.is_floating_point() and not bool(value.isfinite().all())


def bad_site(particles: Particles, index: Sequence[int] | Tensor) -> str:
    """The first site, the guide's before the model's, and its first datum, by `index`."""
    for name, factor in [*particles.log_q.items(), *particles.log_p.items()]:
        bad = ~factor.isfinite().all(0).reshape(-1, factor.shape[-1]).all(0)
        if bool(bad.any()):
            row = int(bad.nonzero()[0]) if len(bad) == len(index) else 0
            return f"site {name!r}, datum {int(index[row])}"
    return "no site when it was repeated"


def bad_datum_of_gradient(
    bound: Callable[[Batch], Tensor], batch: Batch, module: nn.Module, index: Tensor
) -> str:
    """The first datum whose own gradient is bad.

    Each is run alone: within a batch, a zero of one datum times an infinity of another is a NaN.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    for row in range(len(index)):
        rows = slice(row, row + 1)
        one = batch[rows] if isinstance(batch, Tensor) else {k: v[rows] for k, v in batch.items()}
        found = torch.autograd.grad(bound(one), parameters, allow_unused=True)
        if any(is_bad(gradient) for gradient in found):
            return f"datum {int(index[row])}"
    return "no single datum when each was repeated"


def bad_parameters(module: nn.Module, gradients: Sequence[Tensor | None]) -> str:
    """Names of the parameters whose gradient is bad, and of the sites they belong to."""
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    names = [name for name, g in zip(trained, gradients, strict=True) if is_bad(g)]
    sites = {name.split(".")[1] for name in names if name.count(".") > 1}
    what = ", ".join(names) or "the model"
    return f"{what} (site {', '.join(map(repr, sorted(sites)))})" if sites else what
