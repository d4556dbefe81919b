"""Picks the responses that a report shows, and explains why each got its advantage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hybridflow.tracking.rollouts import read_rollouts

# A report is one file that opens at once, so it shows a part of the run, and says which part.
PAIRS_PER_KIND = 6
ROLLOUT_STEPS = 3
GROUPS_WITH_SIGNAL = 4
GROUPS_WITHOUT_SIGNAL = 2
ANSWERS_PER_GROUP = 8
TOKENS_PER_ANSWER = 400
MESSAGES_PER_ANSWER = 40
CHARACTERS = 2_000

NO_REWARD = "no reward"
# What can become of an evaluation prompt, in the order of the buttons.
KINDS = (
    *("wrong \u2192 right", "right \u2192 wrong", "wrong \u2192 wrong", "right \u2192 right", "wrong", "right"),
    *("higher", "lower", "equal", "all", NO_REWARD),
)


def step_files(folder: Path, last_step: int) -> dict[int, Path]:
    """Returns the ``step-*.parquet`` files in a folder by step, without files of later steps, which a killed process
    left.
    """
    found = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.parquet")}
    return {step: found[step] for step in sorted(found) if step <= last_step}


def evaluations(folder: Path, last_step: int) -> dict[str, Any] | None:
    """Returns the same evaluation prompts at the first and the last evaluation; None if there is no evaluation."""
    files = step_files(folder, last_step)
    if not files:
        return None
    first, last = min(files), max(files)
    before, after = ({(row["draw"], row["sample"]): row for row in _firsts(_rows(files[at]))} for at in (first, last))
    keys = sorted(before.keys() & after.keys())
    binary = all(row["reward"] in (0.0, 1.0, None) for row in [*before.values(), *after.values()])
    counts: dict[str, int] = {}
    pairs = []
    for key in keys:
        old, new = before[key], after[key]
        kind = _kind(old["reward"], new["reward"], binary=binary, same=first == last)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= PAIRS_PER_KIND:
            answers = [_answer(old)] if first == last else [_answer(old), _answer(new)]
            prompt, truth = shorten(new["prompt"]), shorten(new["ground_truth"])
            pairs.append({"kind": kind, "prompt": prompt, "ground_truth": truth, "answers": answers})
    steps = [first] if first == last else [first, last]
    kinds = [[kind, counts[kind]] for kind in KINDS if kind in counts]
    return {"steps": steps, "binary": binary, "kinds": kinds, "pairs": pairs, "total": len(keys)}


def rollouts(folder: Path, last_step: int, algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """Returns groups of the first, a middle and the last step whose rollouts are on disk."""
    files = step_files(folder, last_step)
    steps = list(files)
    shown = sorted(
        {steps[round(i * (len(steps) - 1) / (ROLLOUT_STEPS - 1))] for i in range(ROLLOUT_STEPS)} if steps else ()
    )
    return {
        "available": len(steps),
        "steps": [_step(step, _rows(files[step]), algorithm) for step in shown],
        "answers_per_group": ANSWERS_PER_GROUP,
        "tokens_per_answer": TOKENS_PER_ANSWER,
    }


def _rows(file: Path) -> list[dict[str, Any]]:
    """Reads the responses in a file; numbers that are not finite, which JSON cannot hold, become None."""
    rows = read_rollouts(file)
    for row in rows:
        for name in ("reward", "advantage"):
            if row[name] is not None and not math.isfinite(row[name]):
                row[name] = None
        for name in ("data_source", "prompt", "response", "ground_truth"):
            row[name] = row[name] or ""
        for name in ("tokens", "logps"):
            row[name] = row[name] or []
    return rows


def explain(
    reward: float | None, rewards: Sequence[float], advantage: float | None, algorithm: Mapping[str, Any]
) -> str:
    """Explains why a response got its advantage.

    Args:
        reward: its reward; None where it has none (`reward.on_failure` is mask).
        rewards: of all responses of its group that have one, this one included.
        advantage: as it was trained on.
        algorithm: the configuration's ``algorithm`` section.

    >>> explain(1.0, [1.0, 0.0], 0.7071, {"advantage": "grpo", "normalize_by_std": True})
    'reward 1.00, group mean 0.50, std 0.71 \u2192 advantage +0.71'
    """
    if reward is None:
        return "no reward: not trained on"
    if advantage is None:
        return f"reward {reward:.2f}"
    if len(rewards) > 1 and min(rewards) == max(rewards):
        every = f"all {len(rewards)} responses of the group have reward {reward:.2f}"
        if advantage == 0:
            return f"{every} \u2192 advantage 0"
    average = mean(rewards)
    spread = stdev(rewards) if len(rewards) > 1 else 0.0
    estimator = algorithm.get("advantage", "unknown")
    words = f"reward {reward:.2f}, group mean {average:.2f}"
    result = f"\u2192 advantage {advantage:+.2f}"
    if estimator == "grpo":
        by_std = bool(algorithm.get("normalize_by_std", True))
        expected = (reward - average) / (spread + 1e-6 if by_std else 1.0)
        if math.isclose(expected, advantage, rel_tol=1e-3, abs_tol=1e-3):
            return f"{words}, std {spread:.2f} {result}" if by_std else f"{words} {result}"
    # Never state a rule that does not give the recorded advantage.
    return f"{words} {result} (as recorded; estimator {estimator})"


def shorten(text: str) -> str:
    """Returns a long text with its middle left out, a short one unchanged."""
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _kind(old: float | None, new: float | None, *, binary: bool, same: bool) -> str:
    if old is None or new is None:
        return NO_REWARD
    if binary:
        words = ["right" if value else "wrong" for value in (old, new)]
        return words[1] if same else " \u2192 ".join(words)
    if same:
        return "all"
    return "higher" if new > old else "lower" if new < old else "equal"


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "response": shorten(row["response"]),
        "reward": row["reward"],
        "cut": row["finish_reason"] == "length",
        "ending": row["finish_reason"] if row["messages"] else "",
        "messages": _acted(row["messages"]),
    }


def _acted(text: str | None) -> list[dict[str, Any]]:
    """Returns a conversation from the model's first turn on; nothing where the model did not act."""
    messages: list[dict[str, Any]] = json.loads(text) if text else []
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    shown = messages[first : first + MESSAGES_PER_ANSWER]
    found = [{"role": m["role"], "text": shorten(_said(m)), "calls": _calls(m)} for m in shown]
    left = len(messages) - first - len(shown)
    return [*found, {"role": "", "text": f"[{left} more messages left out]", "calls": []}] if left else found


