"""The list of works: what is timed, in which sizes, against whom, and what ratio is wanted.

A target is the largest ratio wanted of pvae's time to the peer's; None where none is set, and the
peer is shown for comparison. To add a work, add a `Work`; each peer named in it does it by the job
of that kind in its file in `peers/`.
"""

from dataclasses import dataclass

__all__ = ["CEILING", "SCALING", "Series", "Work", "works"]

CEILING = 1 / 0.6  # at least 60 % of the rate of bare matrix products


@dataclass(frozen=True)
class Work:
    """One row of the table for each peer.

    Args:
        name: what the table calls it.
        kind: which job of a peer does it.
        unit: what one time is of.
        targets: by peer.
        sizes: for the job; see the peers' files.
    """

    name: str
    kind: str
    unit: str
    targets: dict[str, float | None]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Series:
    """One kind of work in growing sizes, to see how its cost grows."""

    name: str
    kind: str
    grows: str
    values: tuple[int, ...]
    fixed: dict[str, int]
    peers: tuple[str, ...] = ("PyTorch", "NumPyro")

    def works(self) -> list[Work]:
        """One work a size, without targets."""
        targets: dict[str, float | None] = dict.fromkeys(self.peers)
        return [
            Work(f"{self.name} {value}", self.kind, "", targets, {**self.fixed, self.grows: value})
            for value in self.values
        ]


def works(quick: bool, device: str) -> list[Work]:
    """The works for a device; `quick` has fewer and smaller ones, and its ratios mean little."""
    if device == "cuda":
        return _cuda()
    if quick:
        return [
            _step(20, 1, 50, peers=("NumPyro", "PyTorch", "Pyro SVI")),
            _step(20, 50, 10, peers=("NumPyro", "PyTorch", "Pyro SVI")),
            _evaluation(many=1000, num_data=64, particles=500, few=2),
            _mixture("diag", num_data=6000, updates=2),
            _mixture("full", num_data=6000, updates=2),
        ]
    return [
        _step(20, 1, steps=200),
        _step(128, 1, steps=100),
        _step(512, 1, steps=50),
        _step(20, 50, steps=50),
        Work(
            "epoch of fit, dynamic binarisation, 60,000 images",
            "epoch",
            "epoch",
            {"bare steps": 1.1},
            {"num_data": 60_000, "batch": 128, "particles": 1},
        ),
        _evaluation(many=2000, num_data=64, particles=5000, few=4),
        _mixture("diag", num_data=60_000, updates=3),
        _mixture("full", num_data=60_000, updates=3),
    ]


def _step(batch: int, particles: int, steps: int, peers: tuple[str, ...] = ()) -> Work:
    of_pyro = 0.35 if batch == 20 else None
    targets = {
        "NumPyro": 1.0,
        "PyTorch + torch.compile": 0.9,
        "PyTorch": None,
        "Pyro SVI": of_pyro,
        "Pyro SVI, denormals flushed": of_pyro,
    }
    if particles == 1:
        targets["Pyro SVI, JitTrace_ELBO"] = None
    return Work(
        f"training step, batch {batch}, {particles} particle{'s' * (particles > 1)}",
        "step",
        "step",
        {name: targets[name] for name in peers or targets},
        {"batch": batch, "particles": particles, "steps": steps},
    )


def _evaluation(many: int, num_data: int, particles: int, few: int) -> Work:
    """pvae's `evaluate` on many data, NumPyro's passes on fewer, pythae's on a few."""
    return Work(
        f"evaluate, K = {particles:,}",
        "evaluate",
        "datum and draw",
        {"matrix products alone": CEILING, "NumPyro": 0.6, "pythae get_nll": 0.05},
        {"many": many, "num_data": num_data, "particles": particles, "few": few},
    )


def _mixture(covariance: str, num_data: int, updates: int) -> Work:
    name = {
        "diag": "784 pixels, diagonal covariances",
        "full": "64 principal components, full covariances",
    }
    return Work(
        f"EM, 50 components, {num_data:,} data, {name[covariance]}",
        f"em {covariance}",
        f"{updates} updates",
        {"scikit-learn": 0.5},
        {"num_data": num_data, "components": 50, "updates": updates},
    )


def _cuda() -> list[Work]:
    steps = [_cuda_step(20, 1), _cuda_step(128, 1), _cuda_step(512, 1), _cuda_step(20, 50)]
    return [
        *steps,
        Work(
            "evaluate, K = 5,000, 10,000 images",
            "evaluate",
            "10,000 images",
            {"limit of 5 s": 1.0},
            {"many": 10_000, "particles": 5000, "units": 1},
        ),
    ]


def _cuda_step(batch: int, particles: int) -> Work:
    of_pyro = 0.1 if batch == 20 else None
    work = _step(batch, particles, steps=50)
    targets = {
        "Pyro SVI": of_pyro,
        "PyTorch": None,
        "PyTorch + torch.compile": None,
        "its kernels alone": 1.5,
    }
    return Work(work.name, work.kind, work.unit, targets, work.sizes)


SCALING = (
    Series("batch", "step", "batch", (64, 256, 1024), {"particles": 1, "steps": 20}),
    Series("particles", "step", "particles", (5, 20, 80), {"batch": 20, "steps": 20}),
    Series(
        "latent size",
        "step",
        "latent",
        (10, 50, 250),
        {"batch": 128, "particles": 1, "steps": 50},
    ),
    Series(
        "data (an epoch)",
        "epoch",
        "num_data",
        (15_000, 30_000, 60_000),
        {"batch": 128, "particles": 1},
    ),
)
