"""Lets SGLang run on a CPU without its GPU kernels: stand-ins for two packages that it imports and never calls there.

`sgl_kernel` has no build for a CPU on the package index, and `torchvision` comes as a GPU build; text models on a CPU
need neither. Modules of SGLang that import them get modules whose every name is a class that cannot be used; all other
code still finds that the packages are missing, and a package that is installed takes precedence.

scripts/install-sglang-cpu.sh copies this file into the environment, and a .pth file beside it loads it at the start of
every Python there: SGLang's schedulers are processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("sgl_kernel", "torchvision")
IMPORTERS = ("sglang", *PACKAGES)  # a stand-in imports others of its package


class _Unusable(type):
    """The class of all names in a stand-in: good for annotations, base classes and decorators that are not called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__name__} was called, and is not installed: this is a CPU environment"
        )


class _StandIn(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Unusable(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES or _importer() not in IMPORTERS:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: there is no code to run."""


def _importer() -> str:
    """Returns the top package of the module whose code imports something."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0]


sys.meta_path.append(_Finder())
