"""Images become tokens, tokens are masked, a transformer fills them in: MAGE, trained by DeepSpeed.

Importing the package imports no torch: a public name is looked up when it is first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {}  # name -> the module that defines it

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
