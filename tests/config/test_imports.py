"""A user's file imports what lies beside it, wherever it is loaded from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hybridflow.config.locate import load_function
from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.pool.grader import ProcessGrader

HERE = {
    "helper.py": "WHERE = '{mark}'\nimport second\ndef f():\n    import third\n    return WHERE + second.TWO + third.THREE",  # noqa: E501
    "second.py": "TWO = '2{mark}'",
    "third.py": "THREE = '3{mark}'",
    "pack/__init__.py": "from .inner import deep\nimport second",
    "pack/inner.py": "def deep():\n    from helper import WHERE\n    return WHERE",
    "parts/leaf.py": "LEAF = 'leaf{mark}'",
    "json.py": "raise RuntimeError('Python has its own json')",
    "datasets/rows.jsonl": "",
}


def folder(path: Path, mark: str, **files: str) -> Path:
    for name, text in {**HERE, **files}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text.replace("{mark}", mark))
    return path


IMPORTS = {
    "from": "from helper import f\ndef score(response): return f()",
    "plain": "import helper\ndef score(response): return helper.f()",
    "as": "import helper as h\ndef score(response): return h.f()",
    "late": "def score(response):\n    from helper import f\n    return f()",
    "star": "from helper import *\ndef score(response): return f()",
    "relative": "from .helper import f\ndef score(response): return f()",
    "own path": "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\nfrom helper import f\n"
    "sys.path.pop(0)\ndef score(response): return f()",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(IMPORTS))
def test_the_same_names_in_two_folders_stay_apart(kind: str, tmp_path: Path) -> None:
    path = list(sys.path)
    found = []
    for mark in "ab":
        place = folder(tmp_path / f"a folder {mark} caf\u00e9", mark, **{"mine.py": IMPORTS[kind]})
        found.append(load_function(f"{place}/mine.py:score"))
    assert [f("x") for f in [*found, *found]] == ["a2a3a", "b2b3b"] * 2
    assert sys.path == path and "helper" not in sys.modules


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("from pack import deep\ndef score(): return deep()", "a"),
        ("import pack.inner\ndef score(): return pack.inner.deep()", "a"),
        ("import pack.inner as inner\ndef score(): return inner.deep()", "a"),
        ("from parts.leaf import LEAF\ndef score(): return LEAF", "leafa"),
        ("import parts.leaf\ndef score(): return parts.leaf.LEAF", "leafa"),
        ("import json\ndef score(): return json.dumps(1)", "1"),
        ("import torch.nn.functional as F\ndef score(): return F.__name__", "torch.nn.functional"),
        ("import datasets\ndef score(): return str(hasattr(datasets, 'Dataset'))", "True"),
        ("from second import TWO\nfrom helper import second\ndef score(): return TWO + second.TWO", "2a2a"),
        ("import importlib\ndef score(): return importlib.import_module('.second', __package__).TWO", "2a"),
    ],
)
def test_what_an_import_means(source: str, value: str, tmp_path: Path) -> None:
    assert load_function(f"{folder(tmp_path, 'a', **{'mine.py': source})}/mine.py:score")() == value


def test_a_file_called_like_a_package_can_use_the_package(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("import yaml\ndef score(): return yaml.safe_dump(1)")
    assert load_function(f"{tmp_path}/yaml.py:score")().startswith("1")


def test_a_mistake_in_what_is_imported_is_told_with_its_line(tmp_path: Path) -> None:
    for text, said in [
        ("x = 1\n1 / 0", f"ZeroDivisionError: division by zero ({tmp_path}/broken.py, line 2, in <module>: 1 / 0)"),
        ("x = (", f"SyntaxError: '(' was never closed (broken.py, line 1) ({tmp_path}/broken.py, line 1: x = ()"),
        ("import nowhere_else", "ModuleNotFoundError: No module named 'nowhere_else'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ]:
        place = folder(tmp_path, "a", **{"mine.py": "import broken\ndef score(): return 1", "broken.py": text})
        with pytest.raises(UserError) as caught:
            load_function(f"{place}/mine.py:score")
        assert said in str(caught.value)
        assert f"{place}/mine.py cannot be imported (for {place}/mine.py:score)" in str(caught.value)


def test_reward_processes_import_the_same(tmp_path: Path) -> None:
    """Two folders in one process, with arguments that are the folders' own."""
    functions = {}
    for mark in "ab":
        source = (
            "from helper import WHERE\ndef score(response):\n    import third\n    return ord(WHERE) + len(third.THREE)"
        )
        place = folder(tmp_path / mark, mark, **{"mine.py": source})
        functions[mark] = FunctionSpec(f"{place}/mine.py:score")
    grader = ProcessGrader(functions, RewardPoolSection(processes=1))
    try:
        for key, mark in enumerate("ab"):
            grader.submit(key, Answers(["x"], None, [], {}), mark)
        found = {}
        while len(found) < 2:
            found.update({key: scores[0].value for key, scores in grader.wait()})
        assert found == {0: ord("a") + 2, 1: ord("b") + 2}
    finally:
        grader.close()
