"""Packing: the user's directory as one file for a cluster, without what git would leave out.

    package = Package.of(Path.cwd(), include=[Path("jobs/image_cnn.yaml")])
    package.check(max_bytes=100 * 10**6)
    package.write(Path("package.zip")); package.num_bytes

Ray unpacks it on every node, where it is the job's working directory. The same files give the same bytes, so that a
directory that was uploaded before is not uploaded again.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from dltrain.errors import UserError
from dltrain.wording import human_bytes

__all__ = ["Package", "Packed", "relative_python_path"]

# In the order in which they are read: of two rules the later one counts.
_IGNORE_FILES = (".gitignore", ".rayignore")
# Never needed to run, or never to be sent: .env is where credentials are kept.
_LEFT_OUT = frozenset({".git", ".hg", ".svn", ".env", "__pycache__", ".DS_Store"})
_LARGEST = 5
# Zip's first year. The time of a file says nothing of what is in it.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Packed:
    """A file: its name in the package, with slashes, and where it lies now."""

    name: str
    path: Path
    num_bytes: int


@dataclass(frozen=True)
class Package:
    """The files that are to be sent, by name."""

    root: Path
    files: tuple[Packed, ...]

    @classmethod
    def of(cls, root: Path, include: Sequence[Path] = ()) -> Package:
        """What is under a directory.

        .gitignore and .rayignore files are followed in every directory; repositories, virtual environments, __pycache__
        and .env files are left out in any case.

        Args:
            include: files that are packed whatever the rules say; one from elsewhere goes to the top.

        Raises:
            UserError: a file can't be read.
        """
        root = root.resolve()
        found = {name: root / name for name in _walk(root)}
        found |= {cls.name_of(root, path): path.resolve() for path in include}
        try:
            files = (Packed(name, path, path.stat().st_size) for name, path in sorted(found.items()))
            return cls(root, tuple(files))
        except OSError as error:
            raise UserError(f"packing {root}: {error}") from None

    @staticmethod
    def name_of(root: Path, path: Path) -> str:
        """Under which name a file is packed."""
        path, root = path.resolve(), root.resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    @property
    def num_bytes(self) -> int:
        """Of all files, before compression."""
        return sum(file.num_bytes for file in self.files)

    def holds(self, name: str) -> bool:
        """Whether a file of that name, or any file under a directory of that name, is packed."""
        name = str(PurePosixPath(name))
        return name == "." or any(file.name == name or file.name.startswith(f"{name}/") for file in self.files)

    def check(self, max_bytes: float) -> None:
        """Raises UserError, naming the largest files, when it is larger than that."""
        if self.num_bytes <= max_bytes:
            return
        largest = sorted(self.files, key=lambda file: -file.num_bytes)[:_LARGEST]
        raise UserError(
            f"{self.root} is {human_bytes(self.num_bytes)} in {len(self.files):,} files, over the limit of "
            f"{human_bytes(max_bytes)}: it would be sent to every node. The largest:\n"
            + "\n".join(f"  {human_bytes(file.num_bytes):>10}  {file.name}" for file in largest)
            + "\nName what a run does not need in .gitignore or .rayignore, keep data in object storage, "
            "or raise --max-mb"
        )

    def write(self, target: Path) -> int:
        """Writes the zip file; returns its size in bytes."""
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in self.files:
                    info = zipfile.ZipInfo(file.name, _EPOCH)
                    info.compress_type = zipfile.ZIP_DEFLATED
                    # Scripts stay executable.
                    info.external_attr = stat.S_IMODE(file.path.stat().st_mode) << 16
                    archive.writestr(info, file.path.read_bytes())
        except OSError as error:
            raise UserError(f"packing {self.root}: {error}") from None
        return target.stat().st_size


def relative_python_path(root: Path, value: str) -> str:
    """Of a PYTHONPATH what lies under the packed directory, relative to it: elsewhere there are other files."""
    root = root.resolve()
    paths = (Path(root, part).resolve() for part in value.split(os.pathsep) if part)
    found = [path.relative_to(root).as_posix() for path in paths if path.is_relative_to(root) and path != root]
    return os.pathsep.join(dict.fromkeys(found))


# ---- which files ----

Rules = tuple[tuple[str, GitIgnoreSpec], ...]


def _walk(root: Path) -> Iterator[str]:
    """Names of the files under `root` that are not to be left out."""
    yield from _walk_under(root, "", (), (os.path.realpath(root),))


def _walk_under(root: Path, directory: str, rules: Rules, above: tuple[str, ...]) -> Iterator[str]:
    here = root / directory
    try:
        entries = sorted(os.scandir(here), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"packing {root}: {error}") from None
    rules = (*rules, *_rules_of(here, directory, {entry.name for entry in entries}))
    for entry in entries:
        name = f"{directory}{entry.name}"
        is_directory = entry.is_dir()
        if entry.name in _LEFT_OUT or _is_ignored(f"{name}/" if is_directory else name, rules):
            continue
        if is_directory:
            real = os.path.realpath(entry.path)
            # A link to a directory above would never end.
            if real not in above and not (Path(real) / "pyvenv.cfg").exists():
                yield from _walk_under(root, f"{name}/", rules, (*above, real))
        elif entry.is_file():
            yield name


def _rules_of(here: Path, directory: str, names: set[str]) -> Iterator[tuple[str, GitIgnoreSpec]]:
    for name in _IGNORE_FILES:
        if name in names:
            text = (here / name).read_text(errors="replace")
            yield directory, GitIgnoreSpec.from_lines(text.splitlines())


def _is_ignored(name: str, rules: Rules) -> bool:
    """The rule that is nearest to the file counts; within a file of rules the last one."""
    for directory, spec in reversed(rules):
        include = spec.check_file(name.removeprefix(directory)).include
        if include is not None:
            return include
    return False
