"""A commented configuration to begin with: `hybridflow init`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.load import validate
from hybridflow.config.overrides import apply_override
from hybridflow.config.pages.explain import as_yaml
from hybridflow.config.paths import home
from hybridflow.errors import UserError, typed

WIDTH = 100


def _limits(model: str, begin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns lengths that fit the model's context, where its folder states that: half for the prompt, half for the
    response.
    """
    for folder in (home(model), home(model) / "model"):
        with suppress(OSError, ValueError, AttributeError):  # `hybridflow check` reports what is wrong with it
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            context = values.get("max_position_embeddings")
            if isinstance(context, int):
                share = {"data.max_tokens": context}
                return {k: min(v, share.get(k, context // 2)) for k, v in begin.items() if k.endswith("_tokens")}
    return {}


def starter(
    kind: str, *, file: str, folder: str, model: str, data: str, reward: str | None, overrides: Sequence[str] = ()
) -> str:
    """Returns the text of a YAML file; it is a valid configuration.

    Args:
        kind: one of `KINDS`.
        file: where it will be written, for the commands in its head.
        folder: ``run.folder``.
        model: ``model.path``.
        data: ``data.train``, or what the kind begins with instead.
        reward: ``reward.function``; None where the kind has no such section.
        overrides: ``dotted.key=value``, which replace the starter's values or add to them.

    Raises:
        UserError: no reward where one is needed, or an override that does not fit.
    """
    config, begins = KINDS[kind].config, KINDS[kind].starter
    if (reward is None) == ("reward" in config.model_fields):
        need = "needs none" if reward else "needs a reward"
        raise UserError(
            f"a configuration for {kind} {need}",
            fix="leave --reward out" if reward else "give --reward file.py:function, or the name of a built-in one",
        )
    named = {"run.folder": folder, "model.path": model, begins.data: data}
    values: dict[str, Any] = {}
    begin = {**begins.begin, **_limits(model, begins.begin)}
    for key, value in {**named, **({"reward.function": reward} if reward else {}), **begin}.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    for text in overrides:
        apply_override(values, text)
    unset = {key.name for key in keys_of(config) if key.default == "unset"}  # null says nothing there
    values = {
        section: {k: v for k, v in inner.items() if v is not None or f"{section}.{k}" not in unset}
        for section, inner in values.items()
    }
    validate(config, values, source="the new configuration")
    return "\n".join([*_head(kind, file), *_sections(kind, values)]) + "\n"


def _head(kind: str, file: str) -> Iterator[str]:
    yield f"# {KINDS[kind].what}, begun with `hybridflow init`. What is commented out is a choice, not a default."
    yield "#"
    yield f"#     {typed('check', file)}                  finds what is wrong, and shows the first row as tokens"
    yield f"#     {typed(kind, file)}"
    yield f"#     {typed('check', file)} --explain KEY    a key or a section, such as optim"
    yield "#"
    yield "# Your editor completes keys with a schema, and a first line that names it:"
    yield f"#     hybridflow schema {kind} > {kind}.schema.json"
    yield f"#     # yaml-language-server: $schema={kind}.schema.json"


def _sections(command: str, values: dict[str, Any]) -> Iterator[str]:
    config, shown = KINDS[command].config, KINDS[command].starter.show
    for section in config.model_fields:
        known = [key for key in keys_of(config) if key.name.startswith(f"{section}.")]
        lines = []
        for key in known:
            name = key.name.removeprefix(f"{section}.")
            live = name in values.get(section, {})
            if "." in name or not (live or key.name in shown):
                continue
            lines += [f"  # {line}" for line in textwrap.wrap(key.description, WIDTH - 4)]
            value = values[section][name] if live else shown[key.name]
            lines.append(f"  {'' if live else '# '}{name}: {'null' if value is None else as_yaml(value)}")
        if lines:
            yield from (f"\n{section}:", *lines)
