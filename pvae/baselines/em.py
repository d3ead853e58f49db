"""Expectation maximisation (EM): what the mixtures share, whatever their components are.

    x (N, D)  --k_means-->  means (C, D) to begin from
    log p(c, x) of a block  --posterior-->  log p(x) (B,), responsibilities (B, C)
    start, update  --ascend-->  the mixture where the log-likelihood has settled

Sources: Dempster, Laird & Rubin 1977, "Maximum likelihood from incomplete data via the EM
algorithm"; Bishop 2006, "Pattern recognition and machine learning", chapter 9.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pvae.baselines.rows import blocks

__all__ = [
    "EMPTY",
    "Assign",
    "ascend",
    "check_counts",
    "check_regularisation",
    "k_means",
    "nearest",
    "posterior",
]

EMPTY = 10 * torch.finfo(torch.float64).eps  # a component claiming fewer data than this is empty
NEGLIGIBLE = 1e-30  # far below `EMPTY`: responsibilities that no sum notices
NUM_LLOYD = 10  # k-means iterations before EM
NUM_SEEDED = 10_000  # k-means++ looks at this many data, or 20 a component

# A block of rows -> log p(x), (B,), and the share of each component in each datum, (B, C).
Assign = Callable[[Tensor], tuple[Tensor, Tensor]]


def ascend[M](
    start: M, update: Callable[[M], tuple[M, float]], num_data: int, max_iter: int, tol: float
) -> tuple[M, Tensor, bool]:
    """E and M steps from `start` until the log-likelihood settles (Bishop 2006, eq. 9.28).

    `update` returns the mixture after one E and one M step, and log p(x) before, summed over data.
    Returns the last mixture, the mean log-likelihood before each update, in nats, and whether its
    last change was below `tol`.
    """
    mixture, log_likelihood, converged = start, list[float](), False
    while len(log_likelihood) < max_iter and not converged:
        mixture, total = update(mixture)
        log_likelihood.append(total / num_data)
        converged = len(log_likelihood) > 1 and abs(log_likelihood[-1] - log_likelihood[-2]) < tol
    return mixture, torch.tensor(log_likelihood, dtype=torch.float64), converged


def posterior(log_joint: Callable[[Tensor], Tensor]) -> Assign:
    """The E step from log p(c, x) of a block, (B, C), overwritten (Bishop 2006, eq. 9.23)."""
    least = math.log(NEGLIGIBLE) - 1

    def assign(block: Tensor) -> tuple[Tensor, Tensor]:
        r = log_joint(block)
        top = r.amax(dim=1, keepdim=True)
        r.sub_(top).clamp_(min=least).exp_()  # unclamped, most underflow: exp is 20 times slower
        total = r.sum(dim=1, keepdim=True)
        r.div_(total)
        return (top + total.log()).squeeze(dim=1), torch.threshold_(r, NEGLIGIBLE, 0.0)

    return assign


def nearest(means: Tensor) -> Assign:
    """k-means: 1 for the component with the nearest mean, 0 for others (Bishop 2006, eq. 9.2)."""
    squares = means.square().sum(dim=1)

    def assign(block: Tensor) -> tuple[Tensor, Tensor]:
        x = block[:, : means.shape[1]]
        distance = torch.addmm(squares, x, means.T, alpha=-2)
        one_hot = torch.zeros_like(distance).scatter_(1, distance.argmin(dim=1, keepdim=True), 1)
        return x.new_zeros(len(x)), one_hot

    return assign


def k_means(x: Tensor, centre: Tensor, num_components: int, generator: torch.Generator) -> Tensor:
    """k-means++ on a random part of the data, then k-means on all: means (C, D), less `centre`."""
    from sklearn.cluster import kmeans_plusplus

    num_seeded = max(NUM_SEEDED, 20 * num_components)
    chosen = torch.randperm(len(x), generator=generator)[:num_seeded]
    part = (x[chosen.to(x.device)] - centre).cpu().numpy()
    random_state = int(torch.randint(2**31, (), generator=generator))
    seeds, _ = kmeans_plusplus(part, num_components, random_state=random_state)
    means = torch.from_numpy(seeds).to(centre)
    for _ in range(NUM_LLOYD):
        assign = nearest(means)
        N, total = means.new_zeros(num_components, 1), torch.zeros_like(means)
        for block in blocks(x, centre, num_components):
            one_hot = assign(block)[1]
            N.add_(one_hot.sum(dim=0)[:, None])
            total.addmm_(one_hot.T, block)
        means = torch.where(N > 0, total / N, means)
    return means


def check_counts(
    num_data: int, kind: str, num_components: int, num_starts: int, max_iter: int
) -> None:
    """Raise ValueError for counts below 1, and for fewer data than components."""
    counts = {"num_components": num_components, "num_starts": num_starts, "max_iter": max_iter}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    least = max(2, num_components)
    if num_data < least:
        raise ValueError(
            f"A mixture of {num_components} {kind} needs {least} data or more, got {num_data}. "
            "Ask for fewer components or give more data."
        )


def check_regularisation(regularisation: float) -> None:
    """Raise ValueError unless it can be added to a variance."""
    if not 0 <= regularisation < math.inf:
        raise ValueError(
            f"`regularisation` must be a variance, finite and not negative, got {regularisation}."
        )
