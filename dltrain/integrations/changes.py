"""Settings that a search proposes, as overrides of a spec.

changed(read_spec("digits.yaml", cwd), {"optim.lr": 1e-3, "args": {"width": 64}})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dltrain.errors import UserError
from dltrain.spec import JobSpec, load_spec
from dltrain.spec.paths import at_home

__all__ = ["changed", "read_spec"]


def read_spec(given: str | Path | Mapping[str, Any] | JobSpec, cwd: str) -> JobSpec:
    """A spec by its file, as a mapping or itself; its relative paths are those of `cwd`.

    Raises:
        SpecError: it can't be read, or has faults.
    """
    if isinstance(given, str | Path):
        given = Path(cwd, given)
    return at_home(given if isinstance(given, JobSpec) else load_spec(given), cwd)


def changed(spec: JobSpec, config: Mapping[str, Any]) -> JobSpec:
    """The spec with some settings replaced.

    Args:
        config: by field, as in "optim.lr", or nested as in the file.

    Raises:
        SpecError: a field that there is not, or a value that it can't have.
    """
    return load_spec(spec.to_dict(), [f"{field}={_text(field, value)}" for field, value in _flat(config)])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(field: str, value: Any) -> str:
    # Numbers of numpy's, which searches propose.
    plain = value.item() if hasattr(value, "item") else value
    try:
        return str(yaml.safe_dump(plain, default_flow_style=True))
    except yaml.YAMLError:
        raise UserError(f"{field}: found {value!r}; a setting is what YAML can hold") from None
