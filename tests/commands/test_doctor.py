"""`hybridflow doctor` says what this machine is, and what on it would end a job."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridflow.cli.main import main
from hybridflow.commands.doctor import examine


def test_it_finds_what_is_here_and_two_processes_that_meet(capsys: pytest.CaptureFixture[str]) -> None:
    before = multiprocessing.active_children()
    status = main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    problems = [check for check in said["checks"] if not check["ok"]]
    assert said["ok"] == (not problems) == (status == 0), problems
    found = {check["check"]: check.get("found", "") for check in said["checks"]}
    assert found["python"].startswith(platform.python_version())
    assert found["torch"].startswith(torch.__version__)
    assert found["collective"].startswith("gloo: 2 processes started, met and summed 16 MiB in ")
    assert set(multiprocessing.active_children()) <= set(before)  # it leaves no process behind


def test_what_is_wrong_is_told_with_the_remedy_and_ends_with_1(tmp_path: Path) -> None:
    other = tmp_path / "peft-0.1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    command = f"ulimit -n 256; exec {sys.executable} -m hybridflow doctor"
    mine = {"GLOO_SOCKET_IFNAME": "nothere0", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=os.environ | mine)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert "peft           PROBLEM: peft 0.1.0 is installed, and hybridflow needs >=0.18" in lines
    assert "  fix: pip install 'peft>=0.18'" in lines
    assert "open files     PROBLEM: a process may have only 256 files open" in lines
    assert "  fix: ulimit -n 65536, in the shell that starts the job" in lines
    at = lines.index("collective     PROBLEM: two processes on this host cannot sum a tensor over gloo")
    assert "nothere0" in lines[at + 1] and "GLOO_SOCKET_IFNAME=lo" in lines[at + 2]
    assert lines[-1] == "3 problems"


def test_processes_that_do_not_meet_in_time_are_ended() -> None:
    before = multiprocessing.active_children()
    *_, last = examine(time_limit=0.01)
    assert last.mistake is not None and last.mistake.why == "they did not end within 0.01 seconds"
    assert multiprocessing.active_children() == before
