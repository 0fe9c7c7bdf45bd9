"""Batches for Hugging Face models: what their forward takes, `wanted` (-1 where nothing is to be learned), and `asked`.

batch = of_texts(tokens, segments, begun)                        # causal; rows of one or several texts
batch = of_pairs(tokenizer, begin, prompts, answers, longest)    # sequence-to-sequence
padded([[5, 6], [7]])                                            # input_ids and attention_mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dltrain import Batch
from jobs.common import vocabulary
from jobs.common.hf_text import LEARNED, as_source, as_target

__all__ = ["of_pairs", "of_texts", "padded", "positions"]


def of_texts(tokens: torch.Tensor, segments: torch.Tensor, begun: Sequence[int]) -> Batch:
    """Of a causal model; no text sees another one of its row.

    Args:
        tokens: (rows, length), those that are to be learned marked; segments: which text each is of.
        begun: tokens of each row that are there where the rest is to be written.
    """
    learned = (tokens[:, 1:] >= LEARNED) & (segments[:, 1:] == segments[:, :-1])
    tokens = tokens % LEARNED
    return Batch(
        int(learned.sum()),
        input_ids=tokens[:, :-1],
        position_ids=positions(segments)[:, :-1],
        wanted=torch.where(learned, tokens[:, 1:], -1),
        asked=[row[:count].tolist() for row, count in zip(tokens, begun, strict=True)],
    )


def of_pairs(tokenizer: Any, begin: int, prompts: Sequence[str], answers: Sequence[str], longest: int) -> Batch:
    """What an encoder reads, and what its decoder is to write after the token `begin`."""
    asked = as_source(tokenizer, prompts, longest)
    targets = as_target(tokenizer, answers, longest)
    said, there = (torch.from_numpy(vocabulary.pad(some)) for some in (targets, [[1] * len(one) for one in targets]))
    before = torch.cat([torch.full((len(said), 1), begin), said[:, :-1]], 1)
    wanted = torch.where(there > 0, said, -1)
    return Batch(int(there.sum()), **padded(asked), decoder_input_ids=before, wanted=wanted, asked=asked)


def positions(segments: torch.Tensor) -> torch.Tensor:
    """(rows, length) of packed rows: places in each text, from 0. By them a model keeps the texts apart."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    index = torch.arange(segments.shape[1])
    return index - torch.where(begins, index, 0).cummax(1)[0]


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, torch.Tensor]:
    """Tokens of texts of any lengths, and where they are; what is to be continued must end on the right."""
    ids, there = (vocabulary.pad(some) for some in (rows, [[1] * len(row) for row in rows]))
    if left:
        moved = np.stack([np.roll(np.arange(ids.shape[1]), ids.shape[1] - len(row)) for row in rows])
        ids, there = (np.take_along_axis(some, moved, 1) for some in (ids, there))
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(there)}
