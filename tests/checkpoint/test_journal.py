"""The journal: what was appended reads back bit for bit, and a torn line costs only itself."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.checkpoint.journal import Journal
from hybridflow.errors import UserError
from hybridflow.protocols.generation import Result, Span, Support
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory, Turn, one_turn

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=4)
small, numbers, texts = st.integers(0, 9), st.floats(allow_nan=False), st.text(st.characters(codec=None), max_size=8)
sequences = st.builds(
    TokenSequence,
    prompt_ids=tokens,
    token_ids=tokens,
    logps=st.lists(numbers, max_size=4),
    spans=st.lists(st.builds(Span, small, small, small), max_size=3),
    turns=st.lists(
        st.builds(Turn, small, small, texts, st.none() | numbers, st.none() | st.integers(0, 2**63 - 1), small),
        max_size=2,
    ),
    support=st.none() | st.builds(Support, tokens, tokens),
    step_rewards=st.lists(st.tuples(small, numbers), max_size=2),
    fork=texts,
)
trajectories = st.builds(
    Trajectory,
    sample=st.integers(0, 100),
    sequences=st.lists(sequences, max_size=2),
    finish_reason=st.sampled_from(["stop", "length"]),
    response=texts,
    reward=numbers,
    messages=st.lists(st.dictionaries(texts, texts, max_size=2), max_size=2),
    final=texts,
    counts=st.dictionaries(texts, numbers, max_size=2),
)
groups = st.builds(
    Group,
    draw=st.integers(0, 2**40),
    row=st.integers(0, 2**40),
    prompt_ids=tokens,
    trajectories=st.lists(trajectories, max_size=3),
    digest=texts,
)


def group(draw: int, reward: float = 0.1) -> Group:
    sequence = one_turn([1, 2], Result(0, [5, 6], [-0.5, -1e-300], "stop", [Span(1, 0, 2)]), 2)
    return Group(draw, 7, [1, 2], [Trajectory(0, [sequence], "stop", "a\u2028\r\n\ud800", reward)])


def journal(folder: Path, draws: int = 3, step: int = 4) -> tuple[Journal, Path]:
    made = Journal(folder / "journal")
    for draw in range(draws):
        made.append(step, group(draw, 0.1 + draw))
    return made, folder / f"journal/step-{step:06d}.jsonl"


def bits(value: Group) -> list[bytes]:
    return [struct.pack(f"<{len(t.logps) + 1}d", *t.logps, t.reward) for t in value.trajectories]


@given(st.lists(groups, max_size=4, unique_by=lambda g: g.draw))
def test_everything_reads_back_bit_for_bit(written: list[Group]) -> None:
    with TemporaryDirectory() as folder:
        for g in written:
            Journal(Path(folder)).append(2, g)
        read = Journal(Path(folder)).read(2)
    assert list(read) == [g.draw for g in written]
    for g in written:
        assert read[g.draw] == g
        assert bits(read[g.draw]) == bits(g)  # -0.0 too


def test_a_journal_of_responses_without_turns_is_refused_by_name(tmp_path: Path) -> None:
    made, path = journal(tmp_path)
    line = b'{"draw": 0, "row": 7, "prompt_ids": [1], "trajectories": []}'
    path.write_bytes(f"{zlib.crc32(line):08x} ".encode() + line + b"\n")
    with pytest.raises(UserError, match=r"(?s)step-000004.jsonl was written by an earlier version.*delete the file"):
        made.mend(4)


def test_steps_do_not_mix(tmp_path: Path) -> None:
    made, _ = journal(tmp_path)
    made.append(5, group(9))
    assert (list(made.read(4)), list(made.read(5)), made.read(6)) == ([0, 1, 2], [9], {})


def test_a_line_cut_anywhere_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    made, file = journal(tmp_path)
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in [*range(2, last + 1, 29), last]:
        file.write_bytes(whole[:-cut])
        assert made.read(4) == {0: group(0, 0.1), 1: group(1, 1.1)}
    file.write_bytes(whole[:-1])  # only the end of the line is missing
    assert list(made.read(4)) == [0, 1, 2]


def test_after_mending_a_torn_file_can_be_appended_to(tmp_path: Path) -> None:
    made, file = journal(tmp_path)
    whole = file.read_bytes()
    for cut, kept in [(40, [0, 1]), (1, [0, 1, 2])]:
        file.write_bytes(whole[:-cut])
        made.mend(4)
        made.append(4, group(8, 8.5))
        assert made.read(4) == {**{d: group(d, d + 0.1) for d in kept}, 8: group(8, 8.5)}
    assert [p.name for p in made.folder.iterdir()] == [file.name]


def test_mending_leaves_a_whole_file_and_an_absent_one_alone(tmp_path: Path) -> None:
    made, file = journal(tmp_path)
    before = file.stat()
    made.mend(4)
    made.mend(5)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [p.name for p in made.folder.iterdir()] == [file.name]


def test_an_altered_line_is_not_believed(tmp_path: Path) -> None:
    made, file = journal(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"reward": 1.1', b'"reward": 9.1'))
    assert list(made.read(4)) == [0, 2]


def test_what_no_resume_needs_is_forgotten(tmp_path: Path) -> None:
    made, _ = journal(tmp_path, step=4)
    for step in (1, 5, 12):
        made.append(step, group(0))
    made.forget_up_to(4)
    assert sorted(p.name for p in made.folder.iterdir()) == ["step-000005.jsonl", "step-000012.jsonl"]
    assert made.read(4) == {} and list(made.read(5)) == [0]
