"""The journal: finished, scored groups are written at once, so that killing a run loses none of them.

One file per step, one line per group: a checksum, then the group as JSON (floats are written so that they read back bit
for bit). A line that a kill cut short fails its checksum and is dropped. A prompt is written once per group: sequences
refer to it by number.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from hybridflow.checkpoint.calls import CallJournal
from hybridflow.errors import UserError
from hybridflow.protocols.generation import Span, Support
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory, Turn


class Journal:
    """The journal of a run.

    Args:
        folder: the run's ``journal/``; made if absent.

    Attributes:
        calls: the answers of tools and environments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.calls = CallJournal(folder)

    def append(self, step: int, group: Group) -> None:
        """Adds a group; when this returns, the group survives the process."""
        with self._file(step).open("ab") as file:
            file.write(_line(group))
            file.flush()
            os.fsync(file.fileno())

    def read(self, step: int) -> dict[int, Group]:
        """Reads the groups of a step, by draw; empty if there are none.

        Raises:
            UserError: they were written by a version that had no trajectories.
        """
        path, groups = self._file(step), {}
        if path.is_file():
            for line in path.read_bytes().splitlines():
                checksum, _, text = line.partition(b" ")
                if checksum == f"{zlib.crc32(text):08x}".encode():
                    value = json.loads(text)
                    if "prompts" not in value:
                        raise UserError(
                            f"{path} was written by an earlier version of hybridflow",
                            why="it holds responses, where this version keeps trajectories",
                            fix="delete the file: its step is generated again; or end the run with that version",
                        )
                    group = _group(value)
                    groups[group.draw] = group
        return groups

    def mend(self, step: int) -> None:
        """Rewrites a step's files without a line that was cut short, so that the next append starts a new line; calls
        are those of this step from now on.
        """
        self.calls.open(step)
        path, whole = self._file(step), b"".join(_line(group) for group in self.read(step).values())
        if not path.is_file() or path.read_bytes() == whole:
            return
        aside = path.with_name(f".{path.name}.partial")
        with aside.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)  # a kill here loses no group either

    def forget_up_to(self, step: int) -> None:
        """Deletes the files of all steps up to this one, which no resume can need any more."""
        self.calls.forget_up_to(step)
        for path in self.folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) <= step:
                path.unlink()

    def clear(self) -> None:
        """Deletes everything."""
        self.calls.clear()
        for path in self.folder.glob("step-*.jsonl"):
            path.unlink()

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.jsonl"


def _line(group: Group) -> bytes:
    prompts = {tuple(group.prompt_ids): 0}
    for sequences in (*(t.sequences for t in (*group.trajectories, *group.left_out)), group.greedy):
        for sequence in sequences:
            prompts.setdefault(tuple(sequence.prompt_ids), len(prompts))

    def plain(record: Any) -> dict[str, Any]:
        values = {f.name: getattr(record, f.name) for f in fields(record)}  # asdict copies every list, entry by entry
        if "prompt_ids" in values:
            values["prompt_ids"] = prompts[tuple(values["prompt_ids"])]
        return values

    text = json.dumps({"prompts": list(prompts), "group": group}, default=plain)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _group(value: dict[str, Any]) -> Group:
    prompts: list[list[int]] = value["prompts"]

    def sequence(found: dict[str, Any]) -> TokenSequence:
        return TokenSequence(
            **found
            | {
                "prompt_ids": prompts[found["prompt_ids"]],
                "spans": [Span(**s) for s in found["spans"]],
                "turns": [Turn(**t) for t in found["turns"]],
                "support": found["support"] and Support(**found["support"]),
                "step_rewards": [(position, reward) for position, reward in found["step_rewards"]],
            }
        )

    def trajectory(found: dict[str, Any]) -> Trajectory:
        return Trajectory(**found | {"sequences": [sequence(s) for s in found["sequences"]]})

    group: dict[str, Any] = value["group"]
    return Group(
        **group
        | {
            "prompt_ids": prompts[group["prompt_ids"]],
            "trajectories": [trajectory(t) for t in group["trajectories"]],
            "greedy": [sequence(s) for s in group["greedy"]],
            "left_out": [trajectory(t) for t in group["left_out"]],
        }
    )
