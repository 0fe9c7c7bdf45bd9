"""The transformer block of the jobs: positions, shared keys and values, packed rows, looking at another text."""

from __future__ import annotations

import pytest
import torch

from jobs.common.attention import Attention, Block, causal, rotate


def test_turned_products_tell_how_far_apart_two_are() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    products = [(rotate(a, i) * rotate(b, i + 3)).sum() for i in range(5)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(5))
    assert abs((rotate(a, 0) * rotate(b, 4)).sum() - products[0]) > 1e-3
    many = rotate(a.expand(1, 1, 5, 8))
    torch.testing.assert_close(many[0, 0, 3], rotate(a, 3)[0, 0, 0])


def test_who_may_look_where() -> None:
    mask = causal(torch.tensor([[1, 1, 2]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


def test_attention_by_hand() -> None:
    """Four heads on two groups, as if each head had its own copy of the keys and values."""
    torch.manual_seed(0)
    layer = Attention(width=16, heads=4, groups=2)
    x = torch.randn(2, 5, 16)
    query = rotate(layer.query(x).view(2, 5, 4, 4).transpose(1, 2))
    keys, values = layer.key_value(x).chunk(2, -1)
    key = rotate(keys.view(2, 5, 2, 4).transpose(1, 2)).repeat_interleave(2, 1)
    value = values.view(2, 5, 2, 4).transpose(1, 2).repeat_interleave(2, 1)
    scores = (query @ key.mT / 2).masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    wanted = layer.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x, causal(torch.ones(2, 5))), wanted)


@pytest.mark.parametrize("cross", [False, True])
def test_step_by_step_as_at_once(cross: bool) -> None:
    torch.manual_seed(0)
    block = Block(width=16, heads=4, groups=2, cross=cross).eval()
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 4, 16) if cross else None
    mask = torch.tensor([[True] * 4, [True, True, False, False]])[:, None, None] if cross else None
    whole = block(x, None, memory, mask)
    cache: dict[object, object] = {}
    steps = [block(x[:, i : i + 1], None, memory, mask, cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    if memory is not None:
        # What is masked does not matter, what is not does.
        memory[1, 2:] = 9.0
        torch.testing.assert_close(block(x, None, memory, mask), whole)
        memory[1, 0] = 9.0
        assert not torch.allclose(block(x, None, memory, mask), whole)
