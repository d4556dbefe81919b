"""The base of all sections of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

HERE = "{here}"  # in the message of a section that stands in several places: the name of its own


class Section(BaseModel):
    """A section: unknown keys are errors, numbers are finite, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
