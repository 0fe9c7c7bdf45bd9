"""A page that is one file: style and script are in it, and nothing of it asks the network.

    document("image-cnn", body)                       # the whole page
    table(("step", "loss"), [(10, "0.5")]), tile("goodput", "93 %"), data_url("image/png", data)

Pure. Cells, captions and names are escaped where they enter; only `Markup` is taken as it is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

__all__ = ["Markup", "card", "data_url", "details", "document", "only_table", "section", "table", "tile"]

# What an HTML table of a task may hold; the text in between is escaped.
_TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "b", "i", "code", "br"}
_CLOSED = _TABLE_TAGS - {"br"}


class Markup(str):
    """HTML that was made here."""

    __slots__ = ()


@cache
def _asset(name: str) -> str:
    return files("dltrain.observing").joinpath(name).read_text()


def document(title: str, body: str) -> str:
    """The whole page.

    Its policy lets it load nothing and run no script but its own, whatever a run's names and samples hold.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style></head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body></html>\n"
    )


def text(value: Any) -> str:
    """Escaped, unless it was made here."""
    return value if isinstance(value, Markup) else escape(str(value))


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; nothing when that is empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def card(body: str, title: str = "", kind: str = "") -> str:
    """A box."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card {kind}">{head}{body}</div>'


def tile(name: str, value: str, sub: str = "") -> str:
    """A figure with its name."""
    below = f'<span class="sub">{escape(sub)}</span>' if sub else ""
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>{below}</div>'


def details(summary: str, body: str) -> Markup:
    """Something to be opened, as it was written."""
    return Markup(f"<details><summary>{escape(summary)}</summary><pre>{escape(body)}</pre></details>")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = (), wrap: int = -1) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        numbers: columns of numbers; wrap: the one whose text is long.
    """

    def cell(tag: str, i: int, value: Any) -> str:
        kind = "n" if i in numbers else "wrap" if i == wrap and tag == "td" else ""
        return f"<{tag}{f' class={kind}' if kind else ''}>{text(value)}</{tag}>"

    top = "".join(cell("th", i, name) for i, name in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if head else ""}{body}</table></div>'


def data_url(media_type: str, data: bytes) -> str:
    """A file as part of the page."""
    return f"data:{escape(media_type, quote=True)};base64,{base64.b64encode(data).decode()}"


def only_table(html: str) -> Markup:
    """A table that a task made, without anything else that HTML can do."""
    reader = _TableReader()
    reader.feed(html)
    reader.close()
    return Markup(f'<div class="scroll">{"".join(reader.parts)}{"".join(reader.missing())}</div>')


class _TableReader(HTMLParser):
    """Keeps tags of tables, without attributes, and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002 - attributes are left out
        if tag in ("script", "style"):
            self._silent += 1
        elif tag in _TABLE_TAGS:
            self.parts.append(f"<{tag}>")
            if tag in _CLOSED:
                self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._silent = max(0, self._silent - 1)
        elif tag in self._open:
            while (last := self._open.pop()) != tag:
                self.parts.append(f"</{last}>")
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(escape(data))

    def missing(self) -> list[str]:
        """What was not closed."""
        return [f"</{tag}>" for tag in reversed(self._open)]
