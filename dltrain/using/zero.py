"""Reads the folders that DeepSpeed's `engine.save_checkpoint` writes, of any ZeRO stage and number of ranks.

found = read_deepspeed("out")                 # with `latest`, or out/global_step500 itself
found.weights["conv.weight"]                  # fp32, whole
found.moments["exp_avg"]["conv.weight"]       # what the optimizer keeps, where it can be told whose it is

How the weights lie in the files DeepSpeed's own `zero_to_fp32` knows. Its files are pickles, which can run any code
when they are read: what they name is looked at first, and only what DeepSpeed itself puts there is let through.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dltrain.errors import UserError

__all__ = ["DeepSpeedFolder", "read_deepspeed"]

# Beside what torch takes for safe.
_KNOWN = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class DeepSpeedFolder:
    """What was saved.

    Attributes:
        step: DeepSpeed's global_steps; updates: those that the optimizer made.
        zero, num_ranks: how it was trained.
        weights: parameters (fp32), buffers and frozen ones, by the module's names.
        moments: kind -> name -> tensor; empty where `reason` says why.
    """

    step: int
    updates: int
    zero: int
    num_ranks: int
    weights: Tensors
    moments: dict[str, Tensors] = field(default_factory=dict)
    reason: str = ""


def read_deepspeed(path: str, shapes: Shapes | None = None, trust: bool = False) -> DeepSpeedFolder:
    """Reads a folder.

    Args:
        path: on this machine: the folder with `latest` and global_step... in it, or one of the latter.
        shapes: of the network's trainable parameters, in its order: at ZeRO 0 the files don't say whose moments are
            whose.
        trust: reads pickles that name other things too, which may run any code.

    Raises:
        UserError: it is no such folder, is damaged or incomplete, or holds what DeepSpeed does not put there.
    """
    folder = _folder(path)
    files = sorted(folder.glob("*.pt"))
    if any("mp_rank_00" not in file.name for file in files):
        raise UserError(f"{folder} was trained with tensor or pipeline parallelism, which is not imported")
    models = [file for file in files if file.name.endswith("_model_states.pt")]
    optimizers = [file for file in files if file.name.endswith("_optim_states.pt")]
    if not models:
        raise UserError(f"{folder} has no *_model_states.pt; give a folder that engine.save_checkpoint wrote")
    for file in files if not trust else ():
        _check_pickle(file)
    with _reading(folder):
        return _sharded(folder, models, optimizers) if optimizers else _plain(models[0], shapes)


def _folder(path: str) -> Path:
    top = Path(path)
    if not top.is_dir():
        raise UserError(f"{path} is no directory on this machine; fetch DeepSpeed's folder first")
    latest = top / "latest"
    if not latest.is_file():
        return top
    found = top / latest.read_text().strip()
    if not found.is_dir():
        raise UserError(f"{latest} names {found.name}, which is not there; give one of the folders themselves")
    return found


def _check_pickle(file: Path) -> None:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{file} is damaged, or not of torch.save: {error}") from None
    strange = sorted(set(named) - _KNOWN)
    if strange:
        raise UserError(
            f"{file} names {', '.join(strange)}, and reading it would run that. Where you trust whoever made the "
            "file, say so with --trust"
        )


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns what a damaged or unknown file leads to into a message; what DeepSpeed prints is left out."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{folder} can't be read: {type(error).__name__}: {error}") from error


def _load(file: Path) -> Any:
    # What it names was looked at before.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


# ---- ZeRO 1, 2, 3 ----


def _sharded(folder: Path, models: Sequence[Path], optimizers: Sequence[Path]) -> DeepSpeedFolder:
    from deepspeed.utils import zero_to_fp32

    state = _load(models[0])
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    # Stages 1 and 2 keep parameters that are not trained with the module alone.
    frozen = {name: t.float() for name, t in state["module"].items() if name not in found and t.numel()}
    weights = {name: tensor.clone() for name, tensor in {**frozen, **found}.items()}
    shards = [_load(file)["optimizer_state_dict"] for file in sorted(optimizers, key=_natural)]
    zero = int(shards[0]["zero_stage"])
    made = DeepSpeedFolder(int(state["global_steps"]), _updates(state, shards), zero, len(shards), weights)
    try:
        for kind in sorted({kind for shard in shards for kept in _states(shard).values() for kind in _kinds(kept)}):
            groups = [_moment_groups(shard, kind) for shard in shards]
            made.moments[kind] = _merged(zero, groups, models, shards[0])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        made.moments, made.reason = {}, f"the optimizer's state is laid out in another way ({error})"
    return made


def _natural(file: Path) -> tuple[int, str]:
    rank = file.name.partition("zero_pp_rank_")[2].partition("_")[0]
    return int(rank or 0), file.name


def _states(shard: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    """The torch optimizer's state of one rank, by group."""
    inner = shard["base_optimizer_state"] if "base_optimizer_state" in shard else shard["optimizer_state_dict"]
    state: Mapping[int, Mapping[str, Any]] = inner["state"]
    return state


