"""What `dltrain predict` shows of results: a line each, pieces as they come, or one JSON object; files in a folder.

told = Shown(model, Folder("out"), json=False)
told.items(given("scans"), batch=64, seed=0); told.made(16, seed=0)
told.summary()
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from dltrain.data.raw import Input
from dltrain.errors import UserError
from dltrain.using.items import Item
from dltrain.using.model import Found, Model, defines
from dltrain.using.results import Folder, line, plain

__all__ = ["Shown"]


class Shown:
    """Predicts, and tells at once.

    Args:
        folder: takes the Artifacts; where it writes none, `draw` is not asked for any.
        out: prints text as it is; None collects everything for `summary`.
        warn: told what could not be used.

    Attributes:
        bad: inputs without a result.
    """

    def __init__(
        self,
        model: Model,
        folder: Folder,
        out: Callable[[str], None] | None,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self._model, self._folder, self._out, self._warn = model, folder, out, warn
        self._draws = folder.is_kept and defines(model.task, "draw")
        self._results: list[dict[str, Any]] = []
        self.bad = 0

    def items(self, items: Iterable[Item], batch: int, seed: int) -> None:
        """Predicts for items in batches, as they come.

        Raises:
            UserError: the task can't be used; TaskError: it raised.
        """
        self._model.check_predicts()
        number = 0
        for some in _batches(items, 1 if self._model.streams else batch):
            if self._model.streams and self._out:
                self._stream(some[0], seed, number)
            else:
                found = self._model.of_items(some, seed, number, self._draws)
                for item, one in zip(some, found, strict=True):
                    self._tell(item, one)
            number += len(some)

    def made(self, count: int, seed: int) -> None:
        """What the task makes out of nothing."""
        for number, value in enumerate(self._model.generate(count, seed=seed)):
            self._tell(Input(f"made-{number:04d}"), Found(value))

    def summary(self) -> dict[str, Any]:
        """Everything, for --json."""
        model = self._model
        return {
            "run": model.trained.run,
            "step": model.step,
            "metrics": model.metrics,
            "results": self._results,
            "files": self._folder.files,
            "bad": self.bad,
        }

    # ---- one item ----

    def _stream(self, item: Item, seed: int, number: int) -> None:
        assert self._out is not None
        try:
            for piece in self._model.pieces(item, seed, number):
                self._out(piece)
            self._out("\n")
        except UserError as error:
            self._refuse(str(error))

    def _tell(self, item: Item, found: Found) -> None:
        if found.error:
            self._refuse(f"{item.name}: {found.error}")
            self._results.append({"input": item.name, "error": found.error})
            return
        keep = self._folder.keep(item.name)
        value = plain(found.value, keep)
        drawn = None if found.drawn is None else plain(found.drawn, keep)
        if self._out:
            # A line in, a line out: what follows in a pipe wants nothing else.
            named = "" if isinstance(item, Input) and item.text is not None else f"{item.name}: "
            self._out(f"{named}{line(value)}{_where(drawn)}\n")
        else:
            self._results.append({"input": item.name, "prediction": value, **({"drawn": drawn} if drawn else {})})

    def _refuse(self, text: str) -> None:
        self.bad += 1
        self._warn(text)


def _where(drawn: Any) -> str:
    return f"  -> {drawn['file']}" if isinstance(drawn, dict) and "file" in drawn else ""


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    for first in rest:
        yield list(chain([first], islice(rest, size - 1)))
