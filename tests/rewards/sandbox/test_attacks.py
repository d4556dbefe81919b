"""Attacks on the host and on the grader: each is worth nothing, contained, and leaves the host as it was."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attacks_on_tests import ON_TESTS
from hybridflow.rewards.sandbox.local import LocalSandbox
from hybridflow.rewards.sandbox.outcome import Limits
from hybridflow.rewards.sandbox.view import interpreter
from hybridflow.rewards.verifiable.code import score
from hybridflow.rewards.verifiable.code_cases import read_cases

from attacks import ON_GRADER, ON_HOST

SECRET = "the-secret-of-the-host-4711"
VARIABLE = "HYBRIDFLOW_TEST_TOKEN"
REPOSITORY = Path(__file__).parents[3]
EXPECTED = "the-expected-output-5813"
PARTS, AT_ONCE = 6, 3  # attacks are tried in so many parts, and so many of a part at the same time
SETTINGS = {"backend": "local", "seconds": 10, "parallel": 2 * AT_ONCE}


@dataclass
class Host:
    """What an attack may hit, and whether it was hit."""

    folder: Path
    victim: subprocess.Popen[bytes]
    facts: dict[str, str]
    servers: list[socket.socket]

    def reached(self) -> list[socket.socket]:
        """Servers that somebody has connected to, or sent something."""
        return select.select(self.servers, [], [], 0)[0]

    def aim(self, program: str) -> str:
        """The program, with facts of this host in it."""
        for name, value in self.facts.items():
            program = program.replace(f"@{name}@", value)
        return program

    def assert_unharmed(self) -> None:
        """Nothing was written, ended, reached or left running."""
        assert sorted(p.name for p in self.folder.iterdir()) == ["secret", "socket"]
        assert (self.folder / "secret").read_text() == SECRET
        assert self.victim.poll() is None, "the victim was killed"
        assert self.reached() == []
        assert library() == self.facts["library"], "the standard library was changed"
        assert jailed_processes() == []


def library() -> str:
    """A hash over what the next program would be run by: names, sizes, modes and times of Python's own files."""
    digest = hashlib.sha256()
    stdlib = Path(os.__file__).parent
    for path in sorted([Path(interpreter()), *stdlib.glob("*"), *(stdlib / "json").rglob("*")]):
        entry = path.lstat()
        digest.update(f"{path} {entry.st_size} {entry.st_mode} {entry.st_mtime_ns} {entry.st_uid}".encode())
    return digest.hexdigest()


def jailed_processes() -> list[int]:
    """Processes that this one, or one of its own, has started and that run a jail."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().decode() if folder.name.isdigit() else ""
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1] if "marshal" in command else ""
        except OSError:  # it has ended meanwhile
            continue
        if parent in (str(os.getpid()), "1"):
            found.append(int(folder.name))
    return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A victim process, a file, a variable and three servers that know a secret or wait to be reached."""
    monkeypatch.setenv(VARIABLE, SECRET)  # and in the environment that the victim began with
    folder = tmp_path / "victim"
    folder.mkdir()
    for public in (folder, *folder.parents):
        if public.is_relative_to(tmp_path.parents[1]):
            public.chmod(0o755)  # so that not only the rights of files protect it
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o666)
    folder.chmod(0o777)
    victim = subprocess.Popen(["sleep", "1000"], env=os.environ | {VARIABLE: SECRET})
    abstract = f"hybridflow-{os.getpid()}"
    tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    named, unnamed = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    udp.bind(tcp.getsockname())
    named.bind(os.path.relpath(folder / "socket"))
    unnamed.bind(f"\0{abstract}")
    for server in (tcp, named, unnamed):
        server.listen()
    (folder / "socket").chmod(0o777)
    maps = Path(f"/proc/{victim.pid}/maps").read_text().split("-", 1)[0]
    facts = {
        "VICTIM": str(victim.pid),
        "PARENT": str(os.getpid()),
        "ADDRESS": str(int(maps, 16)),
        "SECRET_FILE": str(folder / "secret"),
        "VICTIM_FOLDER": str(folder),
        "VARIABLE": VARIABLE,
        "REPOSITORY": str(REPOSITORY),
        "HOME": os.path.expanduser("~"),
        "PORT": str(tcp.getsockname()[1]),
        "UNIX": str(folder / "socket"),
        "ABSTRACT": abstract,
        "library": library(),
    }
    servers = [tcp, udp, named, unnamed]
    yield Host(folder, victim, facts, servers)
    for server in servers:
        server.close()
    victim.kill()
    victim.wait()


def test_there_are_enough_attacks() -> None:
    assert len(ON_HOST) >= 70 and len(ON_GRADER) >= 30


