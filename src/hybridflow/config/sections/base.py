"""The base of all sections of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

HERE = "{here}"  # in the message of a section that occurs in several places: the name of its own place


class Section(BaseModel):
    """A section: unknown keys are errors, numbers are finite, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def settled(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the plain values of such a section without those that have no effect beside the others."""
        return dict(values)

    @classmethod
    def taken_by(cls, key: str) -> str:
        """Describes what a key is for, where other keys of the section decide whether it has an effect; else empty."""
        return ""


def either(words: Sequence[str]) -> str:
    """Joins words to choose from for a sentence; empty for none.

    >>> either(["local", "fsdp2", "fsdp1"])
    'local, fsdp2 or fsdp1'
    """
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
