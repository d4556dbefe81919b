"""events.jsonl: the events of a run (started, resumed, a tracker failed, ...), one JSON object each."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path


class EventLog:
    """Appends events ``{"time": "2026-01-31T12:00:00+01:00", "kind": "resume", "text": "..."}``.

    Several logs, of several threads, may append to one file: every event is one write.

    Args:
        path: the file; it appears with the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def append(self, kind: str, text: str) -> None:
        """Adds an event. Never raises: an event that cannot be written goes to stderr instead."""
        event = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "kind": kind, "text": text}
        try:
            with self._lock, self.path.open("ab+") as file:
                line = json.dumps(event).encode() + b"\n"
                if file.seek(0, 2):
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":  # a kill cut the line before this one short
                        line = b"\n" + line
                file.write(line)
        except OSError as error:
            with suppress(OSError, ValueError):
                print(f"{kind}: {text} (not in {self.path}: {error})", file=sys.stderr)


def read_events(path: Path) -> list[dict[str, str]]:
    """Reads the events in the order written; lines that a kill cut short are left out."""
    events: list[dict[str, str]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.append({key: str(event.get(key, "")) for key in ("time", "kind", "text")})
    return events
