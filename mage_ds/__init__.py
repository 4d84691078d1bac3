"""Images become tokens, tokens are masked, a transformer fills them in: MAGE, trained by DeepSpeed.

    model = mage_ds.from_pretrained("RUN")

Importing the package imports no torch: a public name is looked up when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mage_ds.errors import UserError
    from mage_ds.pretrained import Pretrained, from_pretrained

__version__ = "0.1.0"

_PUBLIC = {  # name -> the module that defines it
    "Pretrained": "mage_ds.pretrained",
    "UserError": "mage_ds.errors",
    "from_pretrained": "mage_ds.pretrained",
}

__all__ = ["Pretrained", "UserError", "__version__", "from_pretrained"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
