"""What is done to networks before DeepSpeed: weights to begin with, and recomputed activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dltrain.errors import UserError
from dltrain.spec import InitSpec, parse_spec
from dltrain.training.initial import recompute, shape_networks, take_weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.calls = nn.Linear(3, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(self.inside(x))


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def take(module: nn.Module, url: str, **fields: Any) -> str:
    (line,) = take_weights({"": module}, InitSpec(url=url, **fields), "runs")
    return line


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("whole_directory", [False, True])
def test_weights_and_buffers_are_taken(tmp_path: Path, whole_directory: bool) -> None:
    source, target = Net(1), Net(2)
    source.norm.running_mean += 3.0
    state = source.state_dict()
    if whole_directory:
        names = sorted(state)
        save_file({n: state[n] for n in names[:5]}, tmp_path / "model-1.safetensors")
        save_file({n: state[n] for n in names[5:]}, tmp_path / "model-2.safetensors")
        url = str(tmp_path)
    else:
        url = str(tmp_path / "model.safetensors")
        save_file(state, url)
    assert take(target, url) == f"weights of {len(state)} tensors taken from {url}"
    assert same(source, target)


def test_strict_tells_what_does_not_fit_and_how_to_go_on(tmp_path: Path) -> None:
    url = str(tmp_path / "model.safetensors")
    state = Net(1).state_dict()
    del state["blocks.0.inside.bias"]
    save_file({**state, "head.weight": torch.zeros(5, 3), "old": torch.zeros(1)}, url)
    with pytest.raises(UserError) as caught:
        take(Net(2), url)
    text = str(caught.value)
    assert "not there: blocks.0.inside.bias" in text
    assert "head.weight is 5x3 there and 2x3 here" in text
    assert "strict: false" in text
    target, before = Net(2), Net(2)
    said = take(target, url, strict=False)
    assert "not there: blocks.0.inside.bias" in said
    assert "not used: old" in said
    assert torch.equal(target.head.weight, before.head.weight)
    assert torch.equal(target.blocks[0].inside.weight, state["blocks.0.inside.weight"])


def test_networks_are_told_apart_by_name(tmp_path: Path) -> None:
    url = str(tmp_path / "both.safetensors")
    sources = {"maker": Net(1), "judge": Net(2)}
    save_file({f"{name}.{k}": v for name, m in sources.items() for k, v in m.state_dict().items()}, url)
    targets = {"judge": Net(3), "maker": Net(4)}
    list(take_weights(targets, InitSpec(url=url), "runs"))
    assert all(same(targets[name], sources[name]) for name in sources)


def test_a_tie_needs_one_of_its_names(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        made["out"].weight = made["embed"].weight
        return made

    url, target = str(tmp_path / "one.safetensors"), tied(1)
    save_file({"out.weight": torch.ones(5, 3)}, url)
    take(target, url)
    assert target["embed"].weight.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.safetensors", "no file"),
        ("nothing", "no safetensors file and no checkpoint"),
        ("bad.safetensors", "not a"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match=said):
        take(Net(), str(tmp_path / name))
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        take(Net(), str(tmp_path / "other.safetensors"), strict=False)


@pytest.mark.parametrize("pattern", ["Block", "blocks.*"])
def test_activations_are_made_again_with_the_same_gradients(pattern: str) -> None:
    plain, again = Net(0), Net(0)
    assert recompute(again, [pattern]) == ["blocks.0", "blocks.1"]
    assert list(again.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for net in (plain, again):
        net(x).square().sum().backward()
    assert (plain.blocks[0].calls, again.blocks[0].calls) == (1, 2)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        again(x)
    assert again.blocks[0].calls == 3


def test_a_pattern_without_a_module_is_told() -> None:
    with pytest.raises(
        UserError,
        match=r"'Blok' matches no module within the network; classes there: BatchNorm1d, Block, Linear, ModuleList$",
    ):
        recompute(Net(), ["Blok"])


def test_networks_may_be_called_as_they_like() -> None:
    modules: dict[str, nn.Module] = {"keys": nn.Linear(2, 2), "type": nn.Linear(2, 2)}
    changes = {"train": {"steps": 1, "freeze": ["keys.bias"]}}
    least = {"name": "a", "task": "a:A", "data": {"train": "x"}, "batch": {"global": 1}, "optim": {"lr": 0.1}}
    shape_networks(modules, parse_spec({**least, **changes}))
    trained = [f"{n}.{p}" for n, m in modules.items() for p, t in m.named_parameters() if t.requires_grad]
    assert trained == ["keys.weight", "type.weight", "type.bias"]
