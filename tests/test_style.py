"""What no formatter checks: sizes of files and functions, names of classes, docstrings, legends of shapes, plain ASCII,
and nothing of one machine in the text.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
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


@cache
def module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parsed(*folders: str) -> dict[Path, ast.Module]:
    return {path: module(path) for path in python_files(*folders)}


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
    for path, module in parsed(*SOURCES).items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LINES_PER_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def test_a_class_name_occurs_once() -> None:
    found = defaultdict(list)
    for path, module in parsed("src").items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path.name)
    assert len(found) > 200
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def base_names(node: ast.ClassDef) -> set[str]:
    """The names of its bases, without what they are subscripted with."""
    plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in plain}


def functions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    return [part for part in node.body if isinstance(part, ast.FunctionDef)]


def test_a_docstring_refers_only_to_what_it_implements() -> None:
    """ "See `Base.method`" is for a method of that name, in a class under that base or one that keeps that protocol."""
    classes = {
        node.name: node
        for module in parsed("src").values()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }

    def bases(name: str) -> set[str]:
        found = base_names(classes[name]) if name in classes else set()
        return found.union(*map(bases, found))

    def implements(name: str, function: ast.FunctionDef, said: str) -> bool:
        match = re.match(r"See `(?:[a-z_]+\.)*(\w+)\.(\w+)`", said)
        if match is None or match[2] != function.name or match[1] not in classes:
            return False
        declared = {
            f.name for known in {match[1], *bases(match[1])} & classes.keys() for f in functions(classes[known])
        }
        return function.name in declared and (match[1] in bases(name) or "Protocol" in base_names(classes[match[1]]))

    def said(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
        return ast.get_docstring(node) or ""

    refers = [name for name, node in classes.items() if said(node).startswith("See ")]
    refers += [f.name for module in parsed("src").values() for f in functions(module) if said(f).startswith("See ")]
    for name, node in classes.items():
        for f in functions(node):
            if said(f).startswith("See ") and not implements(name, f, said(f)):
                refers.append(f"{name}.{f.name}: {said(f).splitlines()[0]}")
    assert refers == []


SHAPED = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)")


def names(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def test_letters_of_shapes_are_explained_at_the_head_of_the_file() -> None:
    lacking, files = {}, 0
    for path, module in parsed("src").items():
        shapes = {match[1] for name in names(module) if (match := SHAPED.fullmatch(name))} - {"MB"}
        letters = {letter for shape in shapes for letter in shape if letter.isalpha()}
        head = ast.get_docstring(module) or ""
        unknown = {letter for letter in letters if not re.search(rf"(?<![A-Za-z_]){letter}(?![A-Za-z_])", head)}
        files += bool(letters)
        if unknown:
            lacking[str(path.relative_to(ROOT))] = "".join(sorted(unknown))
    assert files > 60
    assert lacking == {}


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
