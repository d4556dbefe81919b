"""Sections for a part of the run that inherit the values of another section, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from hybridflow.config.sections.choices import words
from hybridflow.config.sections.engine import EngineSection

# The section, and the one that it inherits from.
INHERITS = {
    "critic.optim": "optim",
    "critic.engine": "engine",
    "model.reference_engine": "engine",
    "reward.model.engine": "engine",
}
# The keys of an engine section, by its strategy.
STRATEGIES = {
    word: kind.model_fields
    for kind in get_args(get_args(EngineSection)[0])
    for word in words(kind.model_fields["strategy"])
}


def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a configuration, with keys that these sections leave out filled in; a section that is not
    given stays out.

    >>> inherited({"optim": {"lr": 1e-4}, "critic": {"optim": {"warmup_steps": 5}}})["critic"]
    {'optim': {'lr': 0.0001, 'warmup_steps': 5}}
    """
    filled = dict(values)
    for path, source in INHERITS.items():
        if isinstance(given := values.get(source), Mapping):
            filled = _fill(filled, path.split("."), given)
    return filled


def _fill(values: Mapping[str, Any], path: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    first, *rest = path
    own = values.get(first)
    if not isinstance(own, Mapping):
        return dict(values)
    return {**values, first: _fill(own, rest, given) if rest else {**_fitting(given, own), **own}}


def _fitting(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a section that fits beside another section's own values: an engine's keys exclude each other
    in places.
    """
    strategy, offload = own.get("strategy", given.get("strategy")), own.get("offload")
    known = STRATEGIES.get(strategy, given) if isinstance(strategy, str) else given
    fitting = {key: value for key, value in given.items() if key in known}
    if isinstance(offload, list) and "parameters" in offload:
        fitting.pop("cpu_offload", None)
    if own.get("cpu_offload") and isinstance(given.get("offload"), list):
        fitting["offload"] = [what for what in given["offload"] if what != "parameters"]
    return fitting