def _moment_groups(shard: Mapping[str, Any], kind: str) -> list[torch.Tensor]:
    """A moment's flat tensors, in the order of the groups."""
    state = _states(shard)
    return [state[group][kind] for group in sorted(state)]


def _kinds(kept: Mapping[str, Any]) -> list[str]:
    """The names of what an optimizer keeps for each element, unlike its count of steps."""
    return [name for name, value in kept.items() if isinstance(value, torch.Tensor) and value.dim()]


def _updates(state: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> int:
    counted = [group["step"] for shard in shards[:1] for group in _states(shard).values() if "step" in group]
    return int(counted[0]) if counted else int(state["global_steps"]) - int(state["skipped_steps"])


def _merged(zero: int, groups: list[list[torch.Tensor]], models: Sequence[Path], shard: Mapping[str, Any]) -> Tensors:
    """Whole tensors of ranks' flat ones, cut as DeepSpeed cuts the weights."""
    from deepspeed.utils import zero_to_fp32 as layout

    states = layout.parse_model_states([str(file) for file in sorted(models, key=_natural)])
    merged: dict[str, Any] = {}
    if zero == 3:
        layout._zero3_merge_trainable_params(merged, len(groups), groups, states)
    else:
        paddings = shard.get("param_alignment_paddings")
        layout._zero2_merge_trainable_params(merged, len(groups), groups, states, paddings)
    return {name: tensor.contiguous().float().clone() for name, tensor in merged.items()}


# ---- ZeRO 0 ----


def _plain(file: Path, shapes: Shapes | None) -> DeepSpeedFolder:
    state = _load(file)
    weights = {name: (t.float() if t.is_floating_point() else t).clone() for name, t in state["module"].items()}
    steps = int(state["global_steps"])
    made = DeepSpeedFolder(steps, steps - int(state["skipped_steps"]), 0, int(state["dp_world_size"]), weights)
    optimizer = state.get("optimizer")
    if not optimizer:
        made.reason = "it holds no optimizer"
        return made
    # Of bf16 it keeps the fp32 weights as well.
    inner = optimizer.get("optimizer_state_dict", optimizer)
    numbers = [i for group in inner["param_groups"] for i in group["params"]]
    flat = [tensor for group in optimizer.get("fp32_groups", ()) for tensor in group]
    masters = dict(zip(numbers, flat, strict=True)) if flat else {}
    names = _names(inner, masters, shapes)
    if names is not None:
        _take(made, inner, masters, names)
    elif masters:
        raise UserError(
            f"{file}: the fp32 weights in it are listed without names; import it with --spec or --run, whose network "
            "says the names"
        )
    else:
        made.reason = "at ZeRO 0 the files don't say whose the optimizer's state is; --spec or --run may"
    return made


def _take(
    made: DeepSpeedFolder,
    inner: Mapping[str, Any],
    masters: Mapping[int, torch.Tensor],
    names: Mapping[int, str],
) -> None:
    made.weights |= {names[number]: tensor.float().clone() for number, tensor in masters.items()}
    for number, kept in inner["state"].items():
        made.updates = int(kept.get("step", made.updates))
        for kind in _kinds(kept):
            made.moments.setdefault(kind, {})[names[number]] = kept[kind].float().clone()


def _names(
    inner: Mapping[str, Any], masters: Mapping[int, torch.Tensor], shapes: Shapes | None
) -> dict[int, str] | None:
    """Number of a parameter in the optimizer -> its name, by the orders that optimizers are given them in.

    Those are: as the network has them, or first those of several dimensions and then the others (which get no weight
    decay), or the other way around. One is taken where the shapes of all agree.
    """
    if shapes is None:
        return None
    numbers = [i for group in inner["param_groups"] for i in group["params"]]
    sizes = {i: _shape(i, inner, masters) for i in numbers}
    flat = [name for name, shape in shapes.items() if len(shape) <= 1]
    deep = [name for name in shapes if name not in flat]
    for order in ([*shapes], [*deep, *flat], [*flat, *deep]) if len(inner["param_groups"]) > 1 else ([*shapes],):
        if len(order) == len(numbers) and all(
            sizes[i] in (None, tuple(shapes[name])) for i, name in zip(numbers, order, strict=True)
        ):
            return dict(zip(numbers, order, strict=True))
    return None


def _shape(number: int, inner: Mapping[str, Any], masters: Mapping[int, torch.Tensor]) -> tuple[int, ...] | None:
    kept: Mapping[str, Any] = inner["state"].get(number, {})
    tensor = masters.get(number, next((kept[kind] for kind in _kinds(kept)), None))
    return tuple(tensor.shape) if tensor is not None else None
