"""The peers, each in its best configuration: one small file each, imported in a process of its own.

A peer's file has `JOBS`, which maps (peer, kind of work) to a function of (sizes, folder, device).
It makes a job: an object with

    check()  -> what the work comes to, to be held against pvae's, and what warms the job up
    time()   -> seconds for one unit of the work, from a block of them

`FILES` says where a peer is. It is all that must be imported to know that a peer exists.
"""

from typing import Any, Protocol

__all__ = ["FILES", "Job"]

FILES = {
    "pvae": "pvae_",
    "bare steps": "pvae_",
    "its kernels alone": "pvae_",
    "matrix products alone": "pytorch",
    "limit of 5 s": "pytorch",
    "PyTorch": "pytorch",
    "PyTorch + torch.compile": "pytorch",
    "Pyro SVI": "pyro_",
    "Pyro SVI, denormals flushed": "pyro_",
    "Pyro SVI, JitTrace_ELBO": "pyro_",
    "NumPyro": "numpyro_",
    "pythae get_nll": "pythae_",
    "scikit-learn": "sklearn_",
}


class Job(Protocol):
    """A piece of work, ready to be timed."""

    def check(self) -> dict[str, Any]:
        """Losses of the first steps, bounds by datum, or a log-likelihood."""

    def time(self) -> float:
        """Seconds for one unit."""
