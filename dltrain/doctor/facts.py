"""Facts of the machine that this process runs on: packages, limits, memory, disks, names.

    facts = machine_facts(inside_ray=False)
    judge_machine(facts)                       # dltrain.doctor.machine

Plain values that travel through Ray. Nothing slow is imported: what torch and the GPUs say is in `probe`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["PACKAGES", "MachineFacts", "OpFacts", "machine_facts", "package_versions", "source_digest"]

# Whose versions must be the same on all machines.
PACKAGES = ("dltrain", "ray", "torch", "deepspeed", "pyarrow")
_CGROUP = Path("/sys/fs/cgroup")
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class OpFacts:
    """DeepSpeed's CPU op: whether it is compiled, and what compiling it would need."""

    built: bool
    place: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineFacts:
    """One machine, as a process on it sees it.

    Attributes:
        versions: package -> version, None where it is not installed.
        unmet: requirements of dltrain that are not fulfilled, as "torch>=2.13: found 2.1".
        code: digest of dltrain's source files.
        cpus: that this process may use: affinity and the container's quota.
        memory_bytes: of the container or machine; available_bytes: of those, not in use.
        open_files, max_processes, core_bytes, memlock_bytes: limits; -1: none.
        name_seconds: that looking up this machine's name took.
        niceness: that Ray's processes run at and can't leave.
    """

    python: str
    system: str
    versions: Mapping[str, str | None]
    unmet: tuple[str, ...]
    code: str
    cpus: float
    memory_bytes: int
    available_bytes: int
    shm_bytes: int
    shm_free_bytes: int
    temp_dir: str
    temp_bytes: int
    temp_free_bytes: int
    open_files: int
    max_processes: int
    core_bytes: int
    core_pattern: str
    memlock_bytes: int
    has_rdma: bool
    op: OpFacts
    addresses: Mapping[str, str] = field(default_factory=dict)
    name_seconds: float = 0.0
    niceness: int = 0


def machine_facts(inside_ray: bool) -> MachineFacts:
    """What this machine is like now.

    Args:
        inside_ray: this process was started by Ray, which has raised its limits as far as it does.
    """
    memory, available = _memory()
    shm, shm_free = _disk(str(_SHM)) if _SHM.is_dir() else (0, 0)
    temp_dir = tempfile.gettempdir()
    temp, temp_free = _disk(temp_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MachineFacts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        versions=package_versions(),
        unmet=_unmet(),
        code=source_digest(),
        cpus=_cpus(),
        memory_bytes=memory,
        available_bytes=available,
        shm_bytes=shm,
        shm_free_bytes=shm_free,
        temp_dir=temp_dir,
        temp_bytes=temp,
        temp_free_bytes=temp_free,
        # Ray raises its own up to the hard one.
        open_files=soft if inside_ray else hard,
        max_processes=_max_processes(),
        core_bytes=resource.getrlimit(resource.RLIMIT_CORE)[0],
        core_pattern=_text(Path("/proc/sys/kernel/core_pattern")),
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
        op=_op(),
        addresses=_addresses(),
        name_seconds=_name_seconds(),
        niceness=_niceness() if inside_ray else 0,
    )


def package_versions() -> dict[str, str | None]:
    """Of the packages that must be alike."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = _own_version() if name == "dltrain" else None
    return found


def _own_version() -> str:
    """Of a copy that was not installed, such as a Ray job's working directory."""
    from dltrain import __version__

    return __version__


def _unmet() -> tuple[str, ...]:
    from packaging.requirements import Requirement

    with contextlib.suppress(PackageNotFoundError):
        wanted = [Requirement(text) for text in requires("dltrain") or ()]
        needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
        return tuple(text for text in map(_not_met, needed) if text)
    return ()


def _not_met(needed: Requirement) -> str:
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return f"{needed.name}{needed.specifier} is not installed"
    good = needed.specifier.contains(found, prereleases=True)
    return "" if good else f"{needed.name} is {found}, which is not {needed.specifier}"


def source_digest() -> str:
    """Of dltrain's own source files: two copies of one version may differ."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpus() -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    quota, _, period = _text(_CGROUP / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_text(_CGROUP / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit():
        return min(allowed, int(quota) / int(period))
    return allowed


def _memory() -> tuple[int, int]:
    """Bytes in all, and those that are available: of the container where it has a limit."""
    import psutil

    machine = psutil.virtual_memory()
    limit = _number(_CGROUP / "memory.max") or _number(_CGROUP / "memory" / "memory.limit_in_bytes")
    if not limit or limit >= machine.total:
        return machine.total, machine.available
    used = _number(_CGROUP / "memory.current") or _number(_CGROUP / "memory" / "memory.usage_in_bytes") or 0
    return limit, min(machine.available, max(0, limit - used))


def _max_processes() -> int:
    """Of this user, or of the container; -1: no limit."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [n for n in (soft, _number(_CGROUP / "pids.max") or -1) if n >= 0]
    # root is not held to the first one.
    if os.geteuid() == 0:
        limits = [n for n in limits if n != soft]
    return min(limits, default=-1)


def _disk(path: str) -> tuple[int, int]:
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def _op() -> OpFacts:
    from dltrain.training import cpu_op

    try:
        place = cpu_op.place()
    except PackageNotFoundError:
        return OpFacts(False, "", ("torch and deepspeed",))
    missing = [
        *([] if shutil.which("g++") or shutil.which("c++") else ["g++"]),
        *([] if Path(sysconfig.get_paths()["include"], "Python.h").exists() else ["Python's headers"]),
        *([] if importlib.util.find_spec("ninja") or shutil.which("ninja") else ["ninja"]),
    ]
    return OpFacts(place.exists(), str(place), tuple(missing))


def _addresses() -> dict[str, str]:
    """Address -> interface."""
    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs().items()
    return {a.address.partition("%")[0]: name for name, addresses in found for a in addresses if a.family in kinds}


def _name_seconds() -> float:
    """A lookup from an address to a name, as torch's rendezvous makes one for every rank that connects."""
    begin = time.monotonic()
    with contextlib.suppress(OSError):
        socket.gethostbyaddr(_own_address())
    return time.monotonic() - begin


def _niceness() -> int:
    """As a worker tries it: without root a process can't become less nice."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    return os.getpriority(os.PRIO_PROCESS, 0)


def _own_address() -> str:
    """The address that packets to the world outside would come from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))
        return str(probe.getsockname()[0])


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
