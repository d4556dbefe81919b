"""The reference of all configuration keys, written from the sections themselves: `docs/configuration.md`.

    python -m hybridflow.config.pages.describe > docs/configuration.md

A test holds the file and the sections together.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from hybridflow.config.keys import in_words, keys_below, told_by
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.sections.choices import Sections, sections_in

HEAD = """\
# Configuration

<!-- Written by `python -m hybridflow.config.pages.describe > docs/configuration.md`; a test holds it in step. -->

A run is configured by one YAML file with the sections below, and by overrides on the command line:

```sh
hybridflow train recipes/carry/grpo.yaml optim.lr=5e-5 run.folder=runs/slower
```

- An override is `section.key=value`. It wins over the file. The type of the key decides how the value is read:
  - text and paths: as typed, with `#`, colons, brackets and spaces (`data.system_prompt=Answer after #### please`).
    `null` leaves the key unset. Quotes around the whole value are taken off, so `'"null"'` is the word null.
  - numbers, true and false, lists and sections: as in YAML (`optim.betas=[0.9, 0.99]`, `model.lora={rank: 16}`);
    `null` or an empty value leaves the key unset. For a key that holds a list, one value is a list of one:
    `rollout.stop=####`.
  - keys below `reward.kwargs`, `algorithm.values` and similar ones, which may hold anything: a value that reads as a
    number, true, false, null, a list or a section is that; everything else is text.
- An unknown key is an error that names the nearest known key. For a name of verl, TRL, OpenRLHF or the Hugging Face
  Trainer, the error names the key that has its meaning here. All mistakes are reported together. A key that occurs
  twice in the file is a mistake.
- In every path, `~` and `$VARIABLE` are filled in. A file that is read (`model.path`, `data.train`,
  `reward.function`, ...) is looked up in the current folder, then beside the YAML file. `file.py:function` names a
  function in a file.
- Where the default is *required*, the key must be given. `unset` means: leave the key out, or write `null`. A default
  "as `optim.lr`" is taken from that key of the same run.
- Some keys belong to one choice of another key (of `rollout.engine`, for example, or of `algorithm.advantage`): their
  meaning begins with those choices, in italics. With another choice such a key is refused, unless it has its default.
- A run's folder holds its resolved configuration, `config.yaml`. When the run is resumed, these keys must not have
  changed: `run.seed`, `model.path`, `model.reference`, `model.lora`, `critic.path`, `critic.lora`,
  `critic.shared_trunk`, everything in `data`, `train.prompts_per_step` and `train.samples_per_prompt`. Others may
  change; `events.jsonl` records which did.
- With `data.eval` set, `hybridflow train` evaluates before the first step (unless `eval.before_training` is false) and
  after the last one; `eval.every` adds evaluations in between. Evaluation is greedy, unless `eval.temperature` is set.
- `hybridflow check --explain KEY` prints the same about one key, and its value in a configuration. For an editor,
  `hybridflow schema train > train.schema.json` writes the JSON schema (also for `sft`, `reward-model` and `eval`;
  `docs/schema/` has them), which the first line of a YAML file can name:
  `# yaml-language-server: $schema=train.schema.json`.

"""


def describe() -> str:
    """Returns the whole page, in Markdown."""
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
        if told := told_by(name, sections):
            yield f"{told}\n"
        yield "| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |"
        for key in keys_below(sections, f"{name}."):
            meaning = f"*{key.where}*: {key.description}" if key.where else key.description
            yield f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(meaning)} |"
        yield ""


def _presets() -> Iterator[str]:
    keys = sorted({key for values in PRESETS.values() for key in values})
    yield "## Presets\n"
    yield "What `algorithm.preset` sets; a key that is given beside it wins.\n"
    yield f"| Preset | {' | '.join(f'`{key}`' for key in keys)} |\n|{' --- |' * (len(keys) + 1)}"
    for preset, values in PRESETS.items():
        yield f"| `{preset}` | {' | '.join(in_words(values[key]) if key in values else '' for key in keys)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(describe(), end="")
