"""`ray up` with cluster/ray-up/onprem.yaml, for real: over SSH to hosts of the lab, a run on what it made, `ray down`.

Each host has process ids and a home of its own: `ray stop`, which the file says, ends all of Ray that it sees. What is
left out is the download of packages: the hosts' environment is this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from harness import ROOT, SECONDS, Done, make_spec, wait_for, write_data, write_spec

from cluster.lab import Host, Lab

pytestmark = pytest.mark.usefixtures("several_hosts", "ssh_server")

SSHD = "/usr/sbin/sshd"
VENV = Path(sys.executable).parents[1]


@pytest.fixture(scope="module")
def ssh_server() -> None:
    """Skips where there is no SSH server."""
    missing = [name for name in (SSHD, "ssh", "ssh-keygen", "rsync", "unshare") if not shutil.which(name)]
    reason = f"{', '.join(missing)} not found: apt-get install openssh-server openssh-client rsync util-linux"
    if missing and os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
        pytest.fail(reason)
    if missing:
        pytest.skip(reason)


@dataclass
class Site:
    """A head, a worker, and a laptop that has the files."""

    laptop: Host
    worker: Host
    directory: Path
    config: Path

    def run(self, *command: str) -> Done:
        """A command on the laptop."""
        home = self.directory / "laptop"
        environment = dict.fromkeys(("HOME", "RAY_TMPDIR", "TMPDIR"), str(home)) | {"PYTHONPATH": ""}
        path = f"{VENV / 'bin'}:{os.environ['PATH']}"
        done = self.laptop.run(
            list(command),
            env={**environment, "PATH": path},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def on_head(self, command: str) -> Done:
        """A command on the head, by way of Ray."""
        return self.run("ray", "exec", "--no-config-cache", str(self.config), command)


def boot(host: Host, directory: Path) -> subprocess.Popen[bytes]:
    """Starts a host's SSH server, whose sessions have a home of their own."""
    home = directory / f"host{host.index}"
    home.mkdir()
    # Where the setup commands would make it.
    (home / "dltrain-venv").symlink_to(VENV)
    settings = {
        "ListenAddress": host.address,
        "HostKey": directory / "host_key",
        "AuthorizedKeysFile": directory / "key.pub",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
        # The tree that is copied here, in place of what pip would make of it.
        "SetEnv": f"RAY_TMPDIR={home} PYTHONPATH={home}/dltrain-src",
    }
    config = directory / f"sshd{host.index}"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    # Process ids of its own.
    # Who root is, and where its home is, as seen from here.
    users = directory / f"passwd{host.index}"
    users.write_text(f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n")
    server = f"mount --bind {users} /etc/passwd && exec {SSHD} -D -e -f {config}"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", server]
    return host.popen(command, stderr=subprocess.DEVNULL)


def configuration(directory: Path, head: Host, worker: Host) -> Path:
    """The file as a user would change it, less the commands that install packages."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "ray-up" / "onprem.yaml").read_text())
    config["provider"].update(head_ip=head.address, worker_ips=[worker.address])
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(directory / "key")}
    config["max_workers"] = 1
    config["cluster_name"] = directory.name
    # Its last command on AWS: it must outlive the session that starts it.
    aws = yaml.safe_load((ROOT / "cluster" / "ray-up" / "aws.yaml").read_text())
    config["worker_start_ray_commands"].append(aws["worker_start_ray_commands"][-1])
    config["setup_commands"] = [c for c in config["setup_commands"] if "pip install" not in c]
    path = directory / "onprem.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def remove_ssh_sockets(cluster: str) -> None:
    """Ray keeps connections for its next command, in a place that can't be chosen."""
    digest = hashlib.sha256(cluster.encode()).hexdigest()[:10]
    for path in Path("/tmp").glob(f"ray_ssh_*/{digest}"):
        shutil.rmtree(path)
        with contextlib.suppress(OSError):  # others are in use
            path.parent.rmdir()


@pytest.fixture
def site() -> Iterator[Site]:
    # A short path: Ray puts sockets into it.
    with tempfile.TemporaryDirectory(prefix="up") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        stack.callback(remove_ssh_sockets, directory.name)
        for key in ("key", "host_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)]
            subprocess.run(keygen, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        servers: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: [server.wait() for server in servers])
        head, worker, laptop = stack.enter_context(Lab(hosts=3, ray=False)).hosts
        servers += [boot(host, directory) for host in (head, worker)]
        token = directory / "laptop" / ".ray" / "auth_token"
        token.parent.mkdir(parents=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        yield Site(laptop, worker, directory, configuration(directory, head, worker))


def cpus(site: Site) -> float:
    """What the cluster has, asked on the head."""
    code = "import ray; ray.init('auto', logging_level='ERROR'); print('CPUS', ray.cluster_resources().get('CPU', 0))"
    found = [line for line in site.on_head(f'python -c "{code}"').out.splitlines() if line.startswith("CPUS")]
    return float(found[-1].split()[1]) if found else 0.0


def test_up_a_run_and_down(site: Site) -> None:
    up = site.run("ray", "up", "--yes", "--no-config-cache", str(site.config))
    assert up.code == 0, up.out + up.err
    # The head's autoscaler has started the worker.
    wait_for(lambda: cpus(site) >= 1)
    write_data(site.directory / "train")
    spec = write_spec(site.directory, make_spec(site.directory, workers=1, train={"steps": 5}))
    run = site.on_head(f"cd ~/dltrain-src/tests && dltrain run {spec} --json --address auto")
    assert run.code == 0, run.out + run.err
    summary = json.loads(next(line for line in run.out.splitlines() if line.startswith("{")))
    assert (summary["status"], summary["steps"]) == ("finished", 5)
    watching = [pid for pid in site.worker.pids() if "cluster.spot" in psutil.Process(pid).cmdline()]
    assert len(watching) == 1
    down = site.run("ray", "down", "--yes", str(site.config))
    assert down.code == 0, down.out + down.err
