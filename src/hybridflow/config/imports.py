"""Imports a file of the user's, and the files that it imports from the same folder, as if it were run as a program.

``import helper`` in a file means the ``helper.py`` (or the package) beside it, from any current folder and in any
process, unless Python itself has a module of that name. Every folder is a package of its own, so files of one name in
two folders stay apart, and an import in one file changes none in another.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridflow.errors import UserError, raised

_FOLDERS: dict[str, Path] = {}  # of users' files, by the packages that stand for them


def import_file(path: Path, reference: str) -> ModuleType:
    """Returns the module in a file; the file runs once per process.

    Args:
        path: absolute.
        reference: how the user named it, for messages.

    Raises:
        UserError: it raises.
    """
    package = _package_of(path.parent)
    name = f"{package}.{path.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported (for {reference}): {raised(error)}") from error
    return module


def user_folders() -> list[Path]:
    """Returns the folders of users' files that this process has imported from."""
    return list(_FOLDERS.values())


def know(folders: Iterable[Path]) -> None:
    """Makes objects of modules in these folders, which another process has imported, importable here too."""
    for folder in folders:
        _package_of(folder)


def _package_of(folder: Path) -> str:
    package = f"_hybridflow_user_{hashlib.sha1(os.fsencode(folder)).hexdigest()[:12]}"
    if package not in _FOLDERS:
        if not _FOLDERS:
            sys.meta_path.insert(0, _Finder())
        _FOLDERS[package] = folder
        sys.modules[package] = module = ModuleType(package)
        module.__path__ = [str(folder)]
    return package


class _Finder:
    """Finds the modules of these packages, so that what they import is looked up as in the first file."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns a loader for a module of these packages, and leaves all others to Python."""
        if name.partition(".")[0] not in _FOLDERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a file whose imports are looked up beside it first."""

    def exec_module(self, module: ModuleType) -> None:
        """Runs the file with an import statement that knows its folder."""
        package = module.__name__.partition(".")[0]

        def load(
            name: str,
            globals: Mapping[str, Any] | None = None,
            locals: Mapping[str, Any] | None = None,
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            first = name.partition(".")[0]
            if level or not _is_beside(first, _FOLDERS[package], module):
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            if fromlist:
                return builtins.__import__(f"{package}.{name}", globals, locals, fromlist)
            importlib.import_module(f"{package}.{name}")
            return sys.modules[f"{package}.{first}"]

        vars(module)["__builtins__"] = vars(builtins) | {"__import__": load}
        super().exec_module(module)


def _is_beside(name: str, folder: Path, importing: ModuleType) -> bool:
    """Returns whether an import of this name in a file of the folder means a file in the folder."""
    if name in sys.stdlib_module_names:
        return False
    for file in (folder / f"{name}.py", folder / name / "__init__.py"):
        if file.is_file():
            known = sys.modules.get(name)  # on sys.path too: a module must not run twice
            return str(file) not in (getattr(importing, "__file__", ""), getattr(known, "__file__", ""))
    # A folder without code of its own (data, perhaps) does not hide what is installed.
    return name not in sys.modules and (folder / name).is_dir() and importlib.util.find_spec(name) is None
