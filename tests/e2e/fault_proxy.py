"""A proxy in front of an S3 server that does to some requests what networks and busy servers do.

    with FaultProxy(s3.endpoint) as proxy:
        proxy.plan = lambda number: BUSY if number in range(5, 15) else None
        ...                                  # AWS_ENDPOINT_URL_S3 = proxy.endpoint
        proxy.done[BUSY]

Requests for data are numbered from 1: those for a range of one version of an object. The others pass. What was
signed is passed on as it is, the Host header too, so the server's check of the signature holds.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

__all__ = ["BUSY", "CUT", "RESET", "SLOW", "STUCK", "FaultProxy"]

# 503 SlowDown; half of the body; the connection reset; late; never.
BUSY, CUT, RESET, SLOW, STUCK = "busy", "cut", "reset", "slow", "stuck"
_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


class FaultProxy:
    """Listens on loopback, at a port of its own.

    Attributes:
        plan: number of a request for data -> fault or None.
        expired: access keys that are no longer taken for data.
        slow_seconds: how late SLOW is; usual_seconds: how long every request for data takes besides.
        done: faults by kind.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.plan: Callable[[int], str | None] = lambda _: None
        self.expired: set[str] = set()
        self.slow_seconds = self.usual_seconds = 0.0
        self.done: Counter[str] = Counter()
        self.closing = threading.Event()
        self._number, self._lock = 0, threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def fault(self, headers: Any) -> str | None:
        """What to do to a request for data."""
        with self._lock:
            self._number += 1
            found = self.plan(self._number)
        if any(f"Credential={key}/" in headers.get("Authorization", "") for key in self.expired):
            found = "expired"
        if found:
            with self._lock:
                self.done[found] += 1
        return found

    def close(self) -> None:
        """Stops; requests that hang are let go."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: FaultProxy

    def handle_error(self, *_: object) -> None:
        """Clients go away; that is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.upstream)

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        proxy = self.server.proxy
        is_data = self.command == "GET" and "If-Match" in self.headers
        fault = proxy.fault(self.headers) if is_data else None
        if is_data:
            proxy.closing.wait(proxy.usual_seconds)
        if fault == BUSY:
            self._refuse(503, "SlowDown")
        elif fault == "expired":
            self._refuse(403, "ExpiredToken")
        elif fault == STUCK:
            proxy.closing.wait()
            self.close_connection = True
        else:
            if fault == SLOW:
                proxy.closing.wait(proxy.slow_seconds)
            self._pass_on(fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _refuse(self, status: int, code: str) -> None:
        body = _ERROR.format(code=code).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _pass_on(self, fault: str | None) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body or None)
        reply = self.upstream.getresponse()
        data = reply.read()
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = reply.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        if reply.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if fault in (CUT, RESET):
            self.wfile.write(data[: len(data) // 2])
            self._break_off(fault == RESET)
        else:
            self.wfile.write(data)

    def _break_off(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
