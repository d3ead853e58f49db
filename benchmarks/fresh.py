"""What needs a process of its own: imports, peak memory, the demo, and the difference of TF32.

`python -m benchmarks.fresh NAME ARGUMENT` prints one number as its last line.
"""

import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

__all__ = ["demo", "imported", "peak", "tf32"]

NUM_DATA = 200  # times 50,000 particles: more weights than `evaluate` may hold at once


def imported(name: str) -> float:
    """Seconds to import a package."""
    start = time.perf_counter()
    import_module(name)
    return time.perf_counter() - start


def peak(num_particles: str) -> float:
    """Peak resident memory of a process that evaluates with K particles, in MB."""
    import torch

    import pvae
    from benchmarks.peers.pvae_ import vae

    x = torch.bernoulli(
        torch.full((NUM_DATA, 784), 0.2), generator=torch.Generator().manual_seed(0)
    )
    pvae.evaluate(vae(), x, int(num_particles), device="cpu", compile=True)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def demo(compile: str) -> float:
    """Seconds of `pvae demo`, as it is ("default") or with each fit eager ("False")."""
    import pvae.demo

    if compile == "False":
        fit = pvae.demo.fit
        pvae.demo.fit = lambda *args, **kwargs: fit(*args, **{**kwargs, "compile": False})
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pvae.demo.demo(folder)
        return time.perf_counter() - start


def tf32(folder: str) -> float:
    """Mean difference of L_500 by TF32 products to that by float32 ones, in nats, on CUDA."""
    import torch

    import pvae
    from benchmarks import inputs
    from benchmarks.peers.pvae_ import vae

    x = torch.from_numpy(inputs.load(Path(folder), "bits", 1000))
    means = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        result = pvae.evaluate(vae(), x, 500, device="cuda")  # the same seed: the same draws
        means.append(float(result.per_datum["bound"].sel(particles=500).mean()))
    return means[1] - means[0]


if __name__ == "__main__":
    name, argument = sys.argv[1:]
    measures = {"imported": imported, "peak": peak, "demo": demo, "tf32": tf32}
    print(measures[name](argument))
