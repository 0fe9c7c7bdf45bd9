"""What a deployment on Kubernetes is told beside the spec, and what follows from both: names, sizes, times.

    plan = resolve(spec, Options(image="registry/dltrain:1", workers=2, gpus=8), "job.yaml")
    plan.name, plan.pods, plan.max_ranks, plan.memory

Every fault is found at once, in one SpecError. Nothing here touches a cluster.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dltrain.deploying.quantity import mebibytes, quantity
from dltrain.errors import SpecError
from dltrain.spec import JobSpec

__all__ = ["METRICS_HOST", "RAY_PORTS", "Options", "Plan", "looks_secret", "object_name", "resolve"]

# KubeRay appends 6 characters for the RayCluster, whose name may have 53.
NAME_LENGTH = 47
METRICS_HOST = "0.0.0.0"
# What Ray listens on in the head's pod: no other port may be one of these.
RAY_PORTS = {
    "gcs-server": 6379,
    "metrics": 8080,
    "dashboard": 8265,
    "client": 10001,
    "as-metrics": 44217,
    "dash-metrics": 44227,
    "the dashboard's agent": 52365,
}
_LOCAL_SCHEMES = ("", "file", "local", "memory")
_SECRET_WORDS = {"SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS", "KEY", "APIKEY", "AUTH"}
# Where a secret lies is none.
_PLACES = {"FILE", "PATH", "DIR"}
# The shortest notice that a provider gives before it takes a spot machine (GKE).
_SPOT_GRACE = 25
_GRACE = 300
_HEAD_GRACE = 120
_RETRIES = 3
_SPOT_RETRIES = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line adds to a spec; 0, "" and None stand for "derive it"."""

    image: str
    namespace: str = ""
    workers: int = 0
    """Worker pods."""
    gpus: int = 0
    """GPUs of a worker pod; each is a rank's."""
    cpus: int = 0
    """CPUs of a worker pod."""
    memory: str = ""
    """Memory of a worker pod, what lies in /dev/shm included."""
    shm: str = ""
    """Size of a worker pod's /dev/shm."""
    head_memory: str = "8Gi"
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of the head and the workers that are no secrets."""
    s3_secret: str = ""
    """A Secret whose keys become variables of the head and the workers."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Annotations of the ServiceAccount, for a cloud's workload identity."""
    pull_secret: str = ""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may be on."""
    queue: str = ""
    """A LocalQueue of Kueue."""
    priority: str = ""
    """A WorkloadPriorityClass of Kueue."""
    spot: bool = False
    rdma: Mapping[str, int] = field(default_factory=dict)
    """Extended resources of a worker pod for RDMA, for example rdma/hca=1."""
    retries: int | None = None
    deadline_hours: float = 720
    start_minutes: float = 60
    grace: int | None = None
    """Seconds that a worker pod has to end."""
    ray_version: str = ""
    monitor: bool = True
    """A PodMonitor, for clusters that have the Prometheus operator."""

    @property
    def grace_seconds(self) -> int:
        """Seconds that a worker pod has to end."""
        return self.grace if self.grace is not None else _SPOT_GRACE if self.spot else _GRACE

    @property
    def head_grace_seconds(self) -> int:
        """Seconds that the head's pod has to end: it waits for the checkpoint of all ranks."""
        return max(_HEAD_GRACE, self.grace) if self.grace is not None and self.grace > _GRACE else _HEAD_GRACE

    @property
    def num_retries(self) -> int:
        """How many new clusters may follow the first."""
        return self.retries if self.retries is not None else _SPOT_RETRIES if self.spot else _RETRIES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A spec and options, resolved."""

    spec: JobSpec
    options: Options
    name: str
    """Of every object, and of the label that ties pods together."""
    pods: int
    min_ranks: int
    max_ranks: int
    ray_cpus: int
    """What Ray may place on a worker pod: its ranks' CPUs and no more, so that pods are filled evenly."""
    ray_resources: Mapping[str, int]
    """Custom Ray resources of a worker pod."""
    cpus: int
    memory: str
    shm: str
    ray_version: str


