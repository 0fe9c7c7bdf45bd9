"""A checkpoint's weights as one safetensors file that `module.load_state_dict` takes.

state_dict(store, find(store, "best"))      # name -> fp32 tensor
export(store, checkpoint, "model.safetensors")
"""

from __future__ import annotations

import torch
from safetensors.torch import save

from dltrain.checkpoint.commit import Checkpoint
from dltrain.checkpoint.fragments import AVERAGE, PARAM
from dltrain.checkpoint.reader import FragmentReader
from dltrain.store import Store, open_store

__all__ = ["export", "state_dict"]


def state_dict(store: Store, checkpoint: Checkpoint, *, average: bool = True) -> dict[str, torch.Tensor]:
    """Parameters (fp32), buffers, frozen parameters and ties under the module's own names.

    Args:
        average: take the weights' running average (`train.ema`) where the checkpoint has one.
    """
    reader = FragmentReader(store, checkpoint)
    state = {}
    for name in reader.names:
        has = average and AVERAGE in reader.kinds(name)
        state[name] = reader.tensor(name, AVERAGE if has else PARAM)
    state |= reader.whole("buffer:")
    state |= reader.whole("frozen:")
    for alias, name in checkpoint.manifest.get("ties", {}).items():
        # safetensors refuses shared memory; a tie becomes a copy, and load_state_dict ties it again.
        state[alias] = state[name].clone()
    return state


def export(store: Store, checkpoint: Checkpoint, target: str) -> int:
    """Writes `state_dict` to a path or URL; returns its size in bytes."""
    metadata = {"format": "pt", "step": str(checkpoint.step)}
    data = save({k: v.contiguous() for k, v in state_dict(store, checkpoint).items()}, metadata=metadata)
    parent, _, name = target.rpartition("/")
    open_store(parent or ".").write(name, data)
    return len(data)
