"""The documents: pages that are made from code are up to date, and what any of them names is there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import pytest
import typer
import yaml

from dltrain import cli
from dltrain.spec import JobSpec, parse_spec
from dltrain.spec.base import Model

ROOT = harness.ROOT
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
# Directories whose files a page may name; a name with a star or a place to fill in is not a file's.
HOUSES = ("cluster", "docs", "dltrain", "jobs", "k8s", "tests")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(("script", "page"), [("spec_reference", "spec"), ("from_pytorch", "from-pytorch")])
def test_pages_that_are_made(script: str, page: str) -> None:
    made = module(ROOT / "docs" / f"{script}.py").page()
    assert (ROOT / "docs" / f"{page}.md").read_text() == made, f"run: python docs/{script}.py > docs/{page}.md"


def fields(model: type[Model], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        inner = module(ROOT / "docs" / "spec_reference.py")._model_of(field.annotation)
        if inner:
            yield from fields(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", field


def test_every_field_of_a_spec_is_told() -> None:
    untold = [path for path, field in fields(JobSpec) if not field.description]
    assert not untold
    page = (ROOT / "docs" / "spec.md").read_text()
    assert all(f"| `{path.rpartition('.')[2].rstrip('_')}` |" in page for path, _ in fields(JobSpec))


def test_links_of_the_reference_lead_somewhere() -> None:
    page = (ROOT / "docs" / "spec.md").read_text()
    headings = {line.removeprefix("## ").replace(".", "") for line in page.splitlines() if line.startswith("## ")}
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert links
    assert links <= headings


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page.read_text()))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("job", sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__"))
def test_a_job_has_a_page_with_its_picture(job: str) -> None:
    home = ROOT / "docs" / "jobs"
    assert f"]({job}.png)" in (home / f"{job}.md").read_text()
    assert f"]({job}.md)" in (home / "README.md").read_text()


def code_of(page: Path) -> Iterator[str]:
    """Pieces of code on a page: fenced and indented blocks line by line, and spans."""
    text = page.read_text()
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = prose(text)
    for block in fenced:
        yield from block.replace("\\\n", " ").splitlines()
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    houses = "|".join(HOUSES)
    named = {
        path.rstrip("./,:")
        for code in code_of(page)
        for path in re.findall(rf"(?<![\w./-])(?:{houses})/[\w./*<>-]+", code)
    }
    missing = [path for path in sorted(named) if not re.search(r"[*<>]", path) and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in code_of(page):
        for name in re.findall(r"python3? -m ([\w.]+)", code):
            assert name in sys.stdlib_module_names or importlib.util.find_spec(name), f"{page.name}: python -m {name}"
        for name in re.findall(r"(?:^|[^\w-])make ([a-z-]+)", code):
            assert name in targets, f"{page.name}: make {name}"


# ---- the command line ----


def commands() -> dict[tuple[str, ...], set[str]]:
    """Each verb, and the options that it has."""
    return dict(_commands(typer.main.get_command(cli.app), ()))


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    yield path, options | {"--help"}
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))


def calls(code: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The verbs that a piece of code calls, and the options that it gives them; "status|stop" is both."""
    for call in re.findall(r"(?:^|[\s`(;&|])dltrain ((?:[a-z0-9][a-z0-9|-]*)(?: [^`#;&]*)?)", code):
        words = call.split(" | ")[0].split()
        if words[0] == "import":
            continue
        groups = [words[0].split("|")]
        if words[0] in ("checkpoint", "data") and len(words) > 1:
            groups.append(words[1].split("|"))
        options = [w.split("=")[0].strip("[],.") for w in words if w.startswith("--") and len(w) > 2]
        for first in groups[0]:
            for second in groups[1] if len(groups) > 1 else [""]:
                yield tuple(w for w in (first, second) if w), options


def test_calls_are_seen() -> None:
    assert list(calls("dltrain status|stop RUN --json  # --no")) == [(("status",), ["--json"]), (("stop",), ["--json"])]
    assert list(calls("dltrain data inspect URL --workers=3")) == [(("data", "inspect"), ["--workers"])]
    assert list(calls("exec dltrain k8s job.yaml --image IMG | kubectl apply -f -")) == [(("k8s",), ["--image"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_verbs_and_options_that_are_named_exist(page: Path) -> None:
    known = commands()
    for code in code_of(page):
        for verb, options in calls(code):
            assert verb in known, f"{page.name}: dltrain {' '.join(verb)}, in: {code}"
            unknown = [option for option in options if option not in known[verb]]
            assert not unknown, f"{page.name}: dltrain {' '.join(verb)} has no {unknown[0]}, in: {code}"


def test_a_verb_that_is_not_there_is_seen() -> None:
    assert ("doctor",) in commands()
    assert "--address" in commands()[("doctor",)]
    assert ("docter",) not in commands()


# ---- examples ----

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_on_a_page(path: Path) -> None:
    code = path.read_text()
    if path.name == "digits_task.py":
        # It is the right side of a difference.
        assert path.name in (ROOT / "docs" / "from_pytorch.py").read_text()
    else:
        assert any(f"```python\n{code}```" in page.read_text() for page in DOCS)


def test_the_example_spec() -> None:
    spec = parse_spec(yaml.safe_load((ROOT / "docs" / "examples" / "digits.yaml").read_text()))
    assert spec.task == "digits_task.py:Digits"
