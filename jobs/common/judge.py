"""A classifier that judges what a generator makes: trained once, with the data, and kept beside them.

save(url, train(ImageCnn(), rows, epochs=12))                   # in `make_data`: url/judge.safetensors
judge = load(f"{url}/judge.safetensors", ImageCnn())            # in `evaluate`
features, chances = judged(judge, pictures)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from dltrain import Keys, Task
from jobs.common.progress import watched

__all__ = ["FILE", "judged", "load", "save", "train"]

FILE = "judge.safetensors"


def train(task: Task, rows: pa.Table, epochs: int, batch: int = 32, rate: float = 4e-3) -> nn.Sequential:
    """The network of a task that classifies, trained in this process; always in the same order.

    Args:
        task: its network is a Sequential whose last layer is linear.
    """
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.build()
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    # The schedule is none for fewer.
    steps = max(20, epochs * (len(rows) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for epoch in watched(range(epochs), "training the judge"):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - batch + 1, batch):
            ids = order[start : start + batch]
            (chosen,) = rows.take(pa.array(ids)).combine_chunks().to_batches()
            loss = task.loss(model, task.collate(chosen, Keys(0, np.full(batch, epoch), ids)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def save(url: str, judge: nn.Module) -> None:
    """Writes its weights below a URL."""
    from safetensors.torch import save as to_bytes

    from dltrain.store import open_store

    open_store(url).write(FILE, to_bytes(judge.state_dict()))


def load(url: str, task: Task) -> nn.Sequential:
    """What `save` wrote, as the task's network, in evaluation mode.

    Raises:
        UserError: there is none.
    """
    from safetensors.torch import load as of_bytes

    from dltrain.errors import UserError
    from dltrain.store import open_store

    parent, _, name = url.rpartition("/")
    with torch.random.fork_rng(devices=[]):
        judge = task.build()
    assert isinstance(judge, nn.Sequential)
    try:
        judge.load_state_dict(of_bytes(open_store(parent or ".").read(name)))
    except FileNotFoundError:
        raise UserError(f"args.judge: no file {url}; the job's make-data writes it beside the data") from None
    return judge.eval()


def judged(judge: nn.Sequential, x: torch.Tensor) -> tuple[npt.NDArray[np.float64], torch.Tensor]:
    """What its last layer sees, (rows, width), and probabilities (rows, classes)."""
    judge.to(x.device)
    with torch.no_grad():
        features = judge[:-1](x)
        chances: torch.Tensor = judge[-1](features).float().softmax(1)
    return features.double().cpu().numpy(), chances
