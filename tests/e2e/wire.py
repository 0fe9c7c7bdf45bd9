"""A wire to a server that can be cut: connections break off and nobody answers, or everything just stands still.

with Wire("http://127.0.0.1:8000") as wire:
    ...                                  # wire.endpoint instead
    wire.cut(); wire.mend()              # refused meanwhile
    wire.hold(); wire.mend()             # accepted, and silent
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from urllib.parse import urlsplit

__all__ = ["Wire"]

_CHUNK_BYTES = 64 * 1024


class Wire:
    """Passes TCP connections on, until told otherwise; a thread of its own."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._host, self._server_port = parts.hostname or "", parts.port or 80
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        self._up.wait()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Breaks every connection off and refuses new ones."""
        self._loop.call_soon_threadsafe(self._break_off)

    def hold(self) -> None:
        """Passes nothing on any more."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def mend(self) -> None:
        """Works again; what was held goes on."""
        self._loop.call_soon_threadsafe(self._work)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    # ---- in the thread ----

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._flowing, self._refusing = asyncio.Event(), False
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._up.set()
        await self._end.wait()
        server.close()

    def _break_off(self) -> None:
        self._refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def _work(self) -> None:
        self._refusing = False
        self._flowing.set()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self._refusing:
            to_client.transport.abort()
            return
        server, to_server = await asyncio.open_connection(self._host, self._server_port)
        self._writers |= {to_client, to_server}
        # Cancelled at the end, with the loop.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(self._pass(client, to_server), self._pass(server, to_client))
        for writer in (to_server, to_client):
            self._writers.discard(writer)
            writer.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_CHUNK_BYTES):
            await self._flowing.wait()
            sink.write(data)
            await sink.drain()
        sink.close()
