"""What a pod must be: Pod Security's level `restricted`, and what training needs of it.

for path, text in PODS["pod.qos"](pod): ...
for path, text in restricted(pod, allowed=("IPC_LOCK",)): ...      # rule, path, text
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from dltrain.deploying.looking import Fault, Object, Pod, PodRule, at, env_of, is_object_name, items, label_faults
from dltrain.deploying.options import looks_secret
from dltrain.deploying.quantity import quantity

__all__ = ["PODS", "SECURITY", "capability_faults"]

_VOLUMES = {
    "name",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SELINUX = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
_SECCOMP = ("RuntimeDefault", "Localhost")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def _contexts(pod: Pod) -> Iterator[tuple[str, Object]]:
    """Every security context with its path, the pod's first."""
    yield f"{pod.path}.spec.securityContext", at(pod.spec, "securityContext") or {}
    for path, container in pod.containers():
        yield f"{path}.securityContext", at(container, "securityContext") or {}


def _effective(pod: Pod, *keys: str) -> Iterator[tuple[str, Any]]:
    """For each container the setting that holds: its own, else the pod's."""
    outer = at(pod.spec, "securityContext", *keys)
    for path, container in pod.containers():
        own = at(container, "securityContext", *keys)
        yield f"{path}.securityContext.{'.'.join(keys)}", outer if own is None else own


# ---- Pod Security, restricted ----


def _host_namespaces(pod: Pod) -> Iterator[Fault]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{pod.path}.spec.{key}", "shares the node's own"


