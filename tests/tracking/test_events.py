"""events.jsonl never stands in the way of a run."""

import threading
from pathlib import Path

import pytest

from hybridflow.tracking.events import EventLog, read_events


def test_events_of_many_threads_are_all_there(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    texts = {f"worker {w}, event {i}, caf\u00e9\nnext line" for w in range(6) for i in range(40)}
    share = [sorted(texts)[w::6] for w in range(6)]
    threads = [threading.Thread(target=lambda part=part: [log.append("note", t) for t in part]) for part in share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_events(path)
    assert {e["text"] for e in events} == texts and len(events) == len(texts)
    assert all(e["kind"] == "note" and e["time"][4] == "-" for e in events)


def test_an_event_after_one_that_was_cut_short_is_whole(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    EventLog(path).append("resume", "resuming after step 3")
    path.write_bytes(path.read_bytes() + b'{"time": "2026-01-')
    EventLog(path).append("done", "40 steps")
    assert [(e["kind"], e["text"]) for e in read_events(path)] == [
        ("resume", "resuming after step 3"),
        ("done", "40 steps"),
    ]


def test_a_file_that_cannot_be_written_does_not_raise_and_loses_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    EventLog(tmp_path / "no such folder" / "events.jsonl").append("warning", "tensorboard is off")
    assert "tensorboard is off" in capsys.readouterr().err
