"""`dltrain k8s`: a spec as manifests for KubeRay.

dltrain k8s job.yaml --image registry/dltrain:1 --workers 2 --gpus-per-worker 8 | kubectl apply -f -
"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from typing import Annotated

import typer

__all__ = ["k8s"]

Pairs = list[str] | None


def k8s(
    spec: Annotated[str, typer.Argument(help="The job's YAML file.", metavar="SPEC")],
    image: Annotated[str, typer.Option(help="The container image: dltrain, Ray and your task.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that replace the file's, for example runs=s3://bucket/runs.", metavar="KEY=VALUE"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker pods.", show_default="what workers.max needs")] = 0,
    gpus_per_worker: Annotated[int, typer.Option(help="GPUs of a worker pod, one rank each; 0: CPU.")] = 0,
    cpus_per_worker: Annotated[
        int, typer.Option(help="CPUs of a worker pod.", show_default="3 per GPU, or the rank's and one")
    ] = 0,
    memory_per_worker: Annotated[str, typer.Option(help="Memory of a pod.", show_default="12Gi per GPU, or 4Gi")] = "",
    shm_per_worker: Annotated[str, typer.Option(help="Its /dev/shm, part of that.", show_default="a quarter")] = "",
    head_memory: Annotated[str, typer.Option(help="Memory of the head's pod.")] = "8Gi",
    namespace: Annotated[str, typer.Option(help="Written into every object.", show_default="kubectl's")] = "",
    s3_secret: Annotated[str, typer.Option(help="A Secret whose keys become variables (AWS_ACCESS_KEY_ID, ...).")] = "",
    identity: Annotated[
        Pairs, typer.Option(help="Annotation of the ServiceAccount, for workload identity.", metavar="KEY=VALUE")
    ] = None,
    env: Annotated[
        Pairs, typer.Option(help="A variable that is no secret: AWS_REGION=eu-west-1.", metavar="K=V")
    ] = None,
    pull_secret: Annotated[str, typer.Option(help="A Secret to pull the image with.")] = "",
    node_selector: Annotated[Pairs, typer.Option(help="A label of the workers' nodes.", metavar="KEY=VALUE")] = None,
    queue: Annotated[str, typer.Option(help="A LocalQueue of Kueue.")] = "",
    priority: Annotated[str, typer.Option(help="A WorkloadPriorityClass of Kueue.")] = "",
    spot: Annotated[bool, typer.Option("--spot", help="Workers may be on spot machines: 25 s to leave.")] = False,
    rdma: Annotated[Pairs, typer.Option(help="A resource for RDMA: rdma/hca=1.", metavar="NAME=COUNT")] = None,
    retries: Annotated[
        int | None, typer.Option(help="New clusters after a failure.", show_default="3; spot 20")
    ] = None,
    deadline_hours: Annotated[float, typer.Option(help="The longest that one cluster may train.")] = 720,
    start_minutes: Annotated[float, typer.Option(help="The longest that its pods may take to come up.")] = 60,
    grace: Annotated[
        int | None, typer.Option(help="Seconds a worker has to leave.", show_default="300; spot 25")
    ] = None,
    ray_version: Annotated[str, typer.Option(help="Ray's version in the image.", show_default="the one here")] = "",
    monitor: Annotated[bool, typer.Option(help="A PodMonitor, for the Prometheus operator.")] = True,
    json: Annotated[bool, typer.Option("--json", help='One JSON object on stdout: {"items": [...]}.')] = False,
) -> None:
    """Print the manifests that run a spec on Kubernetes with KubeRay, ready for `kubectl apply -f -`.

    ConfigMap, ServiceAccount, RayJob, NetworkPolicy, PodMonitor; each is
    checked against what KubeRay, Kueue and Pod Security (restricted) refuse.
    For example:

        dltrain k8s job.yaml --image registry/me/dltrain:1 \\
            --workers 2 --gpus-per-worker 8 --s3-secret dltrain-s3 \\
            runs=s3://bucket/runs | kubectl apply -f -

    When a cluster is lost another one goes on from the last checkpoint, so
    `runs` must be in object storage.
    """
    from dltrain.deploying.manifests import build, notes, to_yaml
    from dltrain.deploying.options import Options
    from dltrain.spec import load_spec

    options = Options(
        image=image,
        namespace=namespace,
        workers=workers,
        gpus=gpus_per_worker,
        cpus=cpus_per_worker,
        memory=memory_per_worker,
        shm=shm_per_worker,
        head_memory=head_memory,
        env=_pairs("--env", env),
        s3_secret=s3_secret,
        identity=_pairs("--identity", identity),
        pull_secret=pull_secret,
        node_selector=_pairs("--node-selector", node_selector),
        queue=queue,
        priority=priority,
        spot=spot,
        rdma=_counts("--rdma", rdma),
        retries=retries,
        deadline_hours=deadline_hours,
        start_minutes=start_minutes,
        grace=grace,
        ray_version=ray_version,
        monitor=monitor,
    )
    loaded = load_spec(spec, overrides or [])
    objects = build(loaded, options, spec)
    for note in notes(loaded, options):
        typer.echo(f"note: {note}", err=True)
    print(json_module.dumps({"items": objects}) if json else to_yaml(objects), end="\n" if json else "")


def _pairs(flag: str, pairs: Sequence[str] | None) -> dict[str, str]:
    from dltrain.errors import UserError

    found = {}
    for pair in pairs or ():
        key, sep, value = pair.partition("=")
        if not sep or not key:
            # Not the text itself: somebody may have given a secret.
            raise UserError(f"{flag}: needs NAME=VALUE, found no = or no name in what was given")
        found[key] = value
    return found


def _counts(flag: str, pairs: Sequence[str] | None) -> dict[str, int]:
    from dltrain.errors import UserError

    found = _pairs(flag, pairs)
    for name, text in found.items():
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"{flag}: found {name}={text}; write how many a pod has, for example {name}=1")
    return {name: int(text) for name, text in found.items()}