def _said(message: Mapping[str, Any]) -> str:
    """Returns the text of a message; content in parts as JSON."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _calls(message: Mapping[str, Any]) -> list[str]:
    """Returns the calls of a message, each as ``name(arguments)``."""
    calls = [call.get("function") or {} for call in message.get("tool_calls") or []]
    return [shorten(f"{c.get('name')}({json.dumps(c.get('arguments'), ensure_ascii=False)})") for c in calls]


def _step(step: int, rows: list[dict[str, Any]], algorithm: Mapping[str, Any]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: (row["draw"], row["sample"], row["sequence"]))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["draw"])]
    signal = [g for g in groups if any(row["advantage"] for row in g)]
    equal = [g for g in groups if not any(row["advantage"] for row in g)]
    chosen = signal[:GROUPS_WITH_SIGNAL] + equal[:GROUPS_WITHOUT_SIGNAL]
    return {
        "step": step,
        "groups": len(groups),
        "with_signal": len(signal),
        "answers": len(_firsts(rows)),
        "reward": mean(given) if (given := _rewards(rows)) else None,
        "shown": [_group(group, algorithm) for group in chosen],
        "which": "; ".join(
            _part(what, len(found), most)
            for what, found, most in (
                ("with advantages", signal, GROUPS_WITH_SIGNAL),
                ("without", equal, GROUPS_WITHOUT_SIGNAL),
            )
        ),
    }


def _firsts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row of each response: that of its first sequence."""
    return [row for row in rows if not row["sequence"]]


def _rewards(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the rewards of the responses that have one."""
    return [row["reward"] for row in _firsts(rows) if row["reward"] is not None]


def _part(what: str, count: int, most: int) -> str:
    """Says how many groups of a kind there are, and how many of them are shown.

    >>> _part("with advantages", 3, 2)
    '3 groups with advantages (the first 2 are shown)'
    """
    if not count:
        return f"no group {what}"
    shown = f" (the first {most} are shown)" if count > most else ""
    return f"{count} group{'s' * (count > 1)} {what}{shown}"


def _group(rows: list[dict[str, Any]], algorithm: Mapping[str, Any]) -> dict[str, Any]:
    rewards = _rewards(rows)
    return {
        "draw": rows[0]["draw"],
        "data_source": rows[0]["data_source"],
        "prompt": shorten(rows[0]["prompt"]),
        "ground_truth": shorten(rows[0]["ground_truth"]),
        "reward": f"{mean(rewards):.2f}" if rewards else "none",
        "size": len(_firsts(rows)),
        "answers": [
            _trajectory(list(of_one), rewards, algorithm)
            for _, of_one in islice(groupby(rows, key=lambda row: row["sample"]), ANSWERS_PER_GROUP)
        ],
    }


def _trajectory(rows: list[dict[str, Any]], rewards: Sequence[float], algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a response by the rows of its sequences."""
    first = rows[0]
    acted = first["messages"] is not None
    advantages = [row["advantage"] for row in rows if row["advantage"] is not None]
    advantage = advantages[0] if advantages else None
    turns = [turn for row in rows for turn in row["turns"] or []]
    calls = sum(len(_calls(message)) for message in json.loads(first["messages"] or "[]"))
    left, sequences = TOKENS_PER_ANSWER, []
    for row in rows:
        sequences.append(_sequence(row, left, shows_prompt=bool(row["sequence"])))
        left = max(0, left - len(row["tokens"]))
    return {
        "reward": first["reward"],
        "advantage": advantage,
        "why": explain(first["reward"], rewards, advantage, algorithm),
        "cut": first["finish_reason"] == "length",
        "length": sum(turn["end"] - turn["start"] for turn in turns) if turns else sum(len(r["tokens"]) for r in rows),
        "ending": f"{_number(len(turns), 'turn')}, {_number(calls, 'call')}, ended: {first['finish_reason']}"
        if acted
        else "",
        "sequences": sequences,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _sequence(row: Mapping[str, Any], most: int, *, shows_prompt: bool) -> dict[str, Any]:
    """Returns the tokens of a sequence; ``turns`` are those that the model sampled, None all of them."""
    logps = (round(x, 3) if x is not None and math.isfinite(x) else None for x in row["logps"][:most])
    turns = row["turns"]
    return {
        "fork": row["fork"],
        "prompt": shorten(row["prompt"]) if shows_prompt else "",
        "length": len(row["tokens"]),
        "tokens": row["tokens"][:most],
        "logps": list(logps),
        "turns": None if turns is None else [[turn["start"], turn["end"], _finite(turn["reward"])] for turn in turns],
    }
