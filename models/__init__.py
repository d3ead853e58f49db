"""Declared models, one a file: `pvae.models.vae()` is the function `vae` of `vae.py`.

A file added here is a model at once: it holds a function of its own name, which returns a
`LatentModel`.
"""

from importlib import import_module
from pkgutil import iter_modules

__all__ = sorted(module.name for module in iter_modules(__path__))

for _name in __all__:
    globals()[_name] = getattr(import_module(f"{__name__}.{_name}"), _name)
