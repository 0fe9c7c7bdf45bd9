"""What a Dockerfile must keep to, as rules that say what is wrong: no engine is needed to ask them.

image = Image.read(text, context={"dltrain/cli.py", ...}, packages={"torch": "2.13.0"}, extras={"jobs"})
findings(image)        # ["pip: ...", ...]; empty when all is well
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from dockerfile_parse import DockerfileParser

__all__ = ["RULES", "Image", "Stage", "findings"]

TARGETS = ("cpu", "cuda")
_PINNED = re.compile(r"(:[^:@]*\d+\.\d+\.\d+[^:@]*(@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})$")
_SECRET = re.compile(r"(?i)secret|passw|credential|private_key|access_key|_token$")
_EXTRAS = re.compile(r"^(?P<name>[^\[]*)(?:\[(?P<extras>[^\]]*)\])?$")
# What others that start the image want of it.
_NEEDED = {"wget": "KubeRay's probes", "rsync": "the head of `ray up`", "openssh-client": "the head of `ray up`"}


@dataclass(frozen=True)
class Step:
    """One instruction of a stage."""

    kind: str
    value: str

    @property
    def commands(self) -> list[str]:
        """The commands of a RUN."""
        return [part.strip() for part in self.value.split("&&")] if self.kind == "RUN" else []

    @property
    def copied(self) -> tuple[str, list[str]]:
        """Of a COPY: the stage it is from ("" for the context), and what."""
        words = self.value.split()
        stage = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), "")
        return stage, [word for word in words if not word.startswith("--")][:-1]


@dataclass(frozen=True)
class Stage:
    """A FROM and what follows."""

    name: str
    base: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Image:
    """A Dockerfile, and what it is built from.

    Args:
        context: the files a builder is given.
        packages: constraints.txt.
        extras: of pyproject.toml.
    """

    stages: Mapping[str, Stage]
    context: Set[str]
    packages: Mapping[str, str]
    extras: Set[str]

    @classmethod
    def read(cls, text: str, context: Set[str], packages: Mapping[str, str], extras: Set[str]) -> Image:
        stages = {stage.name: stage for stage in _stages(text)}
        return cls(stages, context, packages, extras)

    def chain(self, target: str) -> list[Stage]:
        """The stages that end up in a target, first to last."""
        found: list[Stage] = []
        name = target
        while name in self.stages:
            found.insert(0, self.stages[name])
            name = self.stages[name].base
        return found

    def steps(self, target: str, kind: str = "") -> list[Step]:
        """The instructions that end up in a target, or those of one kind."""
        return [step for stage in self.chain(target) for step in stage.steps if kind in ("", step.kind)]

    def environment(self, target: str) -> dict[str, str]:
        """What a container of it starts with."""
        words = [word for step in self.steps(target, "ENV") for word in shlex.split(step.value)]
        return dict(word.split("=", 1) for word in words)


def _stages(text: str) -> Iterator[Stage]:
    defaults: dict[str, str] = {}
    name, base, steps = "", "", list[Step]()
    for part in DockerfileParser(fileobj=io.BytesIO(text.encode())).structure:
        kind, value = part["instruction"], part["value"]
        if kind == "COMMENT":
            continue
        if kind == "FROM":
            if name:
                yield Stage(name, base, tuple(steps))
            base, _, name = (word.strip() for word in re.split(r"(\sAS\s)", value))
            base = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), base)
            steps = []
        elif not name and kind == "ARG":
            defaults.update([value.split("=", 1)])
        else:
            steps.append(Step(kind, value))
    yield Stage(name, base, tuple(steps))


# ---- the rules: each gives a sentence for each fault ----


def _targets(image: Image) -> Iterator[str]:
    for target in TARGETS:
        if target not in image.stages:
            yield f"there is no target {target}"


def _bases(image: Image) -> Iterator[str]:
    for stage in image.stages.values():
        if stage.base not in image.stages and not _PINNED.search(stage.base):
            yield f"stage {stage.name} is made from {stage.base}: give it a whole version or a digest"


def _user(image: Image) -> Iterator[str]:
    for target in TARGETS:
        last = image.steps(target, "USER")[-1:]
        user = last[0].value.split(":")[0] if last else "root"
        if not user.isdigit() or not int(user):
            yield f"{target} runs as {user}: a number other than 0 is what Kubernetes can check"


def _sources(image: Image) -> Iterator[str]:
    known: list[str] = []
    for stage in image.stages.values():
        for step in stage.steps:
            if step.kind == "ADD":
                yield f"ADD {step.value}: COPY does not fetch or unpack anything"
            if step.kind == "COPY":
                yield from _missing(image, known, *step.copied)
        known.append(stage.name)


def _missing(image: Image, known: Sequence[str], stage: str, sources: Sequence[str]) -> Iterator[str]:
    if stage and stage not in known:
        yield f"COPY --from={stage}: no such stage before it"
    for source in () if stage else sources:
        if not any(name == source or name.startswith(f"{source}/") for name in image.context):
            yield f"COPY {source}: not in what the builder is given"


def _pip(image: Image) -> Iterator[str]:
    for stage in image.stages.values():
        for command in (c for step in stage.steps for c in step.commands if re.search(r"\bpip\b.*\binstall\b", c)):
            if "-c constraints.txt" not in command:
                yield f"{command}: without constraints.txt versions are whatever is newest"
            yield from _unknown(image, shlex.split(command))


def _unknown(image: Image, words: Sequence[str]) -> Iterator[str]:
    takes_value = ("-c", "--index-url", "--extra-index-url")
    wanted = [w for i, w in enumerate(words) if not w.startswith("-") and words[i - 1] not in takes_value]
    for word in wanted[wanted.index("install") + 1 :]:
        match = _EXTRAS.match(word)
        assert match is not None
        if match["name"] not in (".", *image.packages):
            yield f"pip install {word}: not in constraints.txt"
        for extra in (match["extras"] or "").split(","):
            if extra and extra not in image.extras:
                yield f"pip install {word}: pyproject.toml has no extra {extra}"


def _apt(image: Image) -> Iterator[str]:
    for step in (step for stage in image.stages.values() for step in stage.steps if "apt-get install" in step.value):
        for needed in ("apt-get update", "--no-install-recommends", " -y ", "rm -rf /var/lib/apt/lists/*"):
            if needed not in step.value:
                yield f"{step.value}: without {needed.strip()}"


def _secrets(image: Image) -> Iterator[str]:
    for stage in image.stages.values():
        for step in (step for step in stage.steps if step.kind in ("ARG", "ENV")):
            for name in re.findall(r"(\w+)(?==|$)", step.value):
                if _SECRET.search(name):
                    yield f"{step.kind} {name}: who has the image has it"


def _start(image: Image) -> Iterator[str]:
    for target in TARGETS:
        if image.steps(target, "ENTRYPOINT"):
            yield f"{target} has an entry point: `ray up` starts the image with `bash`"
        for step in image.steps(target, "CMD"):
            if not isinstance(_json(step.value), list):
                yield f"CMD {step.value}: as a JSON list, so that it gets the signals itself"


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _surroundings(image: Image) -> Iterator[str]:
    for target in TARGETS:
        environment, done = image.environment(target), " ".join(s.value for s in image.steps(target, "RUN"))
        for package, who in _NEEDED.items():
            if not re.search(rf"apt-get install [^&]*\b{package}\b", done):
                yield f"{target} has no {package}, which {who} needs"
        if not environment.get("HOME"):
            yield f"{target} has no HOME: `ray up` would mount files into /root"
        path = environment.get("PATH", "").split(":")[0]
        if f"export PATH={path}:$PATH' > /etc/profile.d/" not in done:
            yield f"{target}: login shells, which `ray up` uses, do not have {path or 'its programs'} on their PATH"
        if environment.get("RAY_AUTH_MODE") != "token":
            yield f"{target}: Ray's head would start without a token"


def _op(image: Image) -> Iterator[str]:
    for target in TARGETS:
        stages = [s.copied[0] for s in image.steps(target, "COPY") if "/opt/venv/dltrain-ops" in s.copied[1]]
        built = [s.value for stage in stages for s in image.steps(stage, "RUN")]
        if "python -m dltrain.training.cpu_op" not in built:
            yield f"{target}: DeepSpeed's op is not compiled: every first run would wait, and need a compiler"
        if any("g++" in step.value for step in image.steps(target, "RUN")):
            yield f"{target} carries the compiler along"


def _order(image: Image) -> Iterator[str]:
    """A change of dltrain's own code must not cost the layers of its packages."""
    for target in TARGETS:
        seen = False
        for step in image.steps(target):
            seen |= step.kind == "COPY" and "dltrain" in step.copied[1]
            if seen and any("pip install" in c and "--no-deps" not in c for c in step.commands):
                yield f"{target}: {step.value} comes after the code, so each change of it installs everything anew"


