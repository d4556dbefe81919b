"""Tries an environment before training: two episodes under one seed, what a step costs, and what an episode leaves."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridflow.agents.processes import HostPool
from hybridflow.agents.world import Calls, JournaledWorld, WorldMaker
from hybridflow.config.sections.agent import AgentSection
from hybridflow.errors import UserError, raised
from hybridflow.noise import NoiseKey
from hybridflow.protocols.environments import Action, Observation

MOST_TURNS, MOST_SECONDS = 20, 10.0  # of an episode of the trial
LEAKED_BYTES = 16 * 2**20  # memory that an episode may leave: the allocator keeps some
_WORD = re.compile(r"\w+")
_SHOWN = 60


@dataclass(slots=True)
class Played:
    """An episode of the trial.

    Args:
        observations: what the environment answered: after reset, then after each turn.
        actions: the texts that were written.
        reset_seconds: time of making it and of reset.
        step_seconds: of each step.
    """

    observations: list[Observation] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    reset_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _TriedWorld:
    """Two episodes with one seed, what the second one left behind, and how those of other rows begin."""

    first: Played
    again: Played
    left: list[str]
    others: list[Observation]


def try_environment(
    name: str,
    make: WorldMaker,
    section: AgentSection,
    rows: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    *,
    pool: HostPool | None = None,
) -> Generator[str, None, list[Observation]]:
    """Plays two episodes with one row and one seed, and the same words; yields what was found, line by line.

    It returns how the episodes of all rows begin. Words of what the environment says are written back to it, chosen by
    their place, so that both episodes do the same.

    Args:
        name: of the environment.
        make: makes it.
        section: limits.
        rows: the first rows.
        seeds: that the episodes of these rows have.
        pool: the processes that it runs in; they are ended.

    Raises:
        UserError: it raises, answers with something else than an observation, or begins in different states.
    """
    try:
        trial = asyncio.run(_trial(make, section, rows, seeds, pool))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the environment {name} fails: {raised(error)}",
            why="its episodes would fail in training too",
            fix="mend it; hybridflow check plays two episodes of it",
        ) from error
    first, again = trial.first, trial.again
    start, other = first.observations[0], again.observations[0]
    if start != other:
        raise UserError(
            f"the environment {name} begins two episodes with one seed differently: {_difference(start, other)}",
            why="the trajectories of a group are compared with each other, so they have to begin in one state",
            fix="draw all that is random in it from the seed of reset, as random.Random(seed) does",
        )
    seconds = max(first.step_seconds + again.step_seconds, default=0.0)
    ended = "done" if first.observations[-1].done else "not done"
    cost = f"reset takes {_ms(again.reset_seconds)}, a step at most {_ms(seconds)}"
    pairs = zip(first.observations, again.observations)
    differing = next((i for i, (one, two) in enumerate(pairs) if one != two), 0)
    same = "differ" if differing else "are the same"
    yield f"environment {name}: two episodes with one seed {same} ({len(first.actions)} turns, {ended}); {cost}"
    if differing:
        found = _difference(first.observations[differing], again.observations[differing])
        yield (
            f"  advice: after turn {differing} they differ, although the model did the same: {found}. Such a run does "
            "not repeat bit for bit, and a trajectory that is resumed continues from another state"
        )
    if trial.left:
        yield f"  advice: an episode leaves {', '.join(trial.left)} behind; close() has to free what it holds"
    begun = [start, *trial.others]
    if len(begun) > 1 and all(one == start for one in begun):
        yield (
            f"  advice: its first {len(begun)} tasks all begin alike; their difference has to come from row or seed "
            "of reset"
        )
    yield f"  it begins with {_text(start)[:200]!r}"
    return begun


async def _trial(
    make: WorldMaker,
    section: AgentSection,
    rows: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    pool: HostPool | None,
) -> _TriedWorld:
    try:
        first = await _play(make, section, rows[0], seeds[0])
        before = _Held.now()
        again = await _play(make, section, rows[0], seeds[0], like=first)
        left = before.left()
        others = [await _play(make, section, row, seed, turns=0) for row, seed in zip(rows[1:], seeds[1:])]
    finally:
        if pool is not None:
            pool.close()
    return _TriedWorld(first, again, left, [played.observations[0] for played in others])


async def _play(
    make: WorldMaker,
    section: AgentSection,
    row: dict[str, Any],
    seed: int,
    *,
    like: Played | None = None,
    turns: int = MOST_TURNS,
) -> Played:
    """Plays one episode; with as many turns and the same words as another."""
    played = Played()
    world = JournaledWorld(make, Calls(section, NoiseKey(0, "check", 0), [], None))
    try:
        began = time.perf_counter()
        played.observations.append(await world.reset(dict(row), seed))
        played.reset_seconds = time.perf_counter() - began
        most = min(turns, section.max_turns) if like is None else len(like.actions)
        while len(played.actions) < most and not played.observations[-1].done:
            if like is None and time.perf_counter() - began > MOST_SECONDS:
                break
            number = len(played.actions)
            text = _word(played.observations, number) if like is None else like.actions[number]
            played.actions.append(text)
            stepped = time.perf_counter()
            action = Action(text, (), {"role": "assistant", "content": text}, "stop")
            played.observations.append(await world.step(action))
            played.step_seconds.append(time.perf_counter() - stepped)
    finally:
        await world.close()
    return played


def _word(seen: Sequence[Observation], turn: int) -> str:
    """Returns a word that the environment said: it may be one that it takes."""
    words = sorted({*_WORD.findall(_text(seen[-1])), *_WORD.findall(_text(seen[0]))})
    return words[(7 * turn + 3) % len(words)] if words else "yes"


def _text(observation: Observation) -> str:
    return "\n".join(str(message.get("content")) for message in observation.messages)


def _difference(one: Observation, other: Observation) -> str:
    for name in ("messages", "reward", "done", "anchor", "info"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            if name == "messages":
                mine, theirs = _text(one), _text(other)
            at = next((i for i, (a, b) in enumerate(zip(str(mine), str(theirs))) if a != b), 0)
            shown = [str(value)[max(0, at - _SHOWN // 2) : at + _SHOWN // 2] for value in (mine, theirs)]
            return f"{name} {shown[0]!r} and {shown[1]!r}"
    return ""


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class _Held:
    """What this process holds."""

    threads: frozenset[threading.Thread]
    files: int
    children: int
    memory: int

    @classmethod
    def now(cls) -> _Held:
        return cls(frozenset(threading.enumerate()), _files(), _children(), _memory())

    def left(self) -> list[str]:
        """Returns what this process holds beyond that, in words."""
        until = time.monotonic() + 0.5
        while (new := set(threading.enumerate()) - self.threads) and time.monotonic() < until:
            time.sleep(0.01)  # a thread that has answered ends by itself
        now = self.now()
        found = [f"{len(new)} threads ({', '.join(sorted(t.name for t in new))})"] if new else []
        found += [f"{now.files - self.files} open files"] if now.files > self.files else []
        found += [f"{now.children - self.children} processes"] if now.children > self.children else []
        grown = now.memory - self.memory
        return found + ([f"{grown / 2**20:.0f} MB of memory"] if grown > LEAKED_BYTES else [])


def _files() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0


def _children() -> int:
    return sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children"))


def _memory() -> int:
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0
