"""The R1 penalty of a discriminator (Mescheder et al., 2018).

loss + strength / 2 * r1(judge, real, len(real))                       # of all rows
loss + strength / 2 * r1(judge, real[chosen], len(real), every=4)      # of one row in four: the mean is the same
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["r1"]


def r1(judge: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, rows: int, every: int = 1) -> torch.Tensor:
    """The mean over a batch of the squared slope of what is said of real rows; it can be differentiated again.

    Args:
        judge: (rows, ...) -> one number for each row.
        real: the rows that are penalised, none of them perhaps; rows: of the batch.
        every: of how many rows one is penalised: as much stronger.
    """
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
    return every * slope.square().sum() / rows