def _twins(image: Image) -> Iterator[str]:
    """The last two stages of both targets are the same but for the accelerator's name and its variables."""
    for kind in ("packages", "op"):
        one, two = (image.stages.get(f"{kind}-{target}") for target in TARGETS)
        if one and two and one.steps != two.steps:
            yield f"{kind}-cpu and {kind}-cuda differ"
    cpu, cuda = (_but_for_accelerator(image, target) for target in TARGETS)
    if cpu != cuda:
        yield "cpu and cuda differ in more than their packages"


def _but_for_accelerator(image: Image, target: str) -> list[tuple[str, str]]:
    steps = image.stages[target].steps if target in image.stages else ()
    return [(s.kind, s.value.replace(f"op-{target}", "op")) for s in steps if "NVIDIA_" not in s.value]


RULES: dict[str, Callable[[Image], Iterator[str]]] = {
    "targets": _targets,
    "bases": _bases,
    "user": _user,
    "sources": _sources,
    "pip": _pip,
    "apt": _apt,
    "secrets": _secrets,
    "start": _start,
    "surroundings": _surroundings,
    "op": _op,
    "order": _order,
    "twins": _twins,
}


def findings(image: Image) -> list[str]:
    """What is wrong, each with the rule that says so."""
    return [f"{name}: {fault}" for name, rule in RULES.items() for fault in rule(image)]
