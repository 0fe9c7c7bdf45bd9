"""The notice that a spot machine will be taken: how it is asked for, and what is done about it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster import spot

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Service(ThreadingHTTPServer):
    """A metadata service: sessions have tokens, and there is no notice until one is given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.tokens: list[str] = []
        self.notice = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        good = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.server.tokens.append(f"token{len(self.server.tokens)}")
        self.answer(200 if good else 400, self.server.tokens[-1])

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != self.server.tokens[-1]:
            self.answer(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice:
            self.answer(200, self.server.notice)
        else:
            self.answer(404, "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def notice_at(moment: datetime) -> str:
    return json.dumps({"action": "terminate", "time": moment.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_there_is_no_notice_until_there_is_one(service: Service) -> None:
    metadata = spot.Metadata(service.address)
    assert metadata.notice() is None
    assert metadata.notice() is None
    # A session for all questions.
    assert service.tokens == ["token0"]
    service.notice = notice_at(NOON)
    assert metadata.notice() == NOON


def test_a_session_that_is_over_is_begun_again(service: Service) -> None:
    metadata = spot.Metadata(service.address)
    service.notice = notice_at(NOON)
    assert metadata.notice() == NOON
    service.tokens.append("of another session")
    assert metadata.notice() is None
    assert metadata.notice() == NOON


def test_a_service_that_is_away_or_odd_is_no_notice(service: Service) -> None:
    service.notice = "not JSON"
    assert spot.Metadata(service.address).notice() is None
    service.notice = json.dumps({"action": "terminate"})
    assert spot.Metadata(service.address).notice() is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert spot.Metadata(f"http://127.0.0.1:{port}").notice() is None


def test_the_work_has_nearly_all_the_time_that_is_left() -> None:
    assert spot.seconds_to_drain(NOON + timedelta(seconds=120), NOON) == 110
    # Late is better than not at all.
    assert spot.seconds_to_drain(NOON - timedelta(seconds=1), NOON) == 5


def test_it_drains_once_when_the_notice_comes() -> None:
    answers = iter([None, None, NOON + timedelta(seconds=60)])
    slept: list[float] = []
    drained: list[float] = []
    spot.watch(lambda: next(answers), drained.append, now=lambda: NOON, sleep=slept.append)
    assert drained == [50]
    assert len(slept) == 2


def test_one_watches_a_machine(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drained: list[float] = []
    monkeypatch.setattr(spot, "_drain", drained.append)
    monkeypatch.setattr(spot, "_LOCK", f"{spot._LOCK}-test-{service.server_address[1]}")
    service.notice = notice_at(datetime.now(UTC) + timedelta(seconds=100))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(spot._LOCK)
        assert spot.main(["--address", service.address]) == 0
        assert "another one" in capsys.readouterr().out
    assert drained == []
    assert spot.main(["--address", service.address]) == 0
    assert len(drained) == 1
    assert 5 < drained[0] <= 90
