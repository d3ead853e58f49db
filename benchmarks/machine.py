"""What the figures were measured on: processor, memory, Python and the versions of libraries."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe"]

LIBRARIES = (
    "torch",
    "pyro-ppl",
    "numpyro",
    "jax",
    "pythae",
    "scikit-learn",
    "numpy",
    "pvae-ppl",
)


def describe(device: str) -> dict[str, Any]:
    """The machine and the libraries, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory, GB": _memory(),
        "load before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **({"gpu": _gpu()} if device == "cuda" else {}),
    }


def _processor() -> str:
    """The model, and where the name tells little, its family and instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    rows = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in rows}
    widest = [s for s in ("avx2", "avx512f", "amx_tile") if s in found.get("flags", "").split()]
    name = found.get("model name", platform.machine())
    model = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return ", ".join([name, model, *widest[-1:]])


def _memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()
