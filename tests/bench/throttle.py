"""A store with a given bandwidth: passes TCP connections on, all replies together at so many bytes per second.

with throttled("http://127.0.0.1:8000", bytes_per_second=75e6) as endpoint:
    ...                                              # an endpoint of its own on loopback
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

__all__ = ["throttled"]

_CHUNK_BYTES = 64 * 1024


@contextlib.contextmanager
def throttled(endpoint: str, bytes_per_second: float) -> Iterator[str]:
    """Another endpoint for the same server, as long as the block runs."""
    proxy = _Proxy(urlsplit(endpoint).hostname or "", urlsplit(endpoint).port or 80, bytes_per_second)
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    proxy.up.wait()
    try:
        yield f"http://127.0.0.1:{proxy.port}"
    finally:
        proxy.loop.call_soon_threadsafe(proxy.end.set)
        thread.join()


class _Proxy:
    def __init__(self, host: str, port: int, bytes_per_second: float) -> None:
        self.host, self.server_port, self.rate = host, port, bytes_per_second
        self.up, self.port = threading.Event(), 0
        self.free = 0.0

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.up.set()
        await self.end.wait()
        server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(self.host, self.server_port)
        # Cancelled at the end, with the loop.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(self._pass(client, to_server, slow=False), self._pass(server, to_client, slow=True))
        for writer in (to_server, to_client):
            writer.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, slow: bool) -> None:
        while data := await source.read(_CHUNK_BYTES):
            if slow:
                await asyncio.sleep(self._turn(len(data)))
            sink.write(data)
            await sink.drain()
        sink.close()

    def _turn(self, size: int) -> float:
        """Books the bytes; returns how long until they may go."""
        now = self.loop.time()
        self.free = max(self.free, now) + size / self.rate
        return self.free - now
