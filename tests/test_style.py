"""What no formatter checks: sizes of files and functions, plain ASCII, and nothing of one machine in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES_PER_FILE = 600
LINES_PER_FUNCTION = 80
SOURCES = ("src", "recipes", "benchmarks")
TEXTS = (*SOURCES, "tests", "docs", "scripts", ".ci")
ENDINGS = (".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".html", ".json", "")

# Hosts of package registries, and folders of one machine. Written so that this file does not match itself.
FORBIDDEN = re.compile(r"pypi\.org|pythonhosted\.(?:org)|download\.(?:pytorch)|[\"'\s=(](?:/work|/root|/home)/")


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def texts() -> Iterator[Path]:
    for folder in TEXTS:
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in ENDINGS)
    of_git = ROOT / ".git"  # in a worktree it is a file, which names the folder of the repository
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix in ENDINGS and p != of_git)


def test_no_file_is_long() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in python_files(*SOURCES, "tests")}
    assert len(lengths) > 60
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > LINES_PER_FILE} == {}


def test_no_function_is_long() -> None:
    long = {}
    for path in python_files(*SOURCES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LINES_PER_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def test_source_is_ascii() -> None:
    files = [p for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".html")]
    assert len(files) > 60
    assert [str(p.relative_to(ROOT)) for p in files if not p.read_bytes().isascii()] == []


def test_nothing_names_a_registry_or_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("index = 'https://py" + "pi.org/simple'", True),
        ("see /wo" + "rk/main", True),
        ("rollouts/work/x", False),
        ("a Python package", False),
    ],
)
def test_the_pattern_finds_what_it_should(text: str, forbidden: bool) -> None:
    assert bool(FORBIDDEN.search(text)) == forbidden
