"""The public names of `import hybridflow as hf`: what they are, their signatures, and the page that describes them.

The snapshot is rewritten by ``python tests/test_public_names.py > tests/public_names.txt``.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hybridflow as hf

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/python.md"


def signatures() -> str:
    """Every public name with its signature, one a line."""
    lines = []
    for name in sorted(set(hf.__all__) - {"__version__"}):
        signature = inspect.signature(getattr(hf, name))
        text = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(signature))  # annotations without their quotes
        text = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", text)
        if name == "RlConfig":  # its sections alone: their defaults are on the page of keys
            text = f"({', '.join(signature.parameters)})"
        lines.append(name + text)
    return "\n".join(lines) + "\n"


def test_the_public_names_and_their_signatures_are_as_they_were() -> None:
    assert signatures() == (TESTS / "public_names.txt").read_text(), (
        "python tests/test_public_names.py > tests/public_names.txt"
    )


def test_the_stub_says_where_each_name_lives() -> None:
    stub = ast.parse((Path(hf.__file__).parent / "__init__.pyi").read_text())
    said = {n.names[0].name: n.module for n in stub.body if isinstance(n, ast.ImportFrom)}
    assert said == hf._HOMES | {"UserError": "hybridflow.errors"}


def test_importing_the_package_is_light_and_a_wrong_name_is_told_the_nearest() -> None:
    code = "import sys, hybridflow; print(*dir(hybridflow)); print(*sys.modules)"
    names, modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert set(hf.__all__) <= set(names.split())
    assert {"torch", "pydantic", "yaml"} & set(modules.split()) == set()
    with pytest.raises(AttributeError, match="did you mean 'load_config'"):
        hf.load_conf  # type: ignore[attr-defined]  # noqa: B018


def test_the_page_has_a_sentence_for_every_public_name() -> None:
    described = re.findall(r"^\| `(\w+)` \| [A-Z].*\. \|$", PAGE.read_text().partition("## The public names")[2], re.M)
    assert sorted(described) == sorted(hf.__all__)


if __name__ == "__main__":
    print(signatures(), end="")