def _privileged(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        if context.get("privileged"):
            yield f"{path}.privileged", "must not be true"


def capability_faults(pod: Pod, allowed: Collection[str] = ()) -> Iterator[Fault]:
    """All capabilities are dropped, and none added but NET_BIND_SERVICE and those of `allowed`."""
    for path, container in pod.containers():
        found, where = at(container, "securityContext", "capabilities") or {}, f"{path}.securityContext.capabilities"
        if "ALL" not in items(found, "drop"):
            yield f"{where}.drop", "must be [ALL]"
        for name in items(found, "add"):
            if name != "NET_BIND_SERVICE" and name not in allowed:
                yield f"{where}.add", f"found {name}, which only the level `privileged` lets through"


def _volumes(pod: Pod) -> Iterator[Fault]:
    for volume in items(pod.spec, "volumes"):
        for kind in sorted(set(volume) - _VOLUMES):
            yield f"{pod.path}.spec.volumes", f"found {at(volume, 'name')!r} of the kind {kind}, which is not allowed"


def _host_ports(pod: Pod) -> Iterator[Fault]:
    for path, container in pod.containers():
        for port in items(container, "ports"):
            if at(port, "hostPort"):
                yield f"{path}.ports", f"found hostPort {at(port, 'hostPort')}"


def _apparmor(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        kind = at(context, "appArmorProfile", "type")
        if kind not in (None, "RuntimeDefault", "Localhost"):
            yield f"{path}.appArmorProfile.type", f"found {kind!r}; allowed: RuntimeDefault, Localhost"


def _selinux(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        options = at(context, "seLinuxOptions") or {}
        if options.get("type", "") not in _SELINUX or options.get("user") or options.get("role"):
            yield f"{path}.seLinuxOptions", "sets a user, a role, or a type that is not a container's"


def _proc_mount(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        if context.get("procMount") not in (None, "Default"):
            yield f"{path}.procMount", f"found {context['procMount']!r}; allowed: Default"


def _seccomp(pod: Pod) -> Iterator[Fault]:
    for path, kind in _effective(pod, "seccompProfile", "type"):
        if kind not in _SECCOMP:
            yield path, f"found {kind!r}; allowed: {', '.join(_SECCOMP)}, here or for the whole pod"


def _sysctls(pod: Pod) -> Iterator[Fault]:
    for entry in items(pod.spec, "securityContext", "sysctls"):
        if at(entry, "name") not in _SYSCTLS:
            yield f"{pod.path}.spec.securityContext.sysctls", f"found {at(entry, 'name')!r}, which is not a safe one"


def _escalation(pod: Pod) -> Iterator[Fault]:
    for path, container in pod.containers():
        if at(container, "securityContext", "allowPrivilegeEscalation") is not False:
            yield f"{path}.securityContext.allowPrivilegeEscalation", "must be false"


def _non_root(pod: Pod) -> Iterator[Fault]:
    for path, value in _effective(pod, "runAsNonRoot"):
        if value is not True:
            yield path, "must be true, here or for the whole pod"


def _run_as_user(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        if context.get("runAsUser") == 0:
            yield f"{path}.runAsUser", "must not be 0, root"


def _host_process(pod: Pod) -> Iterator[Fault]:
    for path, context in _contexts(pod):
        if at(context, "windowsOptions", "hostProcess"):
            yield f"{path}.windowsOptions.hostProcess", "must not be true"


def _probe_hosts(pod: Pod) -> Iterator[Fault]:
    for path, container in pod.containers():
        actions = [(f"{path}.{probe}", at(container, probe)) for probe in _PROBES]
        actions += [(f"{path}.lifecycle.{hook}", at(container, "lifecycle", hook)) for hook in ("postStart", "preStop")]
        for where, action in actions:
            for kind in ("httpGet", "tcpSocket"):
                if at(action, kind, "host"):
                    yield f"{where}.{kind}.host", "must not name another host"


SECURITY: dict[str, PodRule] = {
    "security.host-namespaces": _host_namespaces,
    "security.privileged": _privileged,
    "security.capabilities": capability_faults,
    "security.volumes": _volumes,
    "security.host-ports": _host_ports,
    "security.apparmor": _apparmor,
    "security.selinux": _selinux,
    "security.proc-mount": _proc_mount,
    "security.seccomp": _seccomp,
    "security.sysctls": _sysctls,
    "security.escalation": _escalation,
    "security.non-root": _non_root,
    "security.run-as-user": _run_as_user,
    "security.host-process": _host_process,
    "security.probe-hosts": _probe_hosts,
}


# ---- what training needs ----


def _qos(pod: Pod) -> Iterator[Fault]:
    """Guaranteed: memory and CPU of every container are limited, and asked for in full."""
    for path, container in pod.containers():
        limits, requests = (at(container, "resources", key) or {} for key in ("limits", "requests"))
        for name in sorted({"cpu", "memory", *limits, *requests}):
            limit, request = limits.get(name), requests.get(name)
            if limit is None or (request is not None and quantity(request) != quantity(limit)):
                yield (
                    f"{path}.resources",
                    f"{name}: requests {request}, limits {limit}; unless they are equal it may be evicted",
                )


def _shm(pod: Pod) -> Iterator[Fault]:
    if not pod.is_ray:
        return
    main, path = pod.main(), f"{pod.path}.spec.volumes"
    mounted = [at(mount, "name") for mount in items(main, "volumeMounts") if at(mount, "mountPath") == "/dev/shm"]
    volume = next((v for v in items(pod.spec, "volumes") if at(v, "name") in mounted), None)
    if volume is None:
        yield path, "has nothing for /dev/shm: KubeRay would make it as large as the whole memory"
        return
    size, memory = at(volume, "emptyDir", "sizeLimit"), at(main, "resources", "limits", "memory")
    if at(volume, "emptyDir", "medium") != "Memory" or size is None:
        yield path, "what is mounted at /dev/shm must be an emptyDir with medium: Memory and a sizeLimit"
    elif memory is not None and quantity(size) >= quantity(memory):
        yield path, f"/dev/shm of {size} counts against the memory of {memory}; it must be less"


def _grace(pod: Pod) -> Iterator[Fault]:
    """The hook, then Ray's own drain: both must fit."""
    if not pod.is_ray:
        return
    main, grace = pod.main(), at(pod.spec, "terminationGracePeriodSeconds")
    command = items(main, "lifecycle", "preStop", "exec", "command")
    seconds = next((word for word in reversed(command) if re.fullmatch(r"\d+(\.\d+)?", str(word))), None)
    drain = env_of(main).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    if seconds is None or grace is None or drain is None:
        yield (
            f"{pod.path}.spec",
            "needs a preStop command that ends in its seconds, terminationGracePeriodSeconds and "
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S: work must be saved before the pod is killed",
        )
    elif float(seconds) + float(drain) > grace:
        yield (
            f"{pod.path}.spec.terminationGracePeriodSeconds",
            f"{grace} s is less than the hook's {seconds} s and Ray's drain of {drain} s",
        )


def _secrets(pod: Pod) -> Iterator[Fault]:
    for path, container in pod.containers():
        for name, value in env_of(container).items():
            if value and looks_secret(name):
                yield f"{path}.env.{name}", "has its value written out; take it from a Secret (envFrom, valueFrom)"


def _ports(pod: Pod) -> Iterator[Fault]:
    seen: set[Any] = set()
    for path, container in pod.containers():
        for port in items(container, "ports"):
            name, number = at(port, "name"), at(port, "containerPort")
            if name is not None and not (re.fullmatch(r"[a-z0-9-]{1,15}", name) and re.search("[a-z]", name)):
                yield f"{path}.ports", f"found the name {name!r}; a port's has at most 15 of a-z, 0-9 and -"
            for what in (name, number):
                if what is not None and what in seen:
                    yield f"{path}.ports", f"found {what!r} twice"
                seen.add(what)


def _mounts(pod: Pod) -> Iterator[Fault]:
    volumes = {at(volume, "name") for volume in items(pod.spec, "volumes")}
    for path, container in pod.containers():
        for mount in items(container, "volumeMounts"):
            if at(mount, "name") not in volumes:
                yield f"{path}.volumeMounts", f"{at(mount, 'name')!r} is no volume of the pod"


def _pod_labels(pod: Pod) -> Iterator[Fault]:
    yield from label_faults(f"{pod.path}.metadata.labels", at(pod.template, "metadata", "labels"))
    yield from label_faults(f"{pod.path}.spec.nodeSelector", at(pod.spec, "nodeSelector"))


def _references(pod: Pod) -> Iterator[Fault]:
    named = [(f"{pod.path}.spec.imagePullSecrets", at(entry, "name")) for entry in items(pod.spec, "imagePullSecrets")]
    for path, container in pod.containers():
        named += [(f"{path}.envFrom", at(entry, "secretRef", "name")) for entry in items(container, "envFrom")]
        if not re.fullmatch(r"[^\s/][^\s]*", str(at(container, "image") or "")):
            yield f"{path}.image", f"found {at(container, 'image')!r}, which is no image"
    for path, name in named:
        if name is not None and not is_object_name(name):
            yield path, f"found {name!r}, which no Secret may be called: a-z, 0-9, - and ."


PODS: dict[str, PodRule] = {
    "pod.qos": _qos,
    "pod.shm": _shm,
    "pod.grace": _grace,
    "pod.secrets": _secrets,
    "pod.ports": _ports,
    "pod.mounts": _mounts,
    "pod.labels": _pod_labels,
    "pod.references": _references,
}
