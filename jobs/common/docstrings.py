"""Docstrings of the standard library and of installed packages, read from their source without importing them.

docstrings(site_packages(), {"numpy", "rich"})       # (module, name, text) of the packages that are named
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Docstring", "docstrings", "site_packages", "standard_library"]

# Directories whose text is not about what a package does, or is another package's.
_LEFT_OUT = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "site-packages",
    "_vendor",
    "vendored",
    "thirdparty_files",
}


class Docstring(NamedTuple):
    """A docstring, cleaned as `inspect.cleandoc` does, and where it is: a module's dotted name, and a path in it."""

    module: str
    name: str
    text: str


def standard_library() -> Path:
    """Where its source is."""
    return Path(sysconfig.get_path("stdlib"))


def site_packages() -> Path:
    """Where installed packages are."""
    return Path(sysconfig.get_path("purelib"))


def docstrings(root: Path, only: set[str] | None = None) -> Iterator[Docstring]:
    """Those of a directory's modules, classes and functions, in the order of the files.

    Args:
        only: names of packages or modules directly below it; None for all.
    """
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts) and (only is None or parts[0] in only):
            yield from _of_file(path, ".".join(parts).removesuffix(".__init__"))


def _of_file(path: Path, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Docstring(module, getattr(node, "name", ""), text)
