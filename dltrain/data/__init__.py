"""Which samples, in which order, and how they arrive: catalog -> order -> reader -> stream.

from dltrain.data import open_stream       # the loader by itself, for a training loop of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dltrain.data.loader import BatchStream, open_stream

__all__ = ["BatchStream", "open_stream"]


def __getattr__(name: str) -> Any:
    # The driver uses this package without torch.
    if name in __all__:
        from dltrain.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'dltrain.data' has no attribute {name!r}")
