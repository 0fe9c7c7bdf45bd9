"""Ports for servers of tests.

(port,) = free_ports(1)
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket

__all__ = ["free_ports"]

# Below those that the kernel gives to outgoing connections, which would take one in the seconds before its server does.
_FIRST, _LAST = 10_000, 32_000


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses at the moment, each another one."""
    with contextlib.ExitStack() as stack:
        return [_bind(stack.enter_context(socket.socket())) for _ in range(count)]


def _bind(probe: socket.socket) -> int:
    while True:
        port = random.SystemRandom().randint(_FIRST, _LAST)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return port
