"""Memory of batches: filled once by the gather, then handed over to the tensors.

memory = take_over(buffer)               # tensor, uint8, of what Arrow has just copied
buffer = offer(memory)                   # Arrow's, for the rows that `collate` gets
tensor = claim(buffer.address)           # the same memory, if it is a batch's and nobody has it yet

It comes from Arrow's pool, which keeps what was freed in huge pages and gives it out again: a page's first touch
costs more than a copy of what is in it. Where this process uses CUDA, it is copied once more, to page-locked memory.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

__all__ = ["claim", "offer", "take_over"]

# By address. An entry goes with the array that was offered, before the memory can be another's.
_offered: dict[int, torch.Tensor] = {}


def take_over(buffer: pa.Buffer) -> torch.Tensor:
    """The bytes, in memory that nobody else has: (size,) uint8.

    Args:
        buffer: that nothing but its array uses.
    """
    taken = torch.from_numpy(np.frombuffer(buffer, np.uint8))
    return taken.pin_memory() if torch.cuda.is_initialized() else taken  # type: ignore[no-untyped-call]


def offer(tensor: torch.Tensor) -> pa.Buffer:
    """The memory as a buffer of Arrow's, which can be claimed once as long as the buffer lives."""
    array: npt.NDArray[np.uint8] = tensor.numpy()
    _offered[tensor.data_ptr()] = tensor
    weakref.finalize(array, _offered.pop, tensor.data_ptr(), None).atexit = False
    return pa.py_buffer(array)


def claim(address: int) -> torch.Tensor | None:
    """The memory that was offered at this address; None where it is not a batch's own, or is taken already."""
    return _offered.pop(address, None)
