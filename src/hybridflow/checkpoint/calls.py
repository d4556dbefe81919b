"""The journal of calls: what tools and environments answered, on disk before the model sees it.

One file per step beside the groups, one line per answer: a checksum, then JSON. A line that a kill cut short fails its
checksum and is dropped. Answers that came together are written with one sync.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from dataclasses import astuple
from pathlib import Path
from typing import Any

from hybridflow.faults import fault_point
from hybridflow.protocols.calls import CallPlace


class CallJournal:
    """The answers of a run: see `CallStore`.

    Args:
        folder: the run's ``journal/``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._step = -1
        self._answers: dict[CallPlace, dict[str, Any]] = {}
        self._lines: list[bytes] = []  # not on disk yet
        self._count = 0
        self._syncs = 0

    def open(self, step: int) -> None:
        """Reads the answers of a step; `find` and `add` are about them from now on."""
        with self._lock:
            if step == self._step:
                return
            self._step, self._answers, self._lines, self._count, self._syncs = step, {}, [], 0, 0
            path, whole = self._file(step), b""
            if not path.is_file():
                return
            for line in path.read_bytes().splitlines(keepends=True):
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if checksum == f"{zlib.crc32(text):08x}".encode():
                    place, answer = json.loads(text)
                    self._answers[CallPlace(*place)] = answer
                    whole += line if line.endswith(b"\n") else line + b"\n"
            if whole != path.read_bytes():
                self._replace(path, whole)

    def find(self, place: CallPlace) -> dict[str, Any] | None:
        """See `CallStore.find`."""
        with self._lock:
            return self._answers.get(place)

    def add(self, place: CallPlace, answer: dict[str, Any]) -> None:
        """See `CallStore.add`."""
        text = json.dumps([astuple(place), answer], default=str).encode()
        with self._lock:
            self._answers[place] = json.loads(text)[1]
            self._lines.append(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")
            self._count += 1
            count = self._count
        fault_point("call", self._step, count)

    def sync(self) -> None:
        """See `CallStore.sync`."""
        with self._lock:
            lines, self._lines = self._lines, []
            if not lines:
                return
            with self._file(self._step).open("ab") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            self._syncs += 1
            count = self._syncs
        fault_point("answered", self._step, count)

    def forget_up_to(self, step: int) -> None:
        """Deletes the files of all steps up to this one."""
        for path in self.folder.glob("calls-*.jsonl"):
            if int(path.stem.removeprefix("calls-")) <= step:
                path.unlink()

    def clear(self) -> None:
        """Deletes everything."""
        with self._lock:
            self._step, self._answers, self._lines = -1, {}, []
            for path in self.folder.glob("calls-*.jsonl"):
                path.unlink()

    def _file(self, step: int) -> Path:
        return self.folder / f"calls-{step:06d}.jsonl"

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        aside = path.with_name(f".{path.name}.partial")
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
