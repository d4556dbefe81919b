"""What no formatter checks: sizes of files and functions, names of classes, docstrings and their words, legends of
shapes, plain ASCII, and nothing of one machine in the text.
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


# Words in s that are no verbs. Of those that can be both, "Names of ..." is none.
NOUNS = (
    "Always|Arguments|As|Bytes|Coefficients|Columns|Digits|Gradients|Groups|Ids|Indices|Its|Lengths|Lines|Logits|Messages|"
    "Numbers|Options|Parameters|Responses|Results|Rewards|Rows|Seconds|Statistics|Status|This|Tokens|Values|Variables|Words"
)
VERB = re.compile(rf"(?!(?:{NOUNS})\b)[A-Z][a-z]*[a-rt-z]s\b(?! of\b)")


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).split(".")[-1] in ("property", "cached_property") for d in function.decorator_list)


def test_a_docstring_of_a_function_begins_with_its_verb() -> None:
    """A verb in the third person; "See `Base.method`" stands for another docstring, and a property may be a noun."""
    functions = [
        (path, node, ast.get_docstring(node) or "")
        for path, module in parsed(*SOURCES, "scripts").items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node)
    ]
    described = [(path, node, text) for path, node, text in functions if text and not text.startswith("See ")]
    assert len(described) > 1500
    assert [
        f"{path.relative_to(ROOT)}:{node.name}: {text.splitlines()[0]}"
        for path, node, text in described
        if not VERB.match(text)
    ] == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Returns the tokens.", True),
        ("Undoes it.", True),
        ("Names the key.", True),
        ("Names of the keys.", False),
        ("The tokens.", False),
        ("Tokens of the batch.", False),
        ("Whether it is so.", False),
        ("Loss of each token.", False),
        ("What is left.", False),
    ],
)
def test_a_verb_is_known_from_a_noun(text: str, right: bool) -> None:
    assert bool(VERB.match(text)) == right


# What the field calls continue or resume, report, compare, "this many", in flight.
PHRASES = re.compile(
    r"\b(?:(?:go|goes|going|gone|went) on|(?:is|are|was|were|be|been) told(?! apart)|told of|somebody|looked at|"
    r"under way|so (?:many|much)|held against|an eye on|what the models? says?|what there is to|so that nobody|"
    r"of one go)\b",
    re.IGNORECASE,
)


def test_the_source_and_the_pages_speak_the_words_of_the_field() -> None:
    pages = [*ROOT.glob("[RC]*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
    pages = [page for page in pages if page.name != "CHANGELOG.md"]
    assert [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in [*python_files(*SOURCES, "scripts"), *pages, ROOT / "benchmarks/README.md"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := PHRASES.search(line))
    ] == []


SHAPED = re.compile(r"_?[a-z][a-z0-9_]*_([a-z]?[A-Z][A-Za-z0-9]*)")
LEGEND = re.compile(r"Shapes:\s.*?(?=\n\n|\Z)", re.DOTALL)


def names(module: ast.Module) -> Iterator[str]:
    """The names of tensors, and those of columns, which are strings."""
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_letters_of_shapes_are_explained_at_the_head_of_the_file() -> None:
    lacking, files = {}, 0
    for path, module in parsed("src").items():
        shapes = {match[1] for name in names(module) if (match := SHAPED.fullmatch(name))} - {"MB"}
        letters = {letter for shape in shapes for letter in shape if letter.isalpha()}
        legend = LEGEND.search(ast.get_docstring(module) or "")
        said = legend[0] if legend else ""
        unknown = {letter for letter in letters if not re.search(rf"(?<![A-Za-z_]){letter}(?![A-Za-z_])", said)}
        files += bool(letters)
        if unknown:
            lacking[str(path.relative_to(ROOT))] = "".join(sorted(unknown))
    assert files > 80
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
