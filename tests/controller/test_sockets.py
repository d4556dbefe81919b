"""Processes start whatever the temporary folder is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hybridflow.errors import UserError
from hybridflow.sockets import LONGEST, WITHIN, socket_parent, try_socket

START = """
import os, sys
from hybridflow.controller.backends.forking import start_server

def say(pid):
    sys.exit(7 if os.getpid() != pid else 1)

if __name__ == "__main__":
    context = start_server(())
    process = context.Process(target=say, args=(os.getpid(),))
    process.start()
    process.join()
    from multiprocessing.util import get_temp_dir
    print(process.exitcode, get_temp_dir())
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up anew, and afterwards as it was
    return monkeypatch


def long_folder(parent: Path, length: int, name: str = "a caf\u00e9 & more ") -> Path:
    room = length - len(os.fsencode(parent)) - 1
    text = (name * 50).encode()[:room].decode(errors="ignore")
    folder = parent / (text + "x" * (room - len(text.encode())))
    folder.mkdir()
    assert len(os.fsencode(folder)) == length
    return folder


@pytest.mark.parametrize("length", [122, LONGEST, LONGEST - WITHIN + 1, 250])
def test_sockets_move_out_of_a_folder_that_is_too_long(
    length: int, temporary: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as near:
        temporary.setenv("TMPDIR", str(long_folder(Path(near), length)))
        assert len(tempfile.gettempdir().encode()) == length
        assert try_socket() == socket_parent() == "/tmp"


def test_a_folder_that_is_short_enough_is_used_whatever_its_name(temporary: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as near:
        folder = long_folder(Path(near), LONGEST - WITHIN)
        temporary.setenv("TMPDIR", str(folder))
        assert try_socket() == str(folder) and not list(folder.iterdir())


def test_a_folder_that_is_not_there_or_a_file_is_passed_over(temporary: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        temporary.setenv("TMPDIR", str(tmp_path / name))
        temporary.setattr(tempfile, "tempdir", None)
        assert try_socket() == tempfile.gettempdir() != str(tmp_path / name)


def test_no_folder_at_all_is_told(temporary: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    temporary.setenv("TMPDIR", str(folder))
    temporary.setattr("hybridflow.sockets.SHORT", ("/proc/nothing", str(tmp_path / "nowhere")))
    with pytest.raises(UserError) as caught:
        socket_parent()
    assert "too long for sockets" in caught.value.what and "set TMPDIR to a shorter folder" in caught.value.fix


@pytest.mark.slow
def test_processes_start_where_the_temporary_folder_is_long(tmp_path: Path) -> None:
    """The folder of the finding: 122 characters; with spaces and letters beyond ASCII besides."""
    (tmp_path / "start.py").write_text(START)
    with tempfile.TemporaryDirectory(dir="/tmp") as near:
        folder = long_folder(Path(near), 122)
        mine = os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run([sys.executable, "start.py"], cwd=tmp_path, env=mine, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code, where = done.stdout.split()
        assert code == "7" and where.startswith("/tmp/pymp-") and not Path(where).exists()
