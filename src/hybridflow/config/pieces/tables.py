"""The needs of each built-in piece of an algorithm, so that wrong combinations are refused without torch.

They come from the registries in `algorithms/` and the signatures of their functions, which are read, not imported.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from hybridflow.config.pieces.needs import Needs, needs_from, needs_of, signature_of

ROOT = Path(__file__).parents[3]  # of the package
ALGORITHMS = ROOT / "hybridflow/algorithms"


def _registry(file: Path, name: str) -> dict[str, str]:
    """Returns the functions of a registry, as ``file.py:function``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    files = {
        alias.name: ROOT / f"{(node.module or '').replace('.', '/')}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    registry = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name)
    assert isinstance(registry, ast.Dict)
    functions = [ast.unparse(value) for value in registry.values]
    keys = [ast.literal_eval(key) for key in registry.keys if key is not None]
    return {key: f"{files.get(function, file)}:{function}" for key, function in zip(keys, functions, strict=True)}


def _needs(file: str, name: str) -> dict[str, Needs]:
    found = _registry(ALGORITHMS / file, name)
    return {piece: needs_from(*signature_of(reference)) for piece, reference in found.items()}


ADVANTAGES = _needs("advantage/registry.py", "ADVANTAGES")
AGGREGATIONS = _needs("aggregation.py", "AGGREGATIONS")
KL_ESTIMATORS = tuple(_registry(ALGORITHMS / "kl.py", "KL_ESTIMATORS"))

# The values of the functions that make a loss's columns from the whole mini-batch; they count as the loss's own.
STATISTICS = {name: needs.values for name, needs in _needs("policy_loss/registry.py", "STATISTICS").items()}

# What no signature shows: losses of responses without an advantage, which may not be left out, and the only
# aggregations that a loss has a meaning in.
EVERY_ANSWER = ("kl_cov", "dro", "sppo")
MODES = {"sppo": ("seq-mean-token-mean",)}
POLICY_LOSSES = {
    name: replace(needs, statistics=name in STATISTICS, every_answer=name in EVERY_ANSWER, modes=MODES.get(name, ()))
    for name, needs in _needs("policy_loss/registry.py", "POLICY_LOSSES").items()
}


def _users() -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    own = {name: (*needs.values, *STATISTICS.get(name, ())) for name, needs in POLICY_LOSSES.items()}
    for piece, values in [*((name, needs.values) for name, needs in ADVANTAGES.items()), *own.items()]:
        for value in values:
            found.setdefault(value, {})[piece] = None
    return {value: tuple(pieces) for value, pieces in found.items()}


USERS = _users()  # of each value, the pieces that take it


def values_taken(advantage: str, policy_loss: str, aggregation: str) -> set[str]:
    """Returns the values that these pieces take: keys of the algorithm section, or of its ``values``.

    Raises:
        ValueError: see `needs_of`.
    """
    pieces = (advantage, ADVANTAGES), (policy_loss, POLICY_LOSSES), (aggregation, AGGREGATIONS)
    taken = {value for name, table in pieces for value in needs_of(name, table).values}
    return taken.union(STATISTICS.get(policy_loss, ())) - {"norm"}  # the run provides the norm of an aggregation
