"""Judges GPUs: whether driver, torch's build and cards go together, and whether the cards reach each other.

    judge_gpus(cards_by_nvidia_smi, what_torch_says)

Pure. Drivers that a CUDA version needs: NVIDIA, CUDA Compatibility, table "Minor version compatibility".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dltrain.doctor.finding import Finding, fail, ok, skip, warn
from dltrain.wording import human_bytes

__all__ = ["Card", "TorchFacts", "judge_card", "judge_gpus", "judge_torch"]

_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
_MIB = 1024**2
_IN_USE_BYTES = 1024**3
_CARD_SHARE = 0.8
_CUDA_BUILD = "install a CUDA build of torch: pip install --force-reinstall torch, from PyPI's own index"


@dataclass(frozen=True)
class Card:
    """A GPU, as nvidia-smi sees it."""

    name: str
    driver: str
    memory_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class TorchFacts:
    """What torch and DeepSpeed say when they are imported.

    Attributes:
        error: they could not be imported, and why; op_error: DeepSpeed's CPU op could not be loaded.
        cuda: the version that torch was built for, empty for a CPU build; usable: torch can use the GPUs.
        names, capabilities: of each GPU, such as "sm_90"; arches: those that torch was built for.
        no_peers: pairs of GPUs that can't read each other's memory.
    """

    error: str = ""
    torch: str = ""
    deepspeed: str = ""
    op_error: str = ""
    cuda: str = ""
    nccl: str = ""
    usable: bool = False
    names: Sequence[str] = ()
    capabilities: Sequence[str] = ()
    arches: Sequence[str] = ()
    no_peers: Sequence[tuple[int, int]] = ()
    seconds: float = 0.0
    warnings: Sequence[str] = field(default_factory=tuple)


def judge_torch(torch: TorchFacts) -> list[Finding]:
    """Whether torch, DeepSpeed and its op can be imported."""
    name = "torch and DeepSpeed"
    if torch.error:
        todo = "make both importable in the Python that Ray runs: pip install -c constraints.txt torch deepspeed"
        return [fail(name, f"can't be imported: {torch.error}", "every worker begins with that", todo)]
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "CPU build"
    found = [ok(name, f"torch {torch.torch} ({build}), DeepSpeed {torch.deepspeed}, imported in {torch.seconds:.1f} s")]
    if torch.op_error:
        todo = "delete the file and compile it again: python -m dltrain.training.cpu_op"
        why = "CPU workers load it before their first step"
        found.append(fail("DeepSpeed's CPU op, loaded", torch.op_error, why, todo))
    return found


def judge_gpus(cards: Sequence[Card], torch: TorchFacts) -> list[Finding]:
    """What GPUs there are, and whether torch can compute on them."""
    if not cards and not torch.usable:
        return [skip("GPUs", "none here: workers compute on the CPU")]
    found = list(_usable(cards, torch))
    if torch.usable:
        found += [*_arches(torch), *_peers(torch), *_in_use(cards)]
    return found


def _usable(cards: Sequence[Card], torch: TorchFacts) -> Iterator[Finding]:
    if torch.usable:
        kinds = ", ".join(f"{torch.names.count(name)} x {name}" for name in dict.fromkeys(torch.names))
        driver = f"; driver {cards[0].driver}" if cards else ""
        yield ok("GPUs", f"{kinds}{driver}, CUDA {torch.cuda}, NCCL {torch.nccl}")
        return
    why = "workers would train on the CPU, or not start with workers.gpus: 1"
    seen = f"nvidia-smi shows {len(cards)} x {cards[0].name} with driver {cards[0].driver}"
    needed = _DRIVERS.get(int(torch.cuda.partition(".")[0] or 0))
    if not torch.cuda:
        yield fail("GPUs", f"{seen}, and torch {torch.torch} is a CPU build", why, _CUDA_BUILD)
    elif needed and _driver(cards[0].driver) < needed:
        least = ".".join(map(str, needed))
        todo = f"update the driver to {least} or newer, or install torch for an older CUDA"
        yield fail("GPUs", f"{seen}; torch is built for CUDA {torch.cuda}, which needs {least}", why, todo)
    else:
        said = f": {torch.warnings[0]}" if torch.warnings else ""
        todo = "check CUDA_VISIBLE_DEVICES, the container's --gpus all, and `nvidia-smi -q` for faults"
        yield fail("GPUs", f"{seen}, and torch can't use them{said}", why, todo)


def _driver(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())[:2]


def _arches(torch: TorchFacts) -> Iterator[Finding]:
    """A card runs code of its own generation, of its minor versions before it, or what the driver makes of PTX."""
    bad = [cap for cap in dict.fromkeys(torch.capabilities) if not _runs(cap, torch.arches)]
    if bad:
        yield fail(
            "GPU code in torch",
            f"cards are {', '.join(bad)}; torch was built for {', '.join(torch.arches)}",
            "the first kernel fails with `no kernel image is available`",
            "install a build of torch for this generation of cards",
        )


def _runs(capability: str, arches: Sequence[str]) -> bool:
    number = _arch(capability)
    own = any(a.startswith("sm_") and _arch(a)[0] == number[0] and _arch(a) <= number for a in arches)
    return own or any(a.startswith("compute_") and _arch(a) <= number for a in arches)


def _arch(text: str) -> tuple[int, int]:
    digits = "".join(c for c in text.partition("_")[2] if c.isdigit())
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def _peers(torch: TorchFacts) -> Iterator[Finding]:
    if len(torch.names) < 2:
        return
    if torch.no_peers:
        a, b = torch.no_peers[0]
        yield warn(
            "GPU to GPU",
            f"{len(torch.no_peers)} pairs can't read each other's memory, {a} and {b} among them",
            "their gradients go through host memory, several times as slow",
            "see `nvidia-smi topo -p2p r`; in virtual machines let ACS and IOMMU pass peer traffic",
        )
    else:
        yield ok("GPU to GPU", "all pairs read each other's memory")


def _in_use(cards: Sequence[Card]) -> Iterator[Finding]:
    busy = [i for i, card in enumerate(cards) if card.used_bytes > _IN_USE_BYTES]
    if busy:
        used = human_bytes(max(cards[i].used_bytes for i in busy))
        todo = "see who with nvidia-smi; end it, or leave these cards out with CUDA_VISIBLE_DEVICES"
        yield warn("GPU memory", f"cards {busy} have up to {used} in use already", "a model may not fit", todo)


def judge_card(cards: Sequence[Card], model_bytes: int) -> Finding:
    """Whether a worker's part of the model fits on the smallest card, before any activation."""
    least = min(card.memory_bytes - card.used_bytes for card in cards)
    found = f"{human_bytes(model_bytes)} for weights, gradients and optimizer, {human_bytes(least)} free"
    if model_bytes > _CARD_SHARE * least:
        make = fail if model_bytes > least else warn
        todo = "raise engine.zero, take more workers, or cards with more memory"
        return make("memory of a GPU", found, "activations come on top of that", todo)
    return ok("memory of a GPU", found)
