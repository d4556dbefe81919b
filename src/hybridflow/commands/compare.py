"""Compares two models on the same prompts: `hybridflow eval A B`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridflow.checkpoint.run_folder import flatten, make_folder, write_atomically
from hybridflow.commands.evaluate import evaluate_model
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.choices import settled
from hybridflow.errors import UserError
from hybridflow.evaluation.statistics import bootstrap, permutation_test, sign_test
from hybridflow.noise import NoiseKey
from hybridflow.runs.finished import said
from hybridflow.tracking.rollouts import read_rollouts

# Settings that decide about responses and rewards, but for those of the second list.
DECIDING = ("data.", "eval.", "reward.", "rollout.", "model.", "agent.")
NOT_DECIDING = (
    *("model.path", "model.packing", "reward.pool.", "rollout.max_cache_tokens", "rollout.compile"),
    *("agent.processes", "agent.parallel_calls"),
)
Question = tuple[str, str, str, int]  # data source, last message of the user, ground truth, which of equal ones


def compare(
    first: str, second: str, config: EvalConfig | None = None, *, note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compares two evaluations prompt by prompt; models are evaluated first.

    Rewards of 0 and 1 with one response to each prompt are compared by McNemar's exact test, others by a paired
    permutation test on each prompt's mean reward. The interval of the difference is a bootstrap over prompts.

    Args:
        first: folder of an evaluation; or, with a configuration, a model as ``model.path`` takes it.
        second: the same.
        config: how to evaluate models; each goes into a folder of its own inside ``run.folder``, "a" and "b".
        note: takes a line about the progress now and then.

    Returns:
        Plain values: "a", "b", "sources" (one comparison for each data source), "only_in_a", "only_in_b",
        "differences" (settings in which they were evaluated otherwise, with the value of each).

    Raises:
        UserError: there is neither an evaluation nor a model that can be evaluated, or the two share no prompt.
    """
    folders = [_evaluation(path, name, config, note) for path, name in ((first, "a"), (second, "b"))]
    a, b = (_rewards(folder) for folder in folders)
    both = [question for question in a if question in b]
    if not both:
        raise UserError(
            f"{first} and {second} have no prompt in common", fix="evaluate both on the same rows (data.eval)"
        )
    names = sorted({question[0] for question in both})
    result: dict[str, Any] = {
        "a": first,
        "b": second,
        "prompts": len(both),
        "only_in_a": len(a) - len(both),
        "only_in_b": len(b) - len(both),
        "differences": _differences(*folders),
        "sources": {
            name: _paired(name, [a[q] for q in both if q[0] == name], [b[q] for q in both if q[0] == name])
            for name in names
        },
    }
    if config is not None:
        folder = Path(config.run.folder)
        make_folder(folder)
        write_atomically(folder / "comparison.json", json.dumps(result, indent=1) + "\n")
    return result


def comparison_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields a comparison as lines for a reader."""
    for name, s in result["sources"].items():
        yield f"{name}: {s['prompts']} prompts"
        yield f"  A {result['a']}: {s['mean_a']:.4f}"
        yield f"  B {result['b']}: {s['mean_b']:.4f}"
        low, high = s["interval"]
        interval = f"95 % interval {low:+.4f} to {high:+.4f}"
        yield f"  B - A = {s['difference']:+.4f}, {interval}, p = {s['p']:.3g} ({s['test']})"
        yield f"  B is better on {s['b_better']} prompts, A on {s['a_better']}, equal on {s['equal']}"
    for key, (in_a, in_b) in result["differences"].items():
        yield f"warning: they were evaluated differently: {key} was {said(in_a)} for A and {said(in_b)} for B"
    if result["only_in_a"] or result["only_in_b"]:
        alone = f"{result['only_in_a']} prompts were asked only of A and {result['only_in_b']} only of B"
        yield f"warning: {alone}; they are left out"


def _paired(source: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compares two models on one data source; a and b are the rewards of the same prompts."""
    mean_a, mean_b = ([math.fsum(rewards) / len(rewards) for rewards in side] for side in (a, b))
    differences = [y - x for x, y in zip(mean_a, mean_b)]
    better_a, better_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    if all(len(rewards) == 1 and rewards[0] in (0, 1) for rewards in [*a, *b]):
        p, test = sign_test(better_a, better_b), "McNemar's exact test"
    else:
        p, how = permutation_test(differences, NoiseKey(0, f"permutation/{source}"))
        test = f"paired permutation test, {how}"
    return {
        "prompts": len(differences),
        "mean_a": math.fsum(mean_a) / len(mean_a),
        "mean_b": math.fsum(mean_b) / len(mean_b),
        "difference": math.fsum(differences) / len(differences),
        "interval": list(bootstrap(differences, NoiseKey(0, f"difference/{source}"))),
        "p": p,
        "test": test,
        "a_better": better_a,
        "b_better": better_b,
        "equal": len(differences) - better_a - better_b,
    }


def _evaluation(path: str, name: str, config: EvalConfig | None, note: Callable[[str], None] | None) -> Path:
    """Returns the folder of an evaluation: the one given, or that of the model given."""
    folder = Path(path)
    if (folder / "evaluation.json").is_file() and (folder / "answers.parquet").is_file():
        return folder
    if config is None:
        raise UserError(
            f"{path} is not the folder of an evaluation (evaluation.json and answers.parquet)",
            why="a model has to be evaluated first, and that needs a configuration",
            fix="hybridflow eval A B --config eval.yaml, where A and B are models, runs or evaluations",
        )
    run = config.run.model_copy(update={"folder": str(Path(config.run.folder) / name)})
    model = config.model.model_copy(update={"path": path})
    evaluate_model(config.model_copy(update={"run": run, "model": model}), note=note)
    return Path(run.folder)


def _differences(a: Path, b: Path) -> dict[str, list[Any]]:
    """Returns the settings that affect responses and rewards and differ between the two evaluations."""
    first, second = (_settings(folder) for folder in (a, b))
    keys = sorted(first.keys() | second.keys()) if first and second else []
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def _settings(folder: Path) -> dict[str, Any]:
    """Returns how an evaluation was made, as dotted keys; empty where no record exists."""
    with suppress(ValueError, AttributeError):
        noted = json.loads((folder / "evaluation.json").read_text(encoding="utf-8")).get("settings") or {}
        found = flatten(settled(RlConfig, noted))  # whose sections an evaluation has
        return {
            key: value
            for key, value in found.items()
            if key == "run.seed" or (key.startswith(DECIDING) and not key.startswith(NOT_DECIDING))
        }
    return {}


def _rewards(folder: Path) -> dict[Question, list[float]]:
    """Reads the rewards of all responses to each prompt. Equal prompts are told apart by their order."""
    answers: dict[tuple[tuple[str, str, str], int], list[float]] = defaultdict(list)
    for row in read_rollouts(folder / "answers.parquet"):
        if row["sequence"]:
            continue  # the reward is that of the whole response, whose first sequence has it already
        answers[(row["data_source"], row["question"], row["ground_truth"]), row["draw"]].append(row["reward"])
    found: dict[Question, list[float]] = {}
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    for question, draw in sorted(answers, key=lambda key: key[1]):
        found[*question, seen[question]] = answers[question, draw]
        seen[question] += 1
    return found
