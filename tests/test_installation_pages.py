"""The pages on installation and on environment variables are in step with pyproject.toml and the source."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = re.compile(
    r"\b(?:HYBRIDFLOW|OMP|MKL|HF|TOKENIZERS|TRANSFORMERS|NCCL|GLOO|HCCL|PYTORCH|TORCHDYNAMO|TORCHELASTIC|VLLM|SGLANG|RAY"
    r"|WANDB|CUDA|HIP|ASCEND|CUBLAS|OPENAI|LD)_[A-Z0-9_]*[A-Z0-9]\b|\b(?:TMPDIR|PYTHONPATH|PYTHONHASHSEED)\b"
)


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def variables(path: Path) -> Iterator[str]:
    """What a file reads from the environment by name, and every name of a known family in its strings."""
    text = path.read_text(encoding="utf-8")
    if "environ" not in text and "getenv" not in text and not FAMILIES.search(text):
        return
    tree = ast.parse(text)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from FAMILIES.findall(node.value)
        names: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            names = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environ(node.func.value):
            names = node.args[:1]
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            names = [node.left]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getenv":
            names = node.args[:1]
        for name in names:
            value = constants.get(name.id) if isinstance(name, ast.Name) else getattr(name, "value", None)
            if isinstance(value, str):
                yield value


def test_every_variable_of_the_source_is_on_the_page_and_no_other() -> None:
    page = (ROOT / "docs/environment-variables.md").read_text(encoding="utf-8")
    own, libraries = page.split("\n## What libraries read\n")
    told, elsewhere = (
        {name for row in re.findall(r"^\| (`[^|]*) \|", part, re.M) for name in re.findall(r"`(\w+)`", row)}
        for part in (own, libraries)
    )
    known = {name for path in (ROOT / "src").rglob("*.py") for name in variables(path)}
    assert {"HYBRIDFLOW_FAULT", "RANK", "OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE"} <= known
    assert known - told - elsewhere == set()
    assert told - known == set()


def test_the_extras_and_their_versions_are_those_of_the_project() -> None:
    page = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = {
        name: set(re.findall("`([^`]+)`", needs)) for name, needs in re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.M)
    }
    extras = {name: set(needs) for name, needs in project["optional-dependencies"].items()}
    assert rows.keys() == extras.keys()
    assert {name: needs for name, needs in rows.items() if name != "dev"} == {
        name: needs for name, needs in extras.items() if name != "dev"
    }
    assert all(f"`{requirement}`" in page for requirement in project["dependencies"])
