"""Which of the packages that hybridflow requires are not installed."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement


def missing_requirements() -> list[str]:
    """Returns the requirements that no installed package meets, as pip takes them; extras are left out."""
    try:
        lines = importlib.metadata.requires("hybridflow") or []
    except importlib.metadata.PackageNotFoundError:  # the source alone, on the import path
        return []
    wanted = [Requirement(line) for line in lines]
    return [str(one) for one in wanted if one.marker is None and not _installed(one.name)]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
