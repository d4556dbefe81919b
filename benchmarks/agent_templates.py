"""Training rows per rollout over real chat templates: turns appended as tokens, beside a fresh rendering of every turn.

    python scripts/fetch_tokenizers.py
    python benchmarks/agent_templates.py benchmarks/results/agent_templates.json

Conversations of eight turns are played on each template. The model writes its turns as the template would, or in its
own way: a call with other spaces, a space behind a text, a token split in two, as sampling does. A row is a sequence
that is trained on. With a fresh rendering of every turn a new row begins wherever its tokens are not those that the
model saw and sampled; with appending, where the template rewrites. Also: milliseconds of a turn on the bridge, behind
2 and behind 20 turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybridflow.chat.bridge import Bridge
from hybridflow.chat.template import Style
from hybridflow.chat.tool_calls import FORMATS

from measuring import record

TOKENIZERS = Path(__file__).resolve().parents[1] / ".tokenizers"
TURNS, CONVERSATIONS = 8, 20
THOUGHT = "<think>\nI need the product of {a} and {b}, so I compute it.\n</think>\n\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Computes the value of an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as 47*85."}},
            "required": ["expression"],
        },
    },
}
Talk = list[tuple[dict[str, Any], str, list[dict[str, Any]]]]  # turns: message, text, what follows


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def deepseek(arguments: dict[str, Any]) -> str:
    """Returns a call as DeepSeek V3 writes it."""
    body = f"<|tool_call_begin|>function<|tool_sep|>calculate\n```json\n{json.dumps(arguments)}\n```<|tool_call_end|>"
    return f"<|tool_calls_begin|>{body}<|tool_calls_end|>".replace("|", "\uff5c").replace("_", "\u2581")


def call_turn(i: int, turn: int, thought: str, render: Callable[[dict[str, Any]], str]) -> Talk:
    """Returns a turn that calls the tool, and its result."""
    a, b = 12 + i, 7 + turn
    arguments, name = {"expression": f"{a}*{b}"}, f"call{i % 100:02d}{turn:03d}"
    call = {"id": name, "type": "function", "function": {"name": "calculate", "arguments": arguments}}
    content = thought.format(a=a, b=b)
    result = {"role": "tool", "tool_call_id": name, "name": "calculate", "content": str(a * b)}
    return [({**said(content), "tool_calls": [call]}, content + render(arguments), [result])]


def talks(kind: str, render: Callable[[dict[str, Any]], str]) -> list[Talk]:
    """Makes conversations of a kind: "plain", "calls", "thoughts and calls", "thoughts, calls, users"."""
    made = []
    for i in range(CONVERSATIONS):
        talk: Talk = []
        for turn in range(TURNS):
            a, b = 12 + i, 7 + turn
            thought = THOUGHT if kind.startswith("thoughts") else ""
            if kind == "plain" or (kind.endswith("users") and turn % 2):
                text = f"{thought.format(a=a, b=b)}{a} times {b} is {a * b}."
                talk.append((said(text), text, [user(f"And {a} times {b + 1}?")]))
            else:
                talk += call_turn(i, turn, thought, render)
        made.append(talk)
    return made


def sampled(tokenizer: PreTrainedTokenizerBase, text: str, turn: int, own: bool) -> list[int]:
    """Returns tokens of a turn as a model samples them; `own`: in its own way on every second turn."""
    end = [int(tokenizer.eos_token_id)]
    if not own or turn % 2:
        return list(tokenizer(text, add_special_tokens=False).input_ids) + end
    text = text.replace('": "', '":  "') if '": "' in text else f"{text} "
    half = text.rfind("is") + 1 or len(text) // 2
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (text[:half], text[half:])]
    return [*parts[0], *parts[1], *end]


def play(bridge: Bridge, talk: Talk, own: bool) -> dict[str, Any]:
    """Plays one conversation both ways; returns rows and tokens of each, and the kinds of forks."""
    messages: list[dict[str, Any]] = [user("What is 12 times 7?")]
    context = bridge.prompt(messages)
    fresh = list(context)
    rows, tokens, forks = [1, 1], [0, 0], Counter[str]()
    for turn, (message, text, news) in enumerate(talk):
        ids = sampled(bridge.tokenizer, text, turn, own)
        context, fresh = context + ids, fresh + ids
        messages.append(message)
        if turn + 1 == len(talk):
            break
        found = bridge.after(messages, ids[-1], news)
        messages += news
        if found.fork:
            rows[0], tokens[0] = rows[0] + 1, tokens[0] + len(context)
            forks[found.fork] += 1
            context = found.token_ids
        else:
            context = context + found.token_ids
        again = bridge.prompt(messages)
        if again[: len(fresh)] != fresh:
            rows[1], tokens[1] = rows[1] + 1, tokens[1] + len(fresh)
        fresh = again
    return {"rows": rows, "tokens": [tokens[0] + len(context), tokens[1] + len(fresh)], "forks": forks}


def measure(bridge: Bridge, kind: str, render: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Counts rows and tokens per rollout, in both ways of writing."""
    found = {}
    for writing in ("as the template", "in its own way"):
        played = [play(bridge, talk, writing == "in its own way") for talk in talks(kind, render)]
        names = ("appended", "rendered again")
        forks = sum((p["forks"] for p in played), Counter[str]())
        found[writing] = {
            "rows": {name: sum(p["rows"][i] for p in played) / len(played) for i, name in enumerate(names)},
            "tokens": {name: sum(p["tokens"][i] for p in played) / len(played) for i, name in enumerate(names)},
            "forks": {name: count / len(played) for name, count in forks.items()},
        }
    return found


