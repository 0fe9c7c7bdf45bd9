"""Judges one machine: packages, DeepSpeed's CPU op, memory, disks and limits.

judge_machine(machine_facts(inside_ray=False))      # findings

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from dltrain.doctor.facts import MachineFacts
from dltrain.doctor.finding import Finding, fail, ok, skip, warn
from dltrain.wording import human_bytes

__all__ = ["judge_machine", "judge_room", "shm_need"]

_GIB = 1024**3
_MIB = 1024**2
# Ray warns below the one; a driver with a hundred agents has a few thousand connections.
_FILES_GOOD, _FILES_LEAST = 4096, 1024
# A worker has some 60 threads, Ray's own processes some hundreds.
_PROCESSES_GOOD, _PROCESSES_LEAST = 4096, 512
_DISK_GOOD, _DISK_LEAST = 5 * _GIB, 500 * _MIB
# Ray stops writing to a disk that is fuller.
_DISK_FULL_SHARE = 0.95
_NAME_SECONDS = 2.0
# DeepSpeed's op keeps two buffers of 32 MiB and two of 1 MiB for each rank of a machine.
# Source: deepspeed/ops/csrc/cpu/comm/shm.cpp, allreduce_workspace.
_SHM_OF_RANK = 66 * _MIB
_CORE_BIG = 100 * _MIB
_ROOM_SHARE = 0.7
_RELAX = "raise it: `ulimit -n 65536` in the shell that starts Ray, LimitNOFILE= in a systemd unit"


def judge_machine(facts: MachineFacts) -> list[Finding]:
    """Everything that the facts say."""
    judges = (_python, _packages, _op, _shm, _memory, _disk, _files, _processes, _core, _memlock, _names, _niceness)
    return [finding for judge in judges for finding in judge(facts)]


def shm_need(num_workers: int) -> int:
    """Bytes of /dev/shm that so many CPU workers of one machine take."""
    return num_workers * _SHM_OF_RANK


def _python(facts: MachineFacts) -> Iterator[Finding]:
    yield ok("Python", f"{facts.python} on {facts.system}, {facts.cpus:g} CPUs")


def _packages(facts: MachineFacts) -> Iterator[Finding]:
    missing = [name for name, version in facts.versions.items() if version is None]
    if missing:
        yield fail(
            "packages",
            f"not installed: {', '.join(missing)}",
            "nothing runs without them",
            "pip install -c constraints.txt dltrain (see README, Two commands)",
        )
    elif facts.unmet:
        todo = f"pip install -c constraints.txt {' '.join(repr(text.split()[0]) for text in facts.unmet)}"
        yield warn("packages", "; ".join(facts.unmet), "dltrain is tested with those it asks for", todo)
    else:
        yield ok("packages", ", ".join(f"{name} {version}" for name, version in facts.versions.items()))


def _op(facts: MachineFacts) -> Iterator[Finding]:
    op = facts.op
    if op.built:
        yield ok("DeepSpeed's CPU op", f"compiled: {op.place}")
    elif op.missing:
        yield fail(
            "DeepSpeed's CPU op",
            f"not compiled, and {', '.join(op.missing)} not found",
            "CPU workers need it: the first run would compile it and fail",
            "apt-get install g++ python3-dev; pip install ninja; then python -m dltrain.training.cpu_op",
        )
    else:
        yield warn(
            "DeepSpeed's CPU op",
            "not compiled yet",
            "the first run on CPUs compiles it, about a minute",
            "python -m dltrain.training.cpu_op, on every machine or in the image",
        )


def _shm(facts: MachineFacts) -> Iterator[Finding]:
    found = f"{human_bytes(facts.shm_free_bytes)} of {human_bytes(facts.shm_bytes)} free"
    why = "Ray keeps objects there, DeepSpeed 66 MiB for each CPU worker, NCCL its buffers"
    todo = (
        "docker run --shm-size=4g; on Kubernetes an emptyDir with medium: Memory at /dev/shm (`dltrain k8s` makes it)"
    )
    if facts.shm_free_bytes < shm_need(2):
        yield fail("/dev/shm", found, f"{why}; two workers would end with SIGBUS", todo)
    elif facts.shm_free_bytes < min(_GIB, facts.memory_bytes // 10):
        yield warn("/dev/shm", found, why, todo)
    else:
        yield ok("/dev/shm", found)


def _memory(facts: MachineFacts) -> Iterator[Finding]:
    found = f"{human_bytes(facts.available_bytes)} of {human_bytes(facts.memory_bytes)} available"
    if facts.available_bytes < 2 * _GIB:
        why = "a worker takes about 0.6 GiB before its model, Ray's own processes about as much"
        yield warn("memory", found, why, "end what else runs here, or give the machine or container more")
    else:
        yield ok("memory", found)


def _disk(facts: MachineFacts) -> Iterator[Finding]:
    free, total, name = facts.temp_free_bytes, facts.temp_bytes, f"disk of {facts.temp_dir}"
    found = f"{human_bytes(free)} of {human_bytes(total)} free"
    todo = "free space there, or set TMPDIR (and `ray start --temp-dir`) to another disk"
    if free < _DISK_LEAST:
        yield fail(name, found, "Ray's logs and sockets and the files of a run being written lie there", todo)
    elif free < _DISK_GOOD or free < (1 - _DISK_FULL_SHARE) * total:
        yield warn(name, found, "Ray stops writing objects to a disk that is 95 % full", todo)
    else:
        yield ok(name, found)


def _files(facts: MachineFacts) -> Iterator[Finding]:
    limit = facts.open_files
    if 0 <= limit < _FILES_LEAST:
        yield fail("open files", f"limit {limit:,}", "Ray's connections and snapshots' memory need more", _RELAX)
    elif 0 <= limit < _FILES_GOOD:
        yield warn("open files", f"limit {limit:,}", "too few for a driver with many workers", _RELAX)
    else:
        yield ok("open files", f"limit {_limit(limit)}")


def _processes(facts: MachineFacts) -> Iterator[Finding]:
    limit = facts.max_processes
    why = "processes and threads count: a worker has some 60, Ray's own processes some hundreds"
    todo = "raise ulimit -u, docker's --pids-limit or the pod's pid limit"
    if 0 <= limit < _PROCESSES_LEAST:
        yield fail("processes", f"limit {limit:,}", why, todo)
    elif 0 <= limit < _PROCESSES_GOOD:
        yield warn("processes", f"limit {limit:,}", why, todo)
    else:
        yield ok("processes", f"limit {_limit(limit)}")


def _core(facts: MachineFacts) -> Iterator[Finding]:
    size, pattern = facts.core_bytes, facts.core_pattern
    if pattern.startswith("|") or 0 <= size < _CORE_BIG:
        yield ok("core dumps", "given to a program" if pattern.startswith("|") else f"at most {human_bytes(size)}")
        return
    yield warn(
        "core dumps",
        f"a process that crashes writes all its memory to {pattern or 'a file'} ({_limit(size)})",
        "that takes minutes and a disk, while the run waits for the process to be gone",
        "ulimit -c 0 in the shell that starts Ray",
    )


def _memlock(facts: MachineFacts) -> Iterator[Finding]:
    if not facts.has_rdma:
        yield skip("locked memory", "no InfiniBand or RoCE here")
    elif facts.memlock_bytes >= 0:
        yield fail(
            "locked memory",
            f"limit {human_bytes(facts.memlock_bytes)}, with InfiniBand or RoCE",
            "NCCL registers its buffers with the card, which locks them",
            "ulimit -l unlimited; docker run --ulimit memlock=-1",
        )
    else:
        yield ok("locked memory", "no limit")


def _names(facts: MachineFacts) -> Iterator[Finding]:
    seconds = facts.name_seconds
    if seconds > _NAME_SECONDS:
        yield warn(
            "host names",
            f"looking up this machine's name took {seconds:.1f} s",
            "torch looks up the name of every rank that connects: each attempt starts so much later",
            "let the name server answer, or put the addresses of all nodes into /etc/hosts",
        )
    else:
        yield ok("host names", f"looked up in {1000 * seconds:.0f} ms")


def _niceness(facts: MachineFacts) -> Iterator[Finding]:
    if facts.niceness > 0:
        yield warn(
            "niceness",
            f"Ray's processes run at {facts.niceness}, and without root they can't go back to 0",
            "training yields to everything else on the machine",
            "set RAY_worker_niceness=0 in the environment of `ray start` (the image has it)",
        )


def _limit(value: int) -> str:
    return "none" if value < 0 else f"{value:,}"


# ---- what a run needs ----


def judge_room(available_bytes: int, num_workers: int, worker_bytes: int) -> Finding:
    """Whether so many workers of a run have room in a machine's memory.

    Args:
        worker_bytes: of one worker, as far as is known before it runs.
    """
    name, need = "memory of the workers", num_workers * worker_bytes
    found = (
        f"{num_workers} x {human_bytes(worker_bytes)} for model and snapshots, {human_bytes(available_bytes)} available"
    )
    if need > available_bytes:
        todo = "spread workers over more machines, raise engine.zero, or take machines with more memory"
        return fail(name, found, "activations, data and the libraries come on top of that", todo)
    if need > _ROOM_SHARE * available_bytes:
        todo = "watch the memory of the first steps with `dltrain top`"
        return warn(name, found, "activations, data and the libraries come on top of that", todo)
    return ok(name, found)
