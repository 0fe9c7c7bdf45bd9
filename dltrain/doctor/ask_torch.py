"""A child of the doctor: imports torch and DeepSpeed, and says what they are able to do here.

python -m dltrain.doctor.ask_torch < /dev/null
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from itertools import permutations
from typing import Any

from dltrain.doctor.probe import ANSWER


def main() -> None:
    """Prints the answer as JSON, on a line of its own."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _look()
    found["warnings"] = [str(w.message) for w in caught if "CUDA" in str(w.message)]
    print(ANSWER + json.dumps(found), flush=True)


def _look() -> dict[str, Any]:
    begin = time.monotonic()
    try:
        import torch
    except Exception as error:
        return {"error": f"torch: {type(error).__name__}: {error}"}
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    found["usable"] = bool(torch.cuda.is_available())
    try:
        import deepspeed
    except Exception as error:
        return {**found, "error": f"DeepSpeed: {type(error).__name__}: {error}"}
    found |= {"deepspeed": deepspeed.__version__, "seconds": time.monotonic() - begin, "op_error": _load_op()}
    return found | (_gpus() if found["usable"] else {})


def _load_op() -> str:
    from dltrain.training import cpu_op

    try:
        if cpu_op.is_built():
            cpu_op.load()
    except Exception as error:
        return f"{cpu_op.place()}: {error}"
    return ""


def _gpus() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count()
    capabilities = ["sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)]
    pairs = permutations(range(count), 2)
    return {
        "names": [torch.cuda.get_device_name(i) for i in range(count)],
        "capabilities": capabilities,
        "arches": torch.cuda.get_arch_list(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "no_peers": [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)],
    }


if __name__ == "__main__":
    main()
