"""The reference of all configuration keys, written from the sections themselves: `docs/configuration.md`.

    python -m hybridflow.config.pages.describe > docs/configuration.md

A test holds the file and the sections together.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybridflow.config.inherit import INHERITS
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.paths import PATHS
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import Sections, sections_in, words


@dataclass(frozen=True, slots=True)
class Key:
    """What there is to know about a key of the configuration.

    Args:
        name: with dots: ``optim.lr``.
        type: in words, with its bounds; "section" where other keys are inside.
        default: in words: "*required*", "unset", "by preset", or the value between backticks.
        description: one line.
        where: the kinds of its section that have it, in words; empty where all have it.
    """

    name: str
    type: str
    default: str
    description: str
    where: str = ""


HEAD = """\
# Configuration

<!-- Written by `python -m hybridflow.config.pages.describe > docs/configuration.md`; a test holds it in step. -->

A run is configured by one YAML file with the sections below, and by overrides on the command line:

```sh
hybridflow train recipes/carry/grpo.yaml optim.lr=5e-5 run.folder=runs/slower
```

- An override is `section.key=value`. It wins over the file. The type of the key says how the value is read:
  - text and paths: as they are typed, with `#`, colons, brackets and spaces (`data.system_prompt=Answer after ####
    please`). `null` leaves the key unset. Quotes around all of the value are taken off, so `'"null"'` is the word
    null.
  - numbers, true and false, lists and sections: as in YAML (`optim.betas=[0.9, 0.99]`, `model.lora={rank: 16}`);
    `null` or nothing leaves the key unset. Where a list is wanted, one value may stand for it: `rollout.stop=####`.
  - keys below `reward.kwargs`, `algorithm.values` and the like, which may hold anything: what is plainly a number,
    true, false, null, a list or a section is that, all else is text.
- An unknown key is an error that names the nearest known one; names that users of verl, TRL, OpenRLHF and the Hugging
  Face Trainer know are told what they are here. All mistakes are reported together. A key that stands twice in the
  file is a mistake.
- In every path, `~` and `$VARIABLE` are filled in. A file that is read (`model.path`, `data.train`,
  `reward.function`, ...) is looked for from the current folder, then beside the YAML file. `file.py:function` names a
  function in a file.
- Where the default is *required*, the key must be given. `unset` means: leave the key out, or write `null`. A default
  "as `optim.lr`" is taken from that key of the same run.
- Where keys of a section are of one choice alone (of `rollout.engine`, for example, or of `algorithm.advantage`), their
  meaning begins with the choices that have them, in italics. Beside another choice such a key is refused, unless it has
  its default, which says nothing.
- A run's folder holds its resolved configuration, `config.yaml`. When the run is resumed, these keys must be as they
  were: `run.seed`, `model.path`, `model.reference`, `model.lora`, `critic.path`, `critic.lora`,
  `critic.shared_trunk`, everything in `data`, `train.prompts_per_step` and `train.samples_per_prompt`. Others may
  change; `events.jsonl` says which did.
- With `data.eval` set, `hybridflow train` evaluates before the first step (unless `eval.before_training` is false) and
  after the last one; `eval.every` adds evaluations in between. Answers are greedy, unless `eval.temperature` is set.
- `hybridflow check --explain KEY` says the same of one key, and what a configuration has there. For an editor,
  `hybridflow schema train > train.schema.json` writes the JSON schema (also for `sft`, `reward-model` and `eval`;
  `docs/schema/` has them), which the first line of a YAML file can name:
  `# yaml-language-server: $schema=train.schema.json`.

"""


def describe() -> str:
    """The whole page, in Markdown."""
    return HEAD + "\n".join([*_sections(), *_presets()]) + "\n"


def _sections() -> Iterator[str]:
    found: dict[tuple[str, Sections], tuple[list[str], FieldInfo]] = {}
    for command, kind in KINDS.items():
        for name, field in kind.config.model_fields.items():
            sections = sections_in(field.annotation, field.metadata)
            assert sections is not None, f"{name} is not a section"
            found.setdefault((name, sections), ([], field))[0].append(command)
    for (name, sections), (commands, field) in found.items():
        need = "required" if field.is_required() else "optional"
        yield f"## {name} ({', '.join(commands)})\n"
        yield f"{sections.what} The section is {need}.\n"
        if told := _told_by(name, sections):
            yield f"{told}\n"
        yield "| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |"
        for key in _keys(sections, f"{name}."):
            meaning = f"*{key.where}*: {key.description}" if key.where else key.description
            yield f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(meaning)} |"
        yield ""


def _told_by(name: str, sections: Sections) -> str:
    """How the kinds of a section are told apart, in words; empty where there is one."""
    if sections.one_of is None:
        return ""
    return f"Its keys depend on {' and '.join(f'{name}.{key}' for key in sections.one_of.keys)}."


@functools.cache
def keys_of(model: type[Section]) -> tuple[Key, ...]:
    """All keys of a whole configuration, sections before what is inside them."""
    return tuple(_keys(Sections((model,)), ""))


def _keys(sections: Sections, prefix: str) -> Iterator[Key]:
    for name, field in sections.fields.items():
        inner = sections_in(field.annotation, field.metadata)
        described = " ".join(str(field.description or (inner and inner.what)).split())
        described += f" {_told_by(prefix + name, inner)}" if inner is not None and prefix else ""
        tells = sections.tells(name)
        if inner is not None:
            kind = "section"
        elif tells and words(field):
            kind = " or ".join(f"`{word}`" for word in sections.words(name))
        else:
            kind = _type(field.annotation, field.metadata)
        default = "unset" if tells and field.is_required() else _default(f"{prefix}{name}", field)
        yield Key(f"{prefix}{name}", kind, default, described, "" if tells else sections.where(name))
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _presets() -> Iterator[str]:
    keys = sorted({key for values in PRESETS.values() for key in values})
    yield "## Presets\n"
    yield "What `algorithm.preset` sets; a key that is given beside it wins.\n"
    yield f"| Preset | {' | '.join(f'`{key}`' for key in keys)} |\n|{' --- |' * (len(keys) + 1)}"
    for preset, values in PRESETS.items():
        yield f"| `{preset}` | {' | '.join(_value(values[key]) if key in values else '' for key in keys)} |"


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds: ``integer >= 0``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*_metadata(arguments[1:]), *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a, metadata) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is list:
        word = _type(arguments[0])
        return f"path or list of {word}" if word.startswith("{") else f"list of {word}"  # one source is a path
    if origin is tuple:
        return f"[{', '.join(_type(a) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if any(m in PATHS for m in metadata):
        return "path"
    word = {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]
    return " ".join([word, " and ".join(_bounds(metadata))]).strip()


def _metadata(parts: Sequence[Any]) -> list[Any]:
    return [inner for p in parts for inner in (p.metadata if isinstance(p, FieldInfo) else [p])]


def _bounds(metadata: Sequence[Any]) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]


def _default(key: str, field: FieldInfo) -> str:
    section, _, name = key.partition(".")
    inside, _, last = key.rpartition(".")
    if inside in INHERITS:
        return f"as `{INHERITS[inside]}.{last}`"
    if section == "algorithm" and any(name in values for values in PRESETS.values()):
        return "by preset"
    if field.is_required():
        return "*required*"
    return _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(describe(), end="")
