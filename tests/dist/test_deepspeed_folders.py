"""Folders that DeepSpeed's own engine.save_checkpoint wrote, taken over: the weights, and training that goes on.

Saved by 1 and 2 ranks at ZeRO 0 to 3 in fp32 and bf16; gone on from at another number of ranks and another stage.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network_tasks
import networks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_ranks
from safetensors.torch import load_file

from dltrain.checkpoint.commit import find, verify
from dltrain.checkpoint.fragments import Network
from dltrain.checkpoint.reader import FragmentReader
from dltrain.checkpoint.snapshot import load
from dltrain.errors import UserError
from dltrain.spec import parse_spec
from dltrain.store import open_store
from dltrain.training.engine import Engine
from dltrain.using.importing import to_folder, to_run
from dltrain.using.zero import read_deepspeed

HERE = Path(__file__).parent
ADAMW = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
STAGES, RANKS = (0, 1, 2, 3), (1, 2)
SAVE_AT, END = 3, 7
# case -> (network, optimizer, precision, the task)
CASES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "dense": (networks.dense, ADAMW, "fp32", "Dense"),
    "tied": (networks.Tied, ADAMW, "fp32", "Tied"),
    "sgd": (networks.dense, SGD, "fp32", "Dense"),
    "bf16": (networks.Tied, ADAMW, "bf16", "Tied"),
    "normed": (network_tasks.normed, ADAMW, "fp32", "Normed"),
}
Saved = dict[str, Any]


# ---- on the ranks ----


def steps(engine: Engine, first: int, last: int) -> list[float]:
    return [step(engine, index) for index in range(first, last)]


def step(engine: Engine, index: int) -> float:
    x, y = networks.rows(index, 12)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * 12 // num_ranks, (rank + 1) * 12 // num_ranks)
    engine.begin_step(12)
    engine.backward(F.mse_loss(engine(x[mine]).float(), y[mine]), len(x[mine]), last=True)
    return networks.whole(engine.step()).loss


def save_all(directory: str) -> dict[tuple[str, int], Saved]:
    found = {}
    for case, zero in itertools.product(CASES, STAGES):
        network, optim, precision, _ = CASES[case]
        engine = networks.engine_for(network(0), optim, zero, precision)
        steps(engine, 0, SAVE_AT)
        engine.engine.save_checkpoint(f"{directory}/{case}-{zero}")
        weights = networks.weights(engine)
        found[case, zero] = {"weights": weights, "losses": steps(engine, SAVE_AT, END)}
    return found


def go_on(jobs: list[tuple[str, int, str]]) -> list[list[float]]:
    """From the runs' imported checkpoints, at these stages."""
    losses = []
    for case, zero, url in jobs:
        network, optim, precision, _ = CASES[case]
        # Other weights, so that whatever is not loaded shows.
        engine = networks.engine_for(network(5), optim, zero, precision)
        store = open_store(url)
        checkpoint = find(store)
        reader = FragmentReader(store, checkpoint)
        applied = load([Network("", engine.engine, engine.module)], reader, checkpoint.manifest["optimizer_step"])
        assert applied == [SAVE_AT]
        engine.step_count = checkpoint.step
        losses.append(steps(engine, SAVE_AT, END))
    return losses


# ---- the saves ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[int, dict[tuple[str, int], Saved]]]]:
    """Folders by number of ranks, and what the engines that wrote them went on to do."""
    root = tmp_path_factory.mktemp("deepspeed")
    yield root, {ranks: run_ranks(save_all, ranks, str(root / str(ranks)))[0] for ranks in RANKS}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def spec(tmp_path: Path, case: str, name: str = "taken", **changes: Any) -> Any:
    _, optim, precision, task = CASES[case]
    return parse_spec(
        {
            "name": name,
            "task": f"network_tasks:{task}",
            "data": {"train": "nowhere"},
            "batch": {"global": 12},
            "train": {"steps": END},
            "optim": optim,
            "engine": {"precision": precision},
            "runs": str(tmp_path / "runs"),
            **changes,
        }
    )


