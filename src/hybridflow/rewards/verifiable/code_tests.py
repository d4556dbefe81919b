"""Tests that are Python text: whether they can tell a right program from a wrong one, before any program runs.

No part of a test is executed here. Its scopes show which names it would look up outside itself (symtable); functions
that nothing names are not counted, as nothing calls them.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Iterator

from hybridflow.errors import UserError

# MBPP's tests use these without an import. They are then the test's, even if the program defines such a name.
MODULES = "bisect collections copy datetime functools heapq itertools json math operator random re string sys time"
_FIX = "write assert statements that call the function that the program is to define, such as assert f(1) == 2"


def whole_test(test: str, entry_point: str | None) -> str:
    r"""Returns the test as it is run: with the call that HumanEval's tests leave to the harness.

    >>> whole_test("def check(candidate):\n    assert candidate(1) == 2", "f").splitlines()[-1]
    'check(f)'

    Args:
        test: Python text.
        entry_point: the function that is tested, where the row says it.

    Raises:
        UserError: the test can never fail, or never pass, whatever the program is.
    """
    if entry_point is not None and not entry_point.isidentifier():
        raise UserError(f"the entry point {entry_point!r} is not the name of a function", fix="give its name alone")
    try:
        reached = _Reached(test)
        if "check" in reached.never_called and entry_point is not None:
            test = f"{test.rstrip()}\n\ncheck({entry_point})\n"
            reached = _Reached(test)
    except (SyntaxError, ValueError) as error:
        raise _refusal(test, f"it is not Python ({error})", "mend its text, or leave the row out") from error
    if reached.modules and "__future__" not in test:
        test = f"import {', '.join(sorted(reached.modules))}\n{test}"
        reached = _Reached(test)
    if "check" in reached.never_called:
        raise _refusal(
            test,
            "it defines check and never calls it, so every program would pass",
            "give the row a column entry_point with the name of the function, as HumanEval has it, or write "
            "check(NAME) at the end of the test",
        )
    if reached.missing is not None:
        raise _refusal(
            test,
            f"it imports {reached.missing!r}, and the sandbox has Python's standard library alone: no program passes",
            "write the test without it, or leave the row out",
        )
    if not reached.asserts:
        idle = (
            f"nothing calls {', '.join(sorted(reached.never_called))}" if reached.never_called else "it asserts nothing"
        )
        raise _refusal(test, f"{idle}, so every program would pass", _FIX)
    if not reached.free:
        raise _refusal(test, "it uses nothing of the program, so it says nothing about it", _FIX)
    if entry_point is not None and "check" in reached.defined and entry_point not in reached.free:
        raise _refusal(test, f"it never calls the entry point {entry_point!r}", _FIX)
    return test


def _refusal(test: str, why: str, fix: str) -> UserError:
    text = " ".join(test.split())
    shown = repr(text if len(text) <= 100 else text[:100] + "...")
    return UserError(f"the reward 'code' finds no test case in {shown}: {why}", fix=fix)


class _Reached:
    """The names and modules that a running test reaches.

    Attributes:
        free: the names that it uses and does not define.
        modules: those of `MODULES` of which it uses something, such as math.isclose, without importing them.
        missing: a module that it imports and that does not exist.
        asserts: whether anything in it can make it fail.
        defined: its functions.
        never_called: those that nothing names.
    """

    def __init__(self, test: str) -> None:
        tree, top = ast.parse(test), symtable.symtable(test, "test", "exec")
        self._own = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
        reached, waiting, used = {top.get_id()}, [top], set[str]()
        tables = list(_below(top))
        while waiting:
            table = waiting.pop()
            used |= {s.get_name() for s in table.get_symbols() if s.is_referenced()}
            for other, parent in tables:
                # Functions and methods run if something names them or their class; other statements run in their place.
                named = other.get_name() in used or (_is_method(parent) and parent.get_name() in used)
                if other.get_id() not in reached and parent.get_id() in reached and (named or not _is_named(other)):
                    reached.add(other.get_id())
                    waiting.append(other)
        self.free = {
            s.get_name()
            for table in (top, *(t for t, _ in tables if t.get_id() in reached))
            for s in table.get_symbols()
            if s.is_referenced() and (s.is_global() or table is top) and s.get_name() not in self._own
        } - {name for name in dir(builtins) if name.startswith("__")}
        self.defined = {t.get_name() for t, _ in tables if _is_named(t)}
        asleep = {(t.get_name(), t.get_lineno()) for t, _ in tables if t.get_id() not in reached}
        self.never_called = {name for name, _ in asleep}
        awake = list(_awake(tree, asleep))
        self.free -= {name for name in self.free & set(dir(builtins)) if not _is_needed(name, awake)}
        attributes = (node for node in awake if isinstance(node, ast.Attribute))
        bases = {node.value.id for node in attributes if isinstance(node.value, ast.Name)}
        self.modules = bases & self.free & set(MODULES.split())
        caught = {id(node) for one in awake if isinstance(one, ast.Try) and _is_quiet(one) for node in _own_nodes(one)}
        self.asserts = any(_asserts(node) for node in awake if id(node) not in caught)
        self.missing = next((name for name in _imports(tree) if name not in sys.stdlib_module_names), None)


def _below(table: symtable.SymbolTable) -> Iterator[tuple[symtable.SymbolTable, symtable.SymbolTable]]:
    """Yields every scope inside a scope, with the scope around it."""
    for child in table.get_children():
        yield child, table
        yield from _below(child)


def _is_named(table: symtable.SymbolTable) -> bool:
    return table.get_type() == "function" and table.get_name().isidentifier() and table.get_name() not in _INLINE


_INLINE = ("lambda", "genexpr", "listcomp", "setcomp", "dictcomp")


def _is_method(parent: symtable.SymbolTable) -> bool:
    return parent.get_type() == "class"


def _awake(node: ast.AST, asleep: set[tuple[str, int]]) -> Iterator[ast.AST]:
    """Yields every node except those inside functions that nothing calls."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (child.name, child.lineno) in asleep:
            continue
        yield child
        yield from _awake(child, asleep)


