"""A checkpoint written at once from whole tensors, as if one rank had saved it: for what was not trained here.

write_whole(store, step, {("conv.weight", "param"): w, ("conv.weight", "exp_avg"): m}, {"buffer:norm.mean": b}, meta)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from dltrain.checkpoint.commit import Checkpoint, commit, find, write_rank
from dltrain.store import Store

__all__ = ["write_whole"]

# Below that of any attempt of a run, which begin at 1.
_ATTEMPT = 0


def write_whole(
    store: Store,
    step: int,
    fragments: Mapping[tuple[str, str], torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
) -> Checkpoint:
    """Writes and commits it.

    Args:
        fragments: (name, kind) -> the tensor in its shape; kind is "param" or the name of a moment.
        whole: buffers and frozen parameters, under "buffer:..." and "frozen:...".
        meta: what else the manifest says; `ties` and `optimizer_step` among it.
    """
    tensors, parts = {}, []
    for number, ((name, kind), tensor) in enumerate(fragments.items()):
        key = f"{kind}:{number:05d}"
        tensors[key] = tensor.detach().to("cpu", torch.float32).reshape(-1).contiguous()
        parts.append([name, kind, list(tensor.shape), key, 0, tensor.numel(), 0])
    # A copy each: safetensors refuses memory that two share.
    tensors |= {key: tensor.detach().cpu().clone().contiguous() for key, tensor in whole.items()}
    file = {**write_rank(store, step, _ATTEMPT, 0, save(tensors)), "parts": parts}
    commit(store, step, _ATTEMPT, [file], {"num_ranks": 1, **meta, "whole": sorted(whole)})
    return find(store, str(step))
