"""What is sent to a cluster: which files of the working directory, and how large they may be."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from dltrain.deploying.packing import Package, relative_python_path
from dltrain.errors import UserError


def write(root: Path, *names: str, num_bytes: int = 4) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * num_bytes)


def names(root: Path, *include: Path) -> list[str]:
    return [file.name for file in Package.of(root, include).files]


def test_what_git_leaves_out_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        "task.py",
        "jobs/a.yaml",
        "build/x.o",
        "sub/build/y.o",
        "a.log",
        "keep.log",
        "data/big",
        "sub/data/small",
    )
    (tmp_path / ".gitignore").write_text("build/\n*.log\n!keep.log\n/data\n# a comment\n")
    assert names(tmp_path) == [".gitignore", "jobs/a.yaml", "keep.log", "sub/data/small", "task.py"]


def test_the_nearest_rules_count(tmp_path: Path) -> None:
    write(tmp_path, "a.bin", "sub/a.bin", "sub/deep/a.bin", "sub/deep/b.txt")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    (tmp_path / "sub/.gitignore").write_text("!a.bin\n/deep/b.txt\n")
    assert names(tmp_path) == [".gitignore", "sub/.gitignore", "sub/a.bin", "sub/deep/a.bin"]
    # What lies in a directory that is left out stays out, as in git.
    (tmp_path / ".gitignore").write_text("sub/\n")
    assert names(tmp_path) == [".gitignore", "a.bin"]


def test_rules_of_rays_own(tmp_path: Path) -> None:
    write(tmp_path, "model.bin", "task.py")
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert names(tmp_path) == [".rayignore", "task.py"]


def test_the_same_files_as_git_would_take(tmp_path: Path) -> None:
    write(
        tmp_path, "a/b/c.txt", "a/b/d.tmp", "a/x/c.txt", "foo", "bar/foo/z", "bar/baz", "q[1].txt", "deep/er/est/f.py"
    )
    (tmp_path / ".gitignore").write_text("a/**/*.tmp\n/foo\nbar/*\n!bar/baz\n*.py\n!deep/er/est/f.py\nq?1?.txt\n")
    (tmp_path / "a/.gitignore").write_text("x\n")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for command in (["init", "-q"], ["ls-files", "--others", "--exclude-standard", "-z"]):
        done = subprocess.run(["git", *command], cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
    assert names(tmp_path) == sorted(done.stdout.strip("\0").split("\0"))


def test_never_packed(tmp_path: Path) -> None:
    write(
        tmp_path,
        ".git/config",
        "pkg/__pycache__/a.pyc",
        ".env",
        "pkg/.env",
        "venv/lib/x.py",
        "venv/pyvenv.cfg",
        "pkg/a.py",
    )
    assert names(tmp_path) == ["pkg/a.py"]


def test_the_spec_is_packed_in_any_case(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root, "build/job.yaml", "task.py")
    write(elsewhere, "other.yaml")
    (root / ".gitignore").write_text("build/\n")
    assert names(root, root / "build/job.yaml", elsewhere / "other.yaml") == [
        ".gitignore",
        "build/job.yaml",
        "other.yaml",
        "task.py",
    ]
    assert Package.name_of(root, elsewhere / "other.yaml") == "other.yaml"


def test_links(tmp_path: Path) -> None:
    write(tmp_path, "root/a.py", "shared/b.py")
    (tmp_path / "root/shared").symlink_to(tmp_path / "shared")
    (tmp_path / "root/again").symlink_to(tmp_path / "root")
    (tmp_path / "root/dangling").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path / "root") == ["a.py", "shared/b.py"]


def test_the_size_and_the_largest(tmp_path: Path) -> None:
    for number in range(1, 8):
        write(tmp_path, f"f{number}.bin", num_bytes=number * 1000)
    package = Package.of(tmp_path)
    assert package.num_bytes == 28_000
    package.check(28_000)
    with pytest.raises(UserError) as caught:
        package.check(27_999)
    message = str(caught.value)
    assert "27.3 KiB in 7 files, over the limit of 27.3 KiB" in message
    assert [line.split()[-1] for line in message.splitlines()[1:6]] == [f"f{n}.bin" for n in (7, 6, 5, 4, 3)]
    assert "f2.bin" not in message
    assert "--max-mb" in message


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "a.py", "b/c.sh")
    (root / "b/c.sh").chmod(0o755)
    package, target = Package.of(root), tmp_path / "package.zip"
    size = package.write(target)
    first = target.read_bytes()
    assert size == len(first)
    os.utime(root / "a.py", (1, 1))
    Package.of(root).write(target)
    assert target.read_bytes() == first
    (root / "a.py").write_text("changed")
    Package.of(root).write(target)
    assert target.read_bytes() != first
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["a.py", "b/c.sh"]
        assert archive.read("a.py") == b"changed"
        assert archive.getinfo("b/c.sh").external_attr >> 16 & 0o777 == 0o755


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, "a.py")
    package = Package.of(tmp_path)
    (tmp_path / "a.py").unlink()
    with pytest.raises(UserError, match=r"packing .*a\.py"):
        package.write(tmp_path / "package.zip")
    with pytest.raises(UserError, match="packing"):
        Package.of(tmp_path, include=[tmp_path / "none.yaml"])


def test_what_is_held(tmp_path: Path) -> None:
    write(tmp_path, "data/train/a.parquet", "data2/b")
    package = Package.of(tmp_path)
    assert all(package.holds(name) for name in ("data/train/a.parquet", "data/train", "data/", "./data", "."))
    assert not any(package.holds(name) for name in ("data/test", "dat", "data/train/a", "../data"))


def test_a_python_path_that_holds_elsewhere_too(tmp_path: Path) -> None:
    value = os.pathsep.join(["src", "", "/usr/lib/python", str(tmp_path / "lib"), ".", "src", ".."])
    here = os.getcwd()
    assert relative_python_path(tmp_path, value) == os.pathsep.join(["src", "lib"])
    assert os.getcwd() == here
    assert relative_python_path(tmp_path, "") == ""