# What must be the end of these: a program that was ended for another reason would show nothing of its limit.
ENDS = {
    "timeout": {"endless_loop", "endless_sleep", "deaf_to_signals", "thread_after_the_end", "regular_expression_bomb"},
    "output": {"endless_output", "endless_errors"},
}


def faults_on_host(name: str, host: Host) -> list[str]:
    """What an attack reached, and whether it was ended for another reason than its own."""
    attack = ON_HOST[name]
    (case,) = read_cases({"inputs": ["input"], "outputs": [EXPECTED]})
    outcome = case.run(LocalSandbox("local", Limits(attack.seconds, 512, 1024), 1), host.aim(attack.program))
    said = outcome.stdout + outcome.stderr
    faults = {
        "it passed": outcome.status == "ok" and case.right(outcome),
        "it had its effect": "PWNED" in outcome.stdout,
        "it knows a secret": SECRET in said or EXPECTED in said,
        "it wrote too much": max(len(outcome.stdout), len(outcome.stderr)) > 1 << 20,
        "it took too much memory": outcome.peak_kb >= 600 << 10,
        "it heard of no limit": name == "memory_bomb" and "MemoryError" not in outcome.stderr,
        f"it ended as {outcome.status}": any(name in names and outcome.status != end for end, names in ENDS.items()),
    }
    return [f"{name}: {fault}: {outcome}" for fault, holds in faults.items() if holds]


@pytest.mark.parametrize("part", range(PARTS))
def test_the_host_is_unharmed(part: int, host: Host) -> None:
    names = list(ON_HOST)[part::PARTS]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        assert [
            fault for faults in threads.map(lambda name: faults_on_host(name, host), names) for fault in faults
        ] == []
    host.assert_unharmed()  # if not: by one of these


def test_the_attack_works_where_there_are_no_walls(host: Host) -> None:
    sandbox, bare = LocalSandbox("none", Limits(10, 512, 1024), 1), [n for n in ON_HOST if ON_HOST[n].bare]
    assert len(bare) > 30
    outcomes = {name: sandbox.run(host.aim(ON_HOST[name].program), "input") for name in bare}
    assert {name: outcome for name, outcome in outcomes.items() if "PWNED" not in outcome.stdout} == {}


# --- the grader ---

TRUTHS: dict[str, Any] = {
    "call": {"inputs": [[3]], "outputs": [918273], "fn_name": "f"},
    "output": {"inputs": ["3"], "outputs": ["918273"]},
    "asserts": [
        "assert f(3) == 918273",
        "assert not 918273 != f(3)",
        "assert abs(f(3) - 918273) < 1e-6 and f(3) in [918273]",
        "x = f(3)\nassert 918272 < x < 918274 and {x} == {918273}",
        "def check(candidate):\n    got = candidate(3)\n    assert got == 918273, str(got)\ncheck(f)",
    ],
}
# Goes through if any of these tests does: one pair of jails tries all of them.
ANY = f"""
def holds(test):
    try: exec(test, {{}})
    except Exception: return False
    return True
assert [test for test in {TRUTHS["asserts"]!r} if holds(test)]
"""
HONEST = "def f(x): return 306091 * x\nif __name__ == '__main__': print(f(int(input())))"


@pytest.mark.parametrize("form", [*TRUTHS, "any"])
def test_an_honest_program_passes(form: str) -> None:
    assert score(HONEST, TRUTHS.get(form, [ANY]), sandbox=SETTINGS) == {
        "score": 1.0,
        "passed": 1.0,
        "timeouts": 0.0,
        "not_plain": 0.0,
    }


def given(name: str) -> list[str]:
    """What an attack on the grader is given, by the form of the tests, where it is not nothing."""
    scores = {
        form: score((ON_GRADER | ON_TESTS)[name], truth, sandbox=SETTINGS, partial=True)
        for form, truth in (TRUTHS | {"asserts": [ANY]}).items()
    }
    return [f"{name}, {form}: {s}" for form, s in scores.items() if (s["score"], s["passed"]) != (0.0, 0.0)]


@pytest.mark.parametrize("part", range(PARTS))
def test_the_grader_gives_nothing(part: int) -> None:
    names = [*ON_GRADER, *ON_TESTS][part::PARTS]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        assert [one for ones in threads.map(given, names) for one in ones] == []


def test_a_test_that_catches_everything_is_not_passed_by_a_dead_program() -> None:
    test = "caught = []\ntry:\n    f(3)\nexcept BaseException as e:\n    caught.append(e)\nassert len(caught) < 2"
    assert score("def f(x): raise ValueError", [test], sandbox=SETTINGS)["score"] == 1
    for name in ("exit_when_called", "exit_hard_when_called", "exit_early", "exit_hard"):
        assert score(ON_GRADER[name], [test], sandbox=SETTINGS)["score"] == 0
