"""From the arguments of `hybridflow.train` to the sections of a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import read_values
from hybridflow.config.names import meaning
from hybridflow.config.paths import home
from hybridflow.config.sections.train import LengthSection
from hybridflow.errors import UserError, near, nearest

ARGUMENTS = (
    *("model", "data", "reward", "eval_data", "tokenizer", "tools", "environment", "config", "folder", "callbacks"),
)
_STANDS_FOR = {"model": "path", "data": "train", "reward": "function"}  # the key that such an argument gives alone
FEW = 3  # sections with a key of one name, of which a message still lists all
DEFAULTS: dict[str, Any] = {"epochs": 1, "prompts_per_step": 8, "samples_per_prompt": 8}  # of the section train

# What the calls of other programs name these arguments.
_CALLED = {
    **dict.fromkeys(("train_dataset", "dataset", "train_data", "rows"), "data=rows"),
    **dict.fromkeys(("eval_dataset", "val_data", "val_dataset"), "eval_data=rows"),
    **dict.fromkeys(
        ("reward_funcs", "reward_func", "reward_fn", "reward_function", "compute_score"), "reward=function"
    ),
    "reward_weights": 'reward={"terms": {NAME: {"function": "file.py:function", "weight": ...}}}',
    "processing_class": "tokenizer=tokenizer",
    "output_dir": "folder=path",
    "args": 'sections as dicts, such as optim={"lr": 1e-5}, train={"steps": 20}',
    "peft_config": 'model={"path": model, "lora": {"rank": 16, "alpha": 32}}',
    "ref_model": 'model={"path": model, "reference": path}',
    "callback": "callbacks=[function]",
    "environment_factory": "environment=class_or_function",
    "rollout_func": 'agent={"play": function}',
}


def refuse_unknown(sections: Mapping[str, Any]) -> None:
    """Raises a UserError for an argument that is no section: says what it is here."""
    known = RlConfig.model_fields
    if isinstance(sections.get("algorithm"), str):
        raise UserError(
            f"algorithm is {sections['algorithm']!r}, not a section",
            fix=f'algorithm={{"preset": {json.dumps(sections["algorithm"])}}}',
        )
    name = next((name for name in sections if name not in known), None)
    if name is None:
        return
    found = None if name in _CALLED else meaning(name)
    if name in _CALLED:
        hint = f"here it is {_CALLED[name]}"
    elif found is not None:
        keys = {key.name for key in keys_of(RlConfig)}
        written = [_written(key) for key in found.within(keys).keys if key.partition(".")[0] in known]
        here = f"here it is {' or '.join(written)}" if written else "there is no such setting here"
        hint = f"{here}; {found.hint}" if found.hint else here
    else:
        meant = near(name, {*ARGUMENTS, *known})
        written = [_written(key.name) for key in keys_of(RlConfig) if key.name.endswith(f".{name}")]
        here = f"here it is {' or '.join(written)}" if meant is None and 0 < len(written) <= FEW else ""
        hint = here or nearest(name, {*ARGUMENTS, *known})
    raise UserError(
        f"hybridflow.train has no argument {name!r}",
        why="its further arguments are the sections of a configuration, as dicts",
        fix=hint,
    )


def _written(key: str) -> str:
    """Returns a dotted key as an argument of the call.

    >>> _written("model.lora.rank")
    'model={"path": model, "lora": {"rank": ...}}'
    """
    section, *inner = key.split(".")
    text = "..."
    for name in reversed(inner):
        text = f'{{"{name}": {text}}}'
    own = _STANDS_FOR.get(section)  # the call needs this key beside the others
    if own is not None and inner[:1] != [own]:
        text = f'{{"{own}": {section}, {text[1:]}'
    return f"{section}={text}"


def base_values(config: Any) -> tuple[dict[str, Any], Path | None]:
    """Returns the plain values that a call begins with, and the folder that relative paths may be in.

    Args:
        config: the path of a YAML file, sections as a dict, an `RlConfig`, or None.

    Raises:
        UserError: it is something else, or the file cannot be read.
    """
    if config is None:
        return {}, None
    if isinstance(config, str | os.PathLike):
        return read_values(os.fspath(config)), home(os.fspath(config)).parent
    if isinstance(config, RlConfig):
        return config.model_dump(mode="json", exclude_unset=True), None
    if isinstance(config, Mapping):
        return dict(config), None
    raise UserError(
        f"config is a {type(config).__name__}",
        fix='give the path of a YAML file, sections as a dict ({"optim": {"lr": 1e-5}}), or an RlConfig',
    )


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values with others laid over them.

    >>> merged({"optim": {"lr": 1.0, "eps": 2.0}}, {"optim": {"lr": 3.0}})
    {'optim': {'lr': 3.0, 'eps': 2.0}}
    """
    result = dict(values)
    for key, value in over.items():
        own = result.get(key)
        result[key] = merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return result


def sets_length(values: Mapping[str, Any]) -> bool:
    """Returns whether values say how long a run is."""
    train = values.get("train")
    return isinstance(train, Mapping) and any(train.get(key) is not None for key in LengthSection.ends)


def without_length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values without their length of the run, which another one takes the place of."""
    train = values.get("train")
    if not isinstance(train, Mapping):
        return dict(values)
    return {**values, "train": {key: value for key, value in train.items() if key not in LengthSection.ends}}


def with_defaults(values: Mapping[str, Any], *, rows: int | None) -> dict[str, Any]:
    """Returns the values with what makes a short call run: one epoch, 8 prompts in a step, 8 responses to each.

    Args:
        values: sections by name.
        rows: how many training rows there are, where that is known: a step has no more prompts.
    """
    train = values.get("train", {})
    if not isinstance(train, Mapping):
        return dict(values)  # refused when all is validated
    defaults = DEFAULTS | {"prompts_per_step": min(DEFAULTS["prompts_per_step"], rows or DEFAULTS["prompts_per_step"])}
    if train.get("steps") is not None:
        del defaults["epochs"]
    given = {key: value for key, value in train.items() if value is not None}
    return {**values, "train": {**defaults, **given}}
