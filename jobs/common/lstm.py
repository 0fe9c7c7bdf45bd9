"""An LSTM that reads from both ends, over rows of different lengths."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["BidirectionalLSTM"]


class BidirectionalLSTM(nn.Module):
    """Layers of two LSTMs, one of which reads each row from its own end.

    What comes out of a row does not depend on how far it was padded, as with `nn.LSTM` over packed rows; backward
    through packed rows takes six times as long on a CPU.

    Args:
        width: of what comes in, and of each direction: twice as much comes out.
        dropout: between layers.
    """

    def __init__(self, width: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [width] + (layers - 1) * [2 * width]
        self.ahead = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in widths)
        self.back = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(rows, steps, width), (rows,) -> (rows, steps, 2 * width); beyond a row's length: anything."""
        turn = turned(lengths, x.shape[1])
        for i, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
            x = self.dropout(x) if i else x
            x = torch.cat([ahead(x)[0], _take(back(_take(x, turn))[0], turn)], -1)
        return x


def turned(lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """(rows,) -> (rows, steps): where each step of a row is when the row is read from its end; padding stays."""
    step = torch.arange(steps, device=lengths.device)
    return torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)


def _take(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return x.gather(1, where[:, :, None].expand_as(x))
