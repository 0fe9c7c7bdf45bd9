"""A browser without a window: Debian's chromium, asked over its debugging protocol.

    with Browser() as browser:
        page = browser.open(path, width=390, dark=True)
        page.run("document.title"), page.requests, page.problems, page.picture()

`missing()` says why there is none; DLTRAIN_REQUIRE_SERVERS=1 makes that a failure in the tests.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["INSTALL", "Browser", "Page", "missing"]

INSTALL = "apt-get install chromium"
_SECONDS = 60.0


def missing() -> str:
    """Empty where there is a browser."""
    return "" if shutil.which("chromium") else "no chromium"


class Page:
    """One page that is open. Attributes: requests: URLs it asked for; problems: what its console said."""

    def __init__(self, browser: Browser, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._browser, self._socket, self._number = browser, socket, 0
        self.requests: list[str] = []
        self.problems: list[str] = []

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """One command of the protocol; what happens meanwhile is noted."""
        return self._browser.loop.run_until_complete(asyncio.wait_for(self._ask(method, values), _SECONDS))

    async def _ask(self, method: str, values: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": values})
        while True:
            message = await self._socket.receive_json()
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found

    def wait_for(self, event: str) -> None:
        """Until something happens."""

        async def wait() -> None:
            while True:
                message = await self._socket.receive_json()
                self._note(message)
                if message.get("method") == event:
                    return

        self._browser.loop.run_until_complete(asyncio.wait_for(wait(), _SECONDS))

    def _note(self, message: dict[str, Any]) -> None:
        values = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(values["exceptionDetails"]))
            case "Log.entryAdded":
                self.problems.append(str(values["entry"]["text"]))

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])


class Browser:
    """Its process and files go with it."""

    def __enter__(self) -> Browser:
        self._stack = contextlib.ExitStack()
        self.loop = asyncio.new_event_loop()
        self._stack.callback(self.loop.close)
        directory = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="dltrain-chrome-", ignore_cleanup_errors=True)
        )
        # It may use little of /dev/shm in a container, and root needs --no-sandbox.
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        places = (f"--user-data-dir={directory}", "--remote-debugging-port=0")
        self._process = subprocess.Popen(
            ["chromium", *options, *places, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "HOME": directory},
        )
        self._stack.callback(self._end)
        assert self._process.stderr is not None
        lines = iter(self._process.stderr.readline, "")
        address = next((line.split()[-1] for line in lines if line.startswith("DevTools listening on ")), "")
        assert address, "chromium did not start"
        self._host = address.split("/")[2]
        self._session = self.loop.run_until_complete(self._begin())
        self._stack.callback(lambda: self.loop.run_until_complete(self._session.close()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def _begin(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def open(self, path: Path, width: int = 1280, dark: bool = False, script: bool = True) -> Page:
        """Opens a file."""
        page = Page(self, self.loop.run_until_complete(self._connect()))
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.ask(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        page.ask("Emulation.setScriptExecutionDisabled", value=not script)
        page.requests.clear()
        page.ask("Page.navigate", url=path.resolve().as_uri())
        page.wait_for("Page.loadEventFired")
        return page

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        async with self._session.put(f"http://{self._host}/json/new?about:blank") as reply:
            address = (await reply.json())["webSocketDebuggerUrl"]
        return await self._session.ws_connect(address, max_msg_size=0)
