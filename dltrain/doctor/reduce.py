"""One rank of the doctor's all-reduce: meets the others as a worker does, and adds up with them.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m dltrain.doctor.reduce gloo 30
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

from dltrain.doctor.probe import ANSWER
from dltrain.running.worker import die_with

_ELEMENTS = 1024 * 1024
_ROUNDS = 5


def main(backend: str, seconds: float) -> None:
    """Prints the answer as JSON on a line of its own."""
    die_with(os.getppid())
    print(ANSWER + json.dumps(_reduce(backend, seconds)), flush=True)
    # Not by way of the interpreter's end: a rank that failed may leave others waiting in it.
    os._exit(0)


def _reduce(backend: str, seconds: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from dltrain.running.rendezvous import meet

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meet(backend, os.environ, device, timedelta(seconds=seconds))
    num_ranks = dist.get_world_size()
    values = torch.full((_ELEMENTS,), float(dist.get_rank() + 1), device=device)
    # The first one makes the connections.
    dist.all_reduce(values)
    total = float(values[-1])
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = (time.perf_counter() - begin) / _ROUNDS
    return {"sum": total, "wanted": num_ranks * (num_ranks + 1) / 2, "seconds": taken, "bytes": 4 * _ELEMENTS}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
