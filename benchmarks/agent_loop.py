"""The loop's own cost of a turn: everything between a sampled turn and the request for the next one, without a model.

    make tokenizers
    python benchmarks/agent_loop.py --out benchmarks/results/agent_loop.json

An engine that has all its turns ready stands in for the model: each turn calls a tool, with the tokenizer and the chat
template of Qwen3. What is left is parsing the call, making it, rendering and tokenising what comes behind the turn, and
the next request. CPU seconds are taken from one round to the next, in a process of its own on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import record, run_alone

TOKENIZER = Path(__file__).resolve().parents[1] / ".tokenizers/qwen3"
COUNTS, TURNS, LAST = (8, 1024), (2, 20), 22
REPEATS = {8: 15, 1024: 3}
TOOL = '''
def calculator(expression: str) -> str:
    """Computes.

    Args:
        expression: what to compute, such as 3 * (4 + 5)
    """
    return "391 is what comes out of " + expression
'''
CALL = 'So.\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "17 * 23 + %d"}}\n</tool_call>'


@dataclass(frozen=True)
class Question:
    """A prompt."""

    messages: list[dict[str, Any]]
    row: dict[str, Any]
    ground_truth: Any = None
    written: Any = None
    token_ids: tuple[int, ...] = ()


class Ready:
    """An engine whose turns are ready; it writes down the CPU time at the end of each round.

    Args:
        turns: token ids of each turn.
    """

    max_model_len = 32_768

    def __init__(self, turns: Sequence[list[int]]) -> None:
        from hybridflow.protocols.generation import Result, Span

        self.times: list[float] = []
        self._results = [
            lambda handle, ids=ids: Result(handle, list(ids), [-1.0] * len(ids), "stop", [Span(0, 0, len(ids))])
            for ids in turns
        ]
        self._count = 0
        self._asked: list[int] = []

    def submit(self, request: Any) -> int:
        """Takes a request."""
        self._count += 1
        self._asked.append(self._count)
        return self._count

    def wait(self) -> list[Any]:
        """Returns the turn of all requests of the round."""
        self.times.append(time.process_time())
        make = self._results[len(self.times) - 1]
        asked, self._asked = self._asked, []
        return [make(handle) for handle in asked]

    def interrupt(self) -> None:
        """Does nothing: `wait` never waits."""


def measure(count: int) -> dict[str, Any]:
    """Returns CPU milliseconds per turn, by the number of the turn, of one set of trajectories after another."""
    from transformers import AutoTokenizer

    from hybridflow.agents.make import load_tools, make_agents
    from hybridflow.chat.template import Style
    from hybridflow.config.sections.agent import AgentSection
    from hybridflow.groups.driving import Driver
    from hybridflow.groups.playback import Playback
    from hybridflow.noise import NoiseKey
    from hybridflow.protocols.episodes import Start
    from hybridflow.protocols.generation import Sampling

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [[*tokenizer(CALL % i, add_special_tokens=False).input_ids, end] for i in range(LAST)]
    found: dict[int, list[float]] = {turn: [] for turn in TURNS}
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder) / "tool.py"
        tool.write_text(TOOL)
        section = AgentSection(tools=[f"{tool}:calculator"], max_turns=LAST)
        for repeat in range(REPEATS[count] + 1):
            engine = Ready(turns)
            agents = make_agents(
                section, tokenizer, Style(tools=tuple(load_tools(section.tools).schemas)),
                decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
                stops=[end], longest=engine.max_model_len, order="rounds",
            )  # fmt: skip
            driver = Driver(engine, Playback(agents))  # type: ignore[arg-type]
            for i in range(count):
                question = Question([{"role": "user", "content": f"What is 17 * 23 + {i}?"}], {})
                driver.begin(Start(NoiseKey(0, "train", i // 8, i % 8), question, Sampling(10_000)))
            while driver.running:
                driver.advance()
            agents.close()
            for turn, times in found.items():
                if repeat:  # the first one fills caches
                    times.append((engine.times[turn] - engine.times[turn - 1]) / count * 1000)
    return {f"turn {turn}": round(statistics.median(times), 3) for turn, times in found.items()}


def main() -> None:
    """Measures all numbers of trajectories, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, metavar="COUNT", help="one measurement, in this process")
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(measure(args.one)))
        return
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for _ in range(args.rounds):
        for count, some in runs.items():
            some.append(run_alone([sys.executable, str(Path(__file__)), "--one", str(count)]))
    results = {
        f"{count} trajectories": {name: statistics.median(run[name] for run in some) for name in some[0]}
        for count, some in runs.items()
    }
    print(json.dumps(results, indent=1))
    if args.out is not None:
        workload = {"tokenizer": "Qwen3", "turns": LAST, "call": CALL, "unit": "CPU ms of a turn"}
        command = f"python benchmarks/agent_loop.py --out {args.out}"
        args.out.write_text(json.dumps(record(command, workload, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