def folders() -> list[tuple[int, str, int]]:
    return list(itertools.product(RANKS, CASES, STAGES))


# ---- the tests ----


def test_the_weights_are_those_of_the_engine(saved: Any, tmp_path: Path) -> None:
    root, ranks = saved
    for num_ranks, case, zero in folders():
        where = f"{case}, ZeRO {zero} on {num_ranks}"
        source = root / str(num_ranks) / f"{case}-{zero}"
        done = to_folder({"": str(source)}, str(tmp_path / where), spec(tmp_path, case))
        assert (done["step"], done["sources"][0]["zero"]) == (SAVE_AT, zero), where
        assert done["sources"][0]["num_ranks"] == num_ranks, where
        found = load_file(done["file"])
        # Ties, what is frozen and buffers too: all that the module asks for.
        wanted = CASES[case][0](0).state_dict()
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}, where
        for name, weight in ranks[num_ranks][case, zero]["weights"].items():
            assert torch.equal(found[name].to(weight.dtype), weight), f"{where}: {name}"
        if case == "normed":
            assert found["1.num_batches_tracked"].item() == SAVE_AT
            assert not torch.equal(found["1.running_mean"], wanted["1.running_mean"])


def test_training_goes_on_at_another_stage_and_number_of_ranks(saved: Any, tmp_path: Path) -> None:
    root, ranks = saved
    cases = [(n, case, zero) for n, case, zero in folders() if case != "normed"]
    jobs: dict[int, list[tuple[str, int, str]]] = {n: [] for n in RANKS}
    wanted: dict[int, list[tuple[str, list[float]]]] = {n: [] for n in RANKS}
    for num_ranks, case, zero in cases:
        name = f"{case}-{zero}-{num_ranks}"
        job = spec(tmp_path, case, name)
        done = to_run({"": str(root / str(num_ranks) / f"{case}-{zero}")}, job)
        moments = ["momentum_buffer"] if case == "sgd" else ["exp_avg", "exp_avg_sq"]
        assert done["moments"] == moments, name
        store = open_store(done["run"]).child("checkpoints")
        assert verify(store, find(store)) == []
        others = 3 - num_ranks
        jobs[others].append((case, (zero + 1) % 4, store.url))
        wanted[others].append((name, ranks[num_ranks][case, zero]["losses"]))
    for num_ranks, some in jobs.items():
        for (name, losses), got in zip(wanted[num_ranks], run_ranks(go_on, num_ranks, some)[0], strict=True):
            # In bf16 another number of ranks adds up in another order.
            exact = 1e-2 if name.startswith("bf16") else 1e-5
            assert got == pytest.approx(losses, rel=exact), name


def test_what_may_be_imported_where(saved: Any, tmp_path: Path) -> None:
    root, _ = saved
    source = {"": str(root / "2" / "dense-1")}
    job = spec(tmp_path, "dense")
    to_run(source, job)
    with pytest.raises(UserError, match="has checkpoints of its own, the newest of step 3"):
        to_run(source, job)
    with pytest.raises(UserError, match=r"another network than the task builds: no inside\.weight"):
        to_run(source, spec(tmp_path, "tied", "other"))
    with pytest.raises(UserError, match="this task has 1 network"):
        to_run({"one": source[""]}, spec(tmp_path, "dense", "other"))
    # The moments of another optimizer are of no use to this one.
    sgd = spec(tmp_path, "sgd", "sgd")
    done = to_run(source, sgd)
    assert done["moments"] == []
    assert "it keeps exp_avg, exp_avg_sq, not what sgd goes on from" in done["sources"][0]["note"]
    # One of its folders by name, and without the `latest`.
    copy = tmp_path / "copy"
    shutil.copytree(source[""], copy)
    (copy / "latest").unlink()
    assert read_deepspeed(str(copy / "global_step3")).step == SAVE_AT
    with pytest.raises(UserError, match="has no .*model_states.pt"):
        read_deepspeed(str(copy))
    (copy / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="names global_step9, which is not there"):
        read_deepspeed(str(copy))


