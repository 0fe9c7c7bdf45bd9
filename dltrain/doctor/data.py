"""Looks at a dataset as a run would: lists it and reads the first footer.

look_at_data(spec)      # [DataFacts, ...] of data.train or each of data.mix, and of data.eval
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from dltrain.data.files import below, list_files
from dltrain.data.footers import read_footer
from dltrain.data.partitions import partition_schema
from dltrain.doctor.job import DataFacts
from dltrain.errors import DataError, StoreError
from dltrain.spec import JobSpec
from dltrain.store import explain, filesystem

__all__ = ["look_at_data", "sources_of"]


def sources_of(spec: JobSpec) -> list[tuple[str, str]]:
    """(field, URL) of all that the spec reads."""
    train = [("data.train", spec.data.train)] if spec.data.train else []
    mix = [(f"data.mix ({source.name})", source.url) for source in spec.data.mix]
    return [*train, *mix, *([("data.eval", spec.data.eval)] if spec.data.eval else [])]


def look_at_data(spec: JobSpec) -> list[DataFacts]:
    """What can be said of each dataset from here."""
    return list(_looks(spec))


def _looks(spec: JobSpec) -> Iterator[DataFacts]:
    for field, url in sources_of(spec):
        begin = time.monotonic()
        try:
            found = _look(field, url)
        except (OSError, DataError, StoreError) as error:
            found = {"error": str(error)}
        yield DataFacts(field, url, seconds=time.monotonic() - begin, **found)  # type: ignore[arg-type]


def _look(field: str, url: str) -> dict[str, object]:
    with explain(url):
        fs, path = filesystem(url)
        files = list_files(fs, path, url, field)
        footer = read_footer(fs, files[0])
        partitions = partition_schema([below(file.path, path) for file in files], url, field)
    size = sum(file.size for file in files)
    return {
        "files": len(files),
        "num_bytes": size,
        "rows": footer.num_rows,
        "rows_about": round(footer.num_rows * size / max(files[0].size, 1)),
        "row_groups": footer.num_row_groups,
        "columns": [*footer.schema.to_arrow_schema().names, *partitions.names],
    }
