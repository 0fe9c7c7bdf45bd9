"""The zygote: one process of a machine that has imported all that is slow, and is forked for each agent's nursery.

link = plant(theirs, environment, family, spawn)    # a nursery serves the socket `theirs`
link.close()                                        # by the last of its agents: the zygote ends

Agents of one family, a driver's, share it: its imports take seconds of processor time and hundreds of MB, once a
machine and not once a rank, and an agent that comes later finds them done. Nurseries outlive their zygote; who
asks next begins a new one.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["main", "plant"]

# Ray's own variables differ between the processes of a family: a nursery takes its agent's.
_OF_AN_AGENT = "RAY_"
_LARGEST = 128 * 1024
_TRIES, _PAUSE_SECONDS = 50, 0.02
# Whoever begins a zygote is its first agent, unless that one is killed in between.
_NOBODY_SECONDS = 30.0
_PR_SET_NAME = 15
_NAMESPACES = ("net", "pid", "mnt", "user", "ipc")

Spawn = Callable[[Sequence[str], Sequence[int], dict[str, str]], Any]


def plant(theirs: socket.socket, environment: dict[str, str], family: str, spawn: Spawn) -> socket.socket:
    """Has a nursery serve the socket `theirs`, of which the caller may close its own copy.

    It does not wait: the nursery speaks up once the imports are done. If anything ends the zygote before that, `theirs`
    is closed and no nursery comes.

    Args:
        environment: of the nursery.
        family: agents of different ones have nothing in common.
        spawn: starts `python -m` with arguments, file descriptors and environment.

    Returns:
        The link that keeps the zygote.

    Raises:
        OSError: the machine refuses to make a socket or a process.
    """
    name, mine = _name(environment, family), {k: v for k, v in environment.items() if k.startswith(_OF_AN_AGENT)}
    for _ in range(_TRIES):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.connect(name)
            if _user_of(link) == os.getuid():
                socket.send_fds(link, [pickle.dumps((mine, os.getpid()))], [theirs.fileno()])
                return link
            # Somebody else's: not to be trusted, and not to be waited for.
            family = f"{family} {os.getpid()}"
            name = _name(environment, family)
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            _begin(name, environment, spawn)
        link.close()
    raise OSError(errno.ECONNREFUSED, f"no zygote answers after {_TRIES} tries")


def _begin(name: str, environment: dict[str, str], spawn: Spawn) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                # Another agent is about to listen there, or a zygote to end.
                time.sleep(_PAUSE_SECONDS)
                return
            raise
        listener.listen(1024)
        spawn(["dltrain.running.zygote", str(listener.fileno())], [listener.fileno()], environment)


def _name(environment: Mapping[str, str], family: str) -> str:
    """An abstract address: it leaves no file, and ends with whoever listens."""
    shared = sorted((key, value) for key, value in environment.items() if not key.startswith(_OF_AN_AGENT))
    # Containers that share a network see each other's addresses.
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in _NAMESPACES]
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    what = [family, os.getuid(), nice, sys.executable, os.getcwd(), spaces, shared]
    return "\0dltrain-" + hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _user_of(link: socket.socket) -> int:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", credentials)[1]
    return user


# ---- in the zygote ----


def main(listener: socket.socket, ready: Callable[[], Any]) -> socket.socket | None:
    """Forks for each that asks, until the last link is closed.

    Args:
        ready: does what is slow, before the first fork.

    Returns:
        In a process that is to be a nursery: what it serves. In the zygote, at its end: nothing. So a worker's stack is
        not that of its zygote.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready()
    # The kernel clears up after nurseries. Not before: imports may wait for programs that they start.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    links: set[socket.socket] = set()
    seconds: float | None = _NOBODY_SECONDS
    while True:
        come, _, _ = select.select([listener, *links], [], [], seconds)
        for one in come:
            if one is listener:
                link, _ = listener.accept()
                if _user_of(link) == os.getuid():
                    links.add(link)
                continue
            try:
                message, fds, _, _ = socket.recv_fds(one, _LARGEST, 1)
            except ConnectionResetError:
                message, fds = b"", []
            if not message:
                one.close()
                links.discard(one)
            elif not os.fork():
                for other in (listener, *links):
                    other.close()
                _begin_nursery(*pickle.loads(message))
                return socket.socket(fileno=fds[0])
            for fd in fds:
                os.close(fd)
        if not links and not select.select([listener], [], [], 0)[0]:
            return None
        seconds = None


def _begin_nursery(variables: Mapping[str, str], agent: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"nursery {agent}".encode())
    for name in [name for name in os.environ if name.startswith(_OF_AN_AGENT)]:
        del os.environ[name]
    os.environ.update(variables)


if __name__ == "__main__":
    from dltrain.running import nursery

    gc.disable()
    try:
        control = main(socket.socket(fileno=int(sys.argv[1])), nursery.prepare)
        if control:
            nursery.serve(control)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Not sys.exit: nothing of what was imported is to be cleared up, seconds long.
    os._exit(0)