def test_two_networks_from_two_folders(saved: Any, tmp_path: Path) -> None:
    root, ranks = saved
    job = spec(tmp_path, "dense", task="network_tasks:Two")
    sources = {"one": str(root / "1" / "dense-2"), "other": str(root / "2" / "tied-3")}
    with pytest.raises(UserError, match=r"this task has 2 network\(s\); give one=FOLDER, other=FOLDER"):
        to_run({"": sources["one"]}, job)
    done = to_run(sources, job)
    store = open_store(done["run"]).child("checkpoints")
    checkpoint = find(store)
    reader = FragmentReader(store, checkpoint)
    assert checkpoint.manifest["ties"] == {"other.again.weight": "other.inside.weight"}
    assert {k: int(v) for k, v in reader.whole("applied:").items()} == {"one.": SAVE_AT, "other.": SAVE_AT}
    for name, weight in ranks[1]["dense", 2]["weights"].items():
        assert torch.equal(reader.tensor(f"one.{name}"), weight)
    frozen = reader.whole("frozen:")
    assert torch.equal(frozen["other.frozen.weight"], ranks[2]["tied", 3]["weights"]["frozen.weight"])
    folder = to_folder(sources, str(tmp_path / "folder"), job)
    assert json.loads(Path(folder["config"]).read_text())["task"] == "network_tasks:Two"


def test_without_a_network_zero_0_says_what_it_lacks(saved: Any, tmp_path: Path) -> None:
    root, ranks = saved
    plain = read_deepspeed(str(root / "2" / "dense-0"))
    assert plain.moments == {}
    assert "don't say whose the optimizer's state is" in plain.reason
    assert torch.equal(plain.weights["0.weight"], ranks[2]["dense", 0]["weights"]["0.weight"])
    with pytest.raises(UserError, match=r"listed without names; import it with --spec or --run"):
        read_deepspeed(str(root / "2" / "bf16-0"))
    # The sharded stages say it themselves.
    for zero in (1, 2, 3):
        assert set(read_deepspeed(str(root / "2" / f"dense-{zero}")).moments) == {"exp_avg", "exp_avg_sq"}


class Bomb:
    """A pickle that runs something when it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_a_file_that_would_run_something_is_refused(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = saved
    copy = tmp_path / "copy"
    shutil.copytree(root / "1" / "dense-1", copy)
    monkeypatch.chdir(tmp_path)
    file = copy / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "client": Bomb()}, file)
    with pytest.raises(UserError, match=r"names .*pathlib.*, and reading it would run that.*--trust"):
        read_deepspeed(str(copy))
    assert not (tmp_path / "exploded").exists()
    read_deepspeed(str(copy), trust=True)
    assert (tmp_path / "exploded").exists()
    file.write_bytes(pickle.dumps({"not": "torch"}))
    with pytest.raises(UserError, match="is damaged, or not of torch.save"):
        read_deepspeed(str(copy))


def test_damaged_and_incomplete_folders(saved: Any, tmp_path: Path) -> None:
    root, _ = saved
    with pytest.raises(UserError, match="is no directory on this machine"):
        read_deepspeed("s3://bucket/out")
    copy = tmp_path / "copy"
    shutil.copytree(root / "2" / "dense-2", copy)
    (copy / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"can't be read: ValueError: Expected 2 of '.*optim_states.pt'"):
        read_deepspeed(str(copy))
    (copy / "global_step3" / "zero_pp_rank_0_mp_rank_01_optim_states.pt").touch()
    with pytest.raises(UserError, match="tensor or pipeline parallelism"):
        read_deepspeed(str(copy))