def object_name(run: str) -> str:
    """The name of a run's objects: 47 characters of DNS-1035, another one for every run.

    A run whose name is one already keeps it; any other's ends in a hash, so that a-b and a.b do not meet.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if re.match(r"[a-z]", name) else f"run-{name}"
    if name == run and len(name) <= NAME_LENGTH:
        return name
    suffix = hashlib.sha256(run.encode()).hexdigest()[:6]
    return f"{name[: NAME_LENGTH - len(suffix) - 1].rstrip('-')}-{suffix}"


def looks_secret(name: str) -> bool:
    """Whether a variable of that name is likely to hold a secret."""
    words = name.upper().split("_")
    return words[-1] not in _PLACES and not _SECRET_WORDS.isdisjoint(words)


def resolve(spec: JobSpec, options: Options, source: str = "spec") -> Plan:
    """Works out names, sizes and times.

    Raises:
        SpecError: listing every reason why this spec can't run on Kubernetes so.
    """
    faults = [*_spec_faults(spec), *_option_faults(options), *_size_faults(spec, options)]
    if faults:
        raise SpecError(source, faults)
    slots = _slots(spec, options)
    pods = options.workers or math.ceil(spec.workers.max / slots)
    memory = _memory(options)
    ray_cpus = _ray_cpus(spec, options)
    return Plan(
        spec=spec,
        options=options,
        name=object_name(spec.name),
        pods=pods,
        min_ranks=spec.workers.min,
        max_ranks=min(pods * slots, spec.workers.max) if not options.workers else pods * slots,
        ray_cpus=ray_cpus,
        ray_resources={name: math.ceil(value * slots) for name, value in spec.workers.resources.items()},
        cpus=options.cpus or (3 * options.gpus or ray_cpus + 1),
        memory=memory,
        shm=options.shm or mebibytes(quantity(memory) / 4),
        ray_version=options.ray_version or _installed_ray(),
    )


def _memory(options: Options) -> str:
    return options.memory or f"{12 * max(0, options.gpus) or 4}Gi"


def _installed_ray() -> str:
    import importlib.metadata

    return importlib.metadata.version("ray")


def _ray_cpus(spec: JobSpec, options: Options) -> int:
    return math.ceil(max(1, options.gpus) * spec.workers.cpus)


def _slots(spec: JobSpec, options: Options) -> int:
    """Ranks that fit on a worker pod."""
    return max(0, options.gpus) or max(1, int(_ray_cpus(spec, options) // spec.workers.cpus))


# ---- faults ----


def _spec_faults(spec: JobSpec) -> Iterator[str]:
    if urlsplit(spec.runs).scheme in _LOCAL_SCHEMES:
        yield (
            f"runs: found {spec.runs!r}, a place on a machine's own disk; every retry is a new cluster whose pods have "
            "none of the old ones' disks, so the run could not resume: set runs=s3://bucket/runs"
        )
    for where, url in _urls(spec):
        if urlsplit(url).password is not None:
            yield (
                f"{where}: has a password in its URL, which everybody who may read a ConfigMap would see; put it into "
                "a Secret and name that with --s3-secret"
            )
    taken = {port: name for name, port in RAY_PORTS.items()}.get(spec.metrics.port)
    if not spec.metrics.port or taken:
        found = f"{spec.metrics.port}, which is Ray's ({taken})" if taken else "0, any free port"
        yield f"metrics.port: found {found}; a pod declares the port that is scraped: set it, for example to 9464"
    if spec.data.cache and not spec.data.cache.dir.startswith("/"):
        yield (
            f"data.cache.dir: found {spec.data.cache.dir!r}; a volume is mounted there, so it must be absolute, for "
            "example /cache"
        )


def _urls(spec: JobSpec) -> Iterator[tuple[str, str]]:
    yield "runs", spec.runs
    for place, source in enumerate(spec.data.sources):
        yield (f"data.mix.{place}.url" if spec.data.mix else "data.train"), source.url
    if spec.data.eval:
        yield "data.eval", spec.data.eval


def _option_faults(options: Options) -> Iterator[str]:
    for name in options.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"--env: found {name!r}, which is not a variable's name; write --env AWS_REGION=eu-west-1"
        elif looks_secret(name):
            yield (
                f"--env: {name} looks like a secret, which everybody who may read a RayJob would see; put it into a "
                "Secret and name that with --s3-secret"
            )
    if options.priority and not options.queue:
        yield "--priority: is a WorkloadPriorityClass of Kueue, which needs a queue; give --queue too"
    for flag, count in (("--workers", options.workers), ("--gpus-per-worker", options.gpus)):
        if count < 0:
            yield f"{flag}: found {count}; it must be >= 0"
    if options.num_retries < 0:
        yield f"--retries: found {options.num_retries}; it must be >= 0"
    for flag, number in (("--deadline-hours", options.deadline_hours), ("--start-minutes", options.start_minutes)):
        if not 0.1 <= number <= 1e5:
            yield f"{flag}: found {number:g}; it must be >= 0.1 and <= 100,000"
    if options.grace_seconds < 20:
        yield f"--grace: found {options.grace_seconds}; a step and a checkpoint need 20 seconds at least"
    if options.rdma and not options.gpus:
        yield "--rdma: is for GPUs that talk over InfiniBand or RoCE; give --gpus-per-worker too"


def _size_faults(spec: JobSpec, options: Options) -> Iterator[str]:
    workers = spec.workers
    if options.gpus and workers.gpus == 0:
        yield f"workers.gpus: is 0, but --gpus-per-worker is {options.gpus}; set workers.gpus=auto or leave that out"
    if not options.gpus and workers.gpus == 1:
        yield "workers.gpus: is 1, but pods would have none; give --gpus-per-worker"
    need = _ray_cpus(spec, options)
    if options.cpus and options.cpus < need:
        yield (
            f"--cpus-per-worker: found {options.cpus}; the ranks of a pod need {need} (workers.cpus {workers.cpus:g} "
            f"each), give that or more"
        )
    yield from _rank_faults(spec, options)
    yield from _memory_faults(options)


def _rank_faults(spec: JobSpec, options: Options) -> Iterator[str]:
    slots = _slots(spec, options)
    ranks = max(0, options.workers) * slots
    if not ranks:
        return
    made = f"--workers {options.workers} x {slots} rank{'s' if slots > 1 else ''} each gives {ranks}"
    if ranks < spec.workers.min:
        yield f"workers.min: {spec.workers.min} ranks don't fit: {made}; raise --workers or lower workers.min"
    if ranks > spec.batch.global_:
        yield f"batch.global: {spec.batch.global_} rows can't feed every rank: {made}; raise it or lower --workers"


def _memory_faults(options: Options) -> Iterator[str]:
    sizes = {}
    for flag, text in (
        ("--memory-per-worker", _memory(options)),
        ("--shm-per-worker", options.shm or "1Mi"),
        ("--head-memory", options.head_memory),
    ):
        try:
            sizes[flag] = quantity(text)
        except ValueError as error:
            yield f"{flag}: {error}"
    if len(sizes) == 3 and sizes["--shm-per-worker"] >= sizes["--memory-per-worker"]:
        yield (
            f"--shm-per-worker: {options.shm} is not less than --memory-per-worker {_memory(options)}; what lies in "
            "/dev/shm counts against the pod's memory"
        )