def milliseconds(bridge: Bridge, kind: str, render: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    """Measures CPU milliseconds of `Bridge.after` behind 2 and 20 turns, the best of five."""
    costs = {}
    for turns in (2, 20):
        talk = talks(kind, render)[0][:1] * turns
        messages = [user("a"), *(m for message, _, news in talk for m in (message, *news))]
        news = talk[-1][2]
        before, end = messages[: -len(news)], int(bridge.tokenizer.eos_token_id)
        assert not bridge.after(before, end, news).fork
        best = []
        for _ in range(5):
            began = time.process_time()
            for _ in range(200):
                bridge.after(before, end, news)
            best.append((time.process_time() - began) * 5)
        costs[f"{turns} turns"] = round(min(best), 3)
    return costs


def main() -> None:
    def hermes(arguments: dict[str, Any]) -> str:
        return FORMATS["hermes"].render([("calculate", arguments)])

    agentic = ["plain", "calls", "thoughts and calls", "thoughts, calls, users"]
    sides = {
        "qwen3": ("qwen3", Style(tools=(TOOL,)), hermes, agentic),
        "qwen3, thinking off": ("qwen3", Style(tools=(TOOL,), thinking=False), hermes, ["plain", "calls"]),
        "deepseek_v3": ("deepseek_v3", Style(), deepseek, ["plain", "calls"]),
        "llama3_1": ("llama3_1", Style(), hermes, ["plain"]),
        "gemma3": ("gemma3", Style(), hermes, ["plain"]),
        "smollm2": ("smollm2", Style(), hermes, ["plain"]),
    }
    results: dict[str, Any] = {}
    for name, (folder, style, render, kinds) in sides.items():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / folder)
        results[name] = {kind: measure(Bridge(tokenizer, style), kind, render) for kind in kinds}
        append = Bridge(tokenizer, style, "append")
        results[name]["milliseconds of a turn"] = milliseconds(append, kinds[min(1, len(kinds) - 1)], render)
        for kind, found in results[name].items():
            print(name, "|", kind, "|", json.dumps(found))
    workload = {"turns": TURNS, "conversations": CONVERSATIONS, "own way": "every second turn"}
    command = f"python benchmarks/agent_templates.py {sys.argv[1]}"
    Path(sys.argv[1]).write_text(json.dumps(record(command, workload, results), indent=2) + "\n")


if __name__ == "__main__":
    main()
