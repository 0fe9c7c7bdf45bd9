"""Prints docs/from-pytorch.md: a script in plain PyTorch, and what becomes of it.

python docs/from_pytorch.py > docs/from-pytorch.md
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = Path(__file__).with_name("examples")
PAGE = """\
# From a PyTorch script to dltrain

A script that trains on one machine, and the same with dltrain: on any number of workers, with checkpoints, evaluation,
recovery and metrics. The files are in [docs/examples](examples); this page is made from them by
`python docs/from_pytorch.py > docs/from-pytorch.md`. The data are those of `python -m jobs.image_cnn make-data
.data/digits`.

## The script

```python
{script}```

## What changes

What the script says of the network, the rows and the loss moves into a class, nearly as it was. The loop, the
optimizer, the loader and the file of weights go away: they are dltrain's, and the spec says how they are to be. (As
`diff -w` shows it: lines that are only indented have not changed.)

```diff
{diff}```

## The spec

```yaml
{spec}```

    dltrain run digits.yaml
    dltrain checkpoint export digits --to digits.safetensors     # load_state_dict takes it, as it took digits.pt

With batches of all rows, whose order says nothing, both make the same losses to 1e-4 at every step, on one worker and
on two (`tests/e2e/test_examples.py`).

## Line by line

| in the script | with dltrain |
|---|---|
| `torch.manual_seed(0)` | `train.seed`; also what is random in a step, so that a restart repeats it |
| `model = build()` | `Task.build` |
| `DataLoader(..., shuffle=True)` | `data.train`, Parquet at any URL, in an order that does not depend on the workers |
| tensors of the whole dataset | `Task.collate`, tensors of one batch: the data need not fit into memory |
| `BATCH` | `batch.global`: rows of a step over all workers; `batch.micro` where they don't fit into a GPU |
| `torch.optim.AdamW(...)` | `optim`, or `Task.optimizer` with `optim.name: task` |
| a scheduler | `optim.schedule`, `optim.warmup` |
| `clip_grad_norm_` | `optim.clip` |
| `loss.backward()`, `optimizer.step()` | the engine's; `Task.loss` is called for each micro-batch |
| `model.to("cuda")`, `DistributedDataParallel`, `torchrun` | `workers`; the device is the worker's |
| `autocast`, `GradScaler` | `engine.precision: bf16` or `fp16` |
| the evaluation at the end | `Task.evaluate` returns sums; `train.eval_every` |
| `torch.save(...)` | `checkpoint`; every one has weights, optimizer and position, and none has a number of workers |
| `print` | `steps.jsonl`, Prometheus, `dltrain top`, `dltrain status` |

Differences that show:

* A `DataLoader` drops or repeats nothing either, but its order depends on the number of processes; here it does not.
* `AdamW` of torch decays by 0.01 unless told otherwise; `optim.weight_decay` is 0 unless given, and biases and norms
  (parameters of one dimension) are left out.
* BatchNorm sees a worker's micro-batch, as with `DistributedDataParallel`; its statistics are averaged over the workers
  before each evaluation and checkpoint.
* Data that are not Parquet have to be written as such once: `pyarrow.parquet.write_table`, see [data.md](data.md).

Every method that a task may have is in [the task guide](task-guide.md), every field of a spec in [spec.md](spec.md).
"""


def page() -> str:
    """docs/from-pytorch.md."""
    script, task = ((EXAMPLES / name).read_text() for name in ("digits_torch.py", "digits_task.py"))
    diff = "\n".join(changes(script.splitlines(), task.splitlines())) + "\n"
    return PAGE.format(script=script, diff=diff, spec=(EXAMPLES / "digits.yaml").read_text())


def changes(before: list[str], after: list[str]) -> Iterator[str]:
    """As `diff -w` shows them: a line that is only indented otherwise has not changed."""
    same = difflib.SequenceMatcher(None, [line.strip() for line in before], [line.strip() for line in after], False)
    for kind, i, j, k, m in same.get_opcodes():
        if kind == "equal":
            yield from (f" {line}".rstrip() for line in after[k:m])
        else:
            yield from (f"-{line}" for line in before[i:j])
            yield from (f"+{line}" for line in after[k:m])


if __name__ == "__main__":
    print(page(), end="")
