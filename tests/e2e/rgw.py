"""A real S3 server for tests: Ceph's RADOS gateway on loopback, all of it in memory.

    with running_gateway() as s3:
        s3.make_bucket("runs")
        subprocess.run([...], env={**os.environ, **s3.env})

One monitor, one OSD that keeps its objects in memory, one gateway; no manager, no authentication between them.
The gateway listens on loopback, or where it is told to. Ports are picked at random, files go to a temporary directory,
and the processes end with the one that started them, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from ports import free_ports

__all__ = ["INSTALL", "LAUNCHER", "Gateway", "missing_programs", "running_gateway"]

INSTALL = "apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd"
_PROGRAMS = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")
_START_SECONDS = 60
_STOP_SECONDS = 10
_ATTEMPTS = 3
_REGION = "us-east-1"

# Becomes the daemon. The kernel kills it when the test process ends, even by SIGKILL; the check is for a parent
# that was gone before the kernel had been asked.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test process is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""

_CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# The gateway's own default asks for encryption, which there is none of without authentication.
ms mon client mode = crc
run dir = {home}
pid file =
admin socket =
log file = {home}/$name.log
mon cluster log file = {home}/cluster.log
keyring = {home}/keyring
# The default gathers changes for a second, of which making the pools takes a dozen.
paxos propose interval = 0.05
mon data = {home}/mon
mon allow pool size one = true
mon warn on pool no redundancy = false
mon osd crush smoke test = false
mon pg warn min per osd = 0
osd data = {home}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd crush chooseleaf type = 0
osd class update on start = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
rgw data = {home}/rgw
rgw frontends = beast endpoint={address}:{port} tcp_nodelay=1
rgw run sync thread = false
rgw enable usage log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
rgw thread pool size = 64
"""


@dataclass(frozen=True)
class Gateway:
    """A running server and its one user.

    Attributes:
        new_keys: makes another access key and its secret, which are that user's too.
    """

    endpoint: str
    access_key: str
    secret_key: str
    new_keys: Callable[[], tuple[str, str]]

    @property
    def env(self) -> dict[str, str]:
        """The variables that make S3 clients use it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": _REGION,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 client of that user."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=_REGION,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 5, "mode": "standard"}),
        )

    def make_bucket(self, name: str) -> str:
        """Makes a bucket; returns its URL."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return f"s3://{name}"


def missing_programs() -> list[str]:
    """Those of Ceph's programs that are not installed."""
    return [program for program in _PROGRAMS if not shutil.which(program)]


@contextlib.contextmanager
def running_gateway(address: str = "127.0.0.1") -> Iterator[Gateway]:
    """Starts the server; stops it and removes all its files at the end.

    Args:
        address: of this host, that the gateway listens on.

    Raises:
        RuntimeError: it did not come up; the message has the ends of the logs.
    """
    cluster, gateway = _started(address)
    try:
        yield gateway
    finally:
        cluster.stop()


def _started(address: str) -> tuple[_Cluster, Gateway]:
    for attempt in range(1, _ATTEMPTS + 1):
        cluster = _Cluster(address)
        try:
            return cluster, cluster.start()
        except BaseException as error:
            # Another process may have taken a port between its choice and its use: such a daemon ends at once.
            again = isinstance(error, _NotUpError) and cluster.ended() and attempt < _ATTEMPTS
            cluster.stop()
            if not again:
                raise
    raise AssertionError("the last attempt returns or raises")


class _NotUpError(RuntimeError):
    """A part of the server ended early or took too long."""


class _Cluster:
    """The processes and the files of one server."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._home = Path(tempfile.mkdtemp(prefix="dltrain-rgw-"))
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._mon_port, self._port = free_ports(2)

    def start(self) -> Gateway:
        fsid = str(uuid.uuid4())
        config = _CONFIG.format(
            home=self._home, fsid=fsid, mon_port=self._mon_port, address=self._address, port=self._port
        )
        (self._home / "ceph.conf").write_text(config)
        (self._home / "keyring").touch()
        self._start_monitor(fsid)
        self._start_osd()
        return self._start_gateway()

    def ended(self) -> list[str]:
        """The programs that are no longer running."""
        return [program for program, daemon in self._daemons if daemon.poll() is not None]

    def stop(self) -> None:
        # No goodbye: nothing in them is kept, and a monitor takes seconds to end politely.
        for _, daemon in reversed(self._daemons):
            daemon.kill()
        for _, daemon in self._daemons:
            daemon.wait(_STOP_SECONDS)
        shutil.rmtree(self._home, ignore_errors=True)

    def _start_monitor(self, fsid: str) -> None:
        monmap = str(self._home / "monmap")
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._spawn("ceph-mon", "-f", "-i", "a")

    def _start_osd(self) -> None:
        (self._home / "osd").mkdir()
        identity = str(uuid.uuid4())
        # The first answer also means that the monitor is up.
        self._run("ceph", "--connect-timeout", str(_START_SECONDS), "osd", "new", identity)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", identity)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self._wait("the OSD", lambda: json.loads(self._run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] == 1)

    def _start_gateway(self) -> Gateway:
        self._spawn("radosgw", "-f", "-n", "client.rgw")
        endpoint = f"http://{self._address}:{self._port}"
        self._wait("the gateway", lambda: _answers(endpoint))
        user = json.loads(self._run("radosgw-admin", "user", "create", "--uid=dltrain", "--display-name=dltrain"))
        gateway = Gateway(endpoint, user["keys"][0]["access_key"], user["keys"][0]["secret_key"], self._new_keys)
        _warm_up(gateway)
        return gateway

    def _new_keys(self) -> tuple[str, str]:
        pair = (f"key{uuid.uuid4().hex}", uuid.uuid4().hex)
        keys = [f"--access-key={pair[0]}", f"--secret-key={pair[1]}"]
        self._run("radosgw-admin", "key", "create", "--uid=dltrain", "--key-type=s3", *keys)
        return pair

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self._home / "ceph.conf"), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise _NotUpError(f"{' '.join(command)} took over {_START_SECONDS} s\n{self._logs()}") from error
        if done.returncode:
            raise _NotUpError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}\n{self._logs()}")
        return done.stdout

    def _spawn(self, program: str, *arguments: str) -> None:
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, str(os.getpid())]
        command = [*launcher, program, "-c", str(self._home / "ceph.conf"), *arguments]
        with (self._home / f"{program}.out").open("wb") as out:
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._daemons.append((program, daemon))

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            ended = self.ended()
            if ended or time.monotonic() > deadline:
                reason = f"{', '.join(ended)} ended" if ended else f"not up after {_START_SECONDS} s"
                raise _NotUpError(f"{what}: {reason}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        files = sorted([*self._home.glob("*.out"), *self._home.glob("*.log")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _warm_up(gateway: Gateway) -> None:
    """The first write makes the server's pools, which takes seconds that no test should measure."""
    gateway.make_bucket("warm-up")
    client = gateway.client()
    try:
        client.put_object(Bucket="warm-up", Key="first", Body=b"first")
        client.delete_object(Bucket="warm-up", Key="first")
        client.delete_bucket(Bucket="warm-up")
    finally:
        client.close()
