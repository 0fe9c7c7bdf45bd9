"""The rendezvous of an attempt: rank 0 serves torch's key-value store on its node's own address, all ranks meet there.

join_group("gloo", job.environment, torch.device("cpu"))     # in every worker

Left to itself, torch has the store listen on every address of the machine, and it asks nobody who they are.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from dltrain.errors import UserError

__all__ = ["interface_of", "join_group", "listen", "meet", "use_group", "wait_until_served"]

# Between tries: about as long as rank 0 is behind; in the end as seldom as many ranks may ask.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.002, 0.2
# Who answers at all does so by then; torch tells what to make of others, and needs time for it.
_ANSWER_SECONDS, _LEAST_SECONDS = 3.0, 1.0


def join_group(backend: str, environment: Mapping[str, str], device: Any) -> None:
    """Joins torch's process group, and has DeepSpeed use it.

    Args:
        environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torch's own launchers set them.

    Raises:
        UserError: the address is not one of rank 0's machine.
        RuntimeError: the port is taken, or a rank did not come.
    """
    from deepspeed.constants import default_pg_timeout

    meet(backend, environment, device, default_pg_timeout)
    use_group(backend)


def use_group(backend: str) -> None:
    """Has DeepSpeed use the process group that torch has."""
    import deepspeed

    # It prints about its op; stdout is the user's.
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def meet(backend: str, environment: Mapping[str, str], device: Any, timeout: timedelta) -> None:
    """The part of `join_group` that is torch's; what waits for another rank does so for no longer than `timeout`."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # The store takes the socket over.
    listening = listen(address, port).detach() if rank == 0 else None
    deadline = time.monotonic() + timeout.total_seconds()
    if rank != 0:
        wait_until_served(address, port, timeout.total_seconds())
    left = timedelta(seconds=max(deadline - time.monotonic(), _LEAST_SECONDS))
    store = TCPStore(address, port, num_ranks, is_master=rank == 0, timeout=left, master_listen_fd=listening)
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore("default_pg", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
        # As DeepSpeed would: later groups then come from this one's communicator, if it has peers.
        device_id=device if device.type == "cuda" and num_ranks > 1 else None,
    )


def listen(address: str, port: int) -> socket.socket:
    """A socket bound to this address and no other.

    Raises:
        UserError: the address is not this machine's.
        RuntimeError: somebody took the port meanwhile; the next attempt has another one.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            raise UserError(
                f"Ray knows this node by {address}, which is not an address of this machine ({error.strerror}), so the "
                "other workers can't reach it. Start Ray here with --node-ip-address=ADDRESS, one that is"
            ) from error
        raise RuntimeError(f"the store of the rendezvous can't listen at {address}:{port}: {error}") from error
    return bound


def wait_until_served(address: str, port: int, seconds: float) -> None:
    """Waits until somebody listens there: torch, which finds nobody yet, waits for half a second before it asks again.

    It returns at the latest when the time is up, or where waiting is of no use: torch then says what is wrong.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, _ANSWER_SECONDS)).close()
            return
        except ConnectionRefusedError:
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
        except OSError:
            return


def interface_of(address: str) -> str:
    """The network interface that has this address, for gloo and NCCL; without it gloo may bind to 127.0.0.1."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return str(name)
    return "lo"