def _is_needed(name: str, nodes: list[ast.AST]) -> bool:
    """Returns whether anything uses the value of a name: print(1) does not require that the program defines print."""
    loads = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
    calls = (node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    return loads > sum(isinstance(call.func, ast.Name) and call.func.id == name for call in calls)


def _asserts(node: ast.AST) -> bool:
    """Returns whether this can make a test fail: an assertion, an exception that is raised or expected, or
    self.assertEqual.
    """
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name.lower().startswith("assert")
    if isinstance(node, ast.Assert):  # a tuple or a function is true whatever is in it: assert (f(1) == 2, "wrong")
        always = (isinstance(node.test, ast.Tuple) and bool(node.test.elts)) or isinstance(node.test, ast.Lambda)
        return not always
    return isinstance(node, ast.Raise | ast.Try)


def _own_nodes(caught: ast.Try) -> Iterator[ast.AST]:
    """Yields a try statement and everything that it would catch from."""
    yield caught
    for statement in caught.body:
        yield from ast.walk(statement)


def _is_quiet(node: ast.Try) -> bool:
    """Returns whether a try statement catches failed assertions, and at most prints then."""
    for handler in node.handlers:
        named = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {one.id if isinstance(one, ast.Name) else None for one in named if one is not None}
        if handler.type is None or names & {"AssertionError", "Exception", "BaseException"}:
            return all(_says_nothing(statement) for statement in handler.body)
    return False


def _says_nothing(node: ast.stmt) -> bool:
    """Returns whether a statement has no effect: pass, continue, a text, or print(...)."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return isinstance(node.value.func, ast.Name) and node.value.func.id == "print"
    return isinstance(node, ast.Pass | ast.Continue) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _imports(node: ast.AST) -> Iterator[str]:
    """Yields the modules that a test needs: not those that it only tries to import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").split(".")[0]
        else:
            yield from _imports(child)
