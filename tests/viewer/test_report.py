"""The report shows the run's own numbers, is safe to open, and needs nothing but itself."""

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridflow.tracking.events import EventLog
from hybridflow.tracking.jsonl import MetricsFile
from hybridflow.tracking.rollouts import write_rollouts
from hybridflow.viewer.report import gather, write_report
from hybridflow.viewer.samples import explain

GRPO = {"advantage": "grpo", "normalize_by_std": True}


class Page(HTMLParser):
    """What a browser finds in a page: elements, attributes, and the data of the report."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.title = self.json = ""
        self._inside = ""
        self.feed(self.text)
        self.data = json.loads(self.json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = "json" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.json += data
        elif self._inside == "title":
            self.title += data


def answers(
    step: int, rewards: Sequence[float], *, draw: int = 0, evaluation: bool = False, **changes: Any
) -> list[dict[str, Any]]:
    """A group of answers, or one evaluation answer per reward, each to a prompt of its own."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
    return [
        {
            "step": step,
            "draw": i if evaluation else draw,
            "sample": 0 if evaluation else i,
            "data_source": "carry",
            "prompt": f"<|user|>{i}+{draw}=",
            "response": f"answer {i}",
            "reward": reward,
            "advantage": None if evaluation else (reward - mean) / (std + 1e-6),
            "finish_reason": "stop",
            "ground_truth": "42",
            "token_ids": [1, 2],
            "tokens": ["answer", f" {i}"],
            "logps": [-0.25, -2.5],
        }
        | changes
        for i, reward in enumerate(rewards)
    ]


def make_run(folder: Path, *, steps: int = 10, total: int = 10) -> Path:
    """A small run as the trainer leaves it."""
    folder.mkdir()
    config = {"model": {"path": "carry-sft"}, "train": {"steps": total, "prompts_per_step": 2}, "algorithm": GRPO}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    file = MetricsFile(folder / "metrics.jsonl")
    for step in range(steps + 1):
        metrics = {"timing_s/step": 2.0, "timing_s/gen": 1.5, "timing_s/agent_loop/tool_calls/max": 9.0}
        if step % 5 == 0:
            metrics["val-core/carry/reward/mean@1"] = 0.25 + 0.0625 * step
            write_rollouts(
                folder / f"evaluations/step-{step:06d}.parquet",
                answers(step, [0.0, 1.0, float(step > 0)], evaluation=True),
            )
        if step:
            metrics |= {"critic/score/mean": step / 16, "actor/entropy": 1 / step, "perf/throughput": 5000.0}
            rows = answers(step, [1.0, 0.0, 0.0, 0.0], draw=2 * step) + answers(step, [1.0] * 4, draw=2 * step + 1)
            write_rollouts(folder / f"rollouts/step-{step:06d}.parquet", rows)
        file.append(step, metrics)
    return folder


def chart(data: dict[str, Any], title: str) -> dict[str, list[list[float]]]:
    """The points of each line of a chart."""
    return {line["label"]: line["points"] for c in data["charts"] if c["title"] == title for line in c["lines"]}


def test_the_report_has_the_numbers_of_the_run(tmp_path: Path):
    run = make_run(tmp_path / "carry-grpo")
    EventLog(run / "events.jsonl").append("done", "10 steps")
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    data = page.data
    assert page.title == data["title"] == "carry-grpo"
    assert data["status"] == {"word": "done", "text": "10 steps"}
    assert chart(data, "Reward") == {
        "in training": [[step, step / 16] for step in range(1, 11)],
        "held out, carry": [[0, 0.25], [5, 0.5625], [10, 0.875]],
    }
    assert [c["title"] for c in data["charts"] if c["big"]] == ["Reward"]
    tiles = {tile["label"]: tile["value"] for tile in data["tiles"]}
    assert tiles["Held-out accuracy"] == "0.875" and tiles["Throughput"] == "5,000" and tiles["Time"] == "22 s"
    assert data["phases"]["names"] == ["gen", "other"] and data["phases"]["shares"] == [0.75, 0.25]
    assert "carry-sft" in data["config"] and [e["kind"] for e in data["events"]] == ["done"]


@pytest.mark.parametrize(
    ("rewards", "label"),
    [
        ([0.0, 1.0], "Held-out accuracy"),
        ([0.0, 0.5], "Held-out mean reward"),
        ([-1.0, 1.0], "Held-out mean reward"),
        ([3.0, 7.5], "Held-out mean reward"),
    ],
)
def test_a_held_out_reward_is_called_an_accuracy_only_where_it_is_one(rewards: list[float], label: str, tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    write_rollouts(run / "evaluations/step-000000.parquet", answers(0, rewards, evaluation=True))
    assert [t["label"] for t in gather(run)["tiles"] if t["label"].startswith("Held")] == [label]


def test_before_and_after_are_the_same_prompts_at_the_first_and_last_evaluation(tmp_path: Path):
    found = Page(write_report(make_run(tmp_path / "run"))).data["evaluations"]
    assert found["steps"] == [0, 10] and found["total"] == 3
    assert found["kinds"] == [["wrong \u2192 right", 1], ["wrong \u2192 wrong", 1], ["right \u2192 right", 1]]
    changed = next(pair for pair in found["pairs"] if pair["kind"] == "wrong \u2192 right")
    assert changed["prompt"] == "<|user|>2+0=" and [a["reward"] for a in changed["answers"]] == [0.0, 1.0]


def test_rollouts_of_first_middle_and_last_step_say_why(tmp_path: Path):
    found = Page(write_report(make_run(tmp_path / "run", steps=9))).data["rollouts"]
    assert [step["step"] for step in found["steps"]] == [1, 5, 9] and found["available"] == 9
    first = found["steps"][0]
    assert (first["groups"], first["with_signal"], first["answers"]) == (2, 1, 8)
    assert first["which"] == "1 group with advantages; 1 group without"
    varied, equal = first["shown"]
    assert varied["answers"][0]["why"] == "reward 1.00, group mean 0.25, std 0.50 \u2192 advantage +1.50"
    assert varied["answers"][1]["why"] == "reward 0.00, group mean 0.25, std 0.50 \u2192 advantage -0.50"
    assert equal["answers"][0]["why"] == "all 4 responses of the group have reward 1.00 \u2192 advantage 0"
    (sequence,) = varied["answers"][3]["sequences"]
    assert sequence["tokens"] == ["answer", " 3"] and sequence["logps"] == [-0.25, -2.5] and sequence["turns"] is None
    assert varied["answers"][3]["ending"] == "" and varied["answers"][3]["length"] == 2


def test_a_trajectory_shows_turns_calls_observations_and_why_it_forked(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=1)
    call = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    told = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "a1"},
        {"role": "assistant", "content": "=2"},
    ]
    turns = [
        {"start": 0, "end": 1, "finish_reason": "stop", "reward": 0.5, "anchor": None},
        {"start": 2, "end": 3, "finish_reason": "stop", "reward": None, "anchor": None},
    ]
    acted = {"finish_reason": "done", "messages": json.dumps(told)}
    both = [
        row | acted | {"sample": sample, "tokens": ["hm", "<2>", "=2"], "logps": [-0.5, 0.0, -0.25], "turns": turns}
        for sample, row in enumerate(answers(1, [1.0, 0.0]))
    ]
    fork = {"sequence": 1, "fork": "thoughts dropped", "prompt": "anew", "messages": None, "turns": turns[:1]}
    write_rollouts(run / "rollouts/step-000001.parquet", [*both, both[1] | fork])
    write_rollouts(run / "evaluations/step-000000.parquet", [row | acted for row in answers(0, [1.0], evaluation=True)])
    data = Page(write_report(run)).data
    (step,) = data["rollouts"]["steps"]
    (group,) = step["shown"]
    assert (step["answers"], group["size"]) == (2, 2)
    first, second = group["answers"]
    assert (first["length"], first["ending"]) == (2, "2 turns, 1 call, ended: done")
    assert first["sequences"][0]["turns"] == [[0, 1, 0.5], [2, 3, None]]  # token 1 is an observation
    assert first["why"].startswith("reward 1.00, group mean 0.50")
    assert [(s["fork"], s["prompt"]) for s in second["sequences"]] == [("", ""), ("thoughts dropped", "anew")]
    assert (second["length"], second["ending"]) == (3, "3 turns, 1 call, ended: done")
    (answer,) = data["evaluations"]["pairs"][0]["answers"]
    assert answer["ending"] == "done"
    assert [(m["role"], m["text"], m["calls"]) for m in answer["messages"]] == [
        ("assistant", "hm", ['add({"a": 1})']),
        ("tool", "2", []),
        ("assistant", "=2", []),
    ]


def test_why_never_claims_a_rule_that_does_not_give_the_recorded_number():
    dr_grpo = {"advantage": "grpo", "normalize_by_std": False}
    assert explain(1.0, [1.0, 0.0], 0.5, dr_grpo) == "reward 1.00, group mean 0.50 \u2192 advantage +0.50"
    assert "as recorded" in explain(1.0, [1.0, 0.0], 0.9, GRPO)
    assert "estimator rloo" in explain(1.0, [1.0, 0.0], 1.0, {"advantage": "rloo"})


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- <script> ]]> & &lt; \u2028 \\u003c {{title}} {{data}} '\"`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_the_model_stays_text(tmp_path: Path, text: str):
    harmless = Page(write_report(make_run(tmp_path / "harmless")))
    run = make_run(tmp_path / "run")
    changes: dict[str, Any] = {
        "response": text,
        "prompt": text,
        "ground_truth": text,
        "data_source": text,
        "tokens": [text, text],
    }
    write_rollouts(run / "evaluations/step-000000.parquet", answers(0, [0.0], evaluation=True, **changes))
    write_rollouts(run / "rollouts/step-000001.parquet", answers(1, [1.0, 0.0], **changes))
    EventLog(run / "events.jsonl").append("warning", text)
    page = Page(write_report(run))
    assert page.tags == harmless.tags and page.attributes == harmless.attributes
    answer = page.data["rollouts"]["steps"][0]["shown"][0]
    assert answer["prompt"] == text and answer["answers"][0]["sequences"][0]["tokens"] == [text, text]
    assert page.data["evaluations"]["pairs"][0]["answers"][0]["response"] == text
    assert page.data["events"][0]["text"] == text


def test_a_hostile_folder_name_stays_text(tmp_path: Path):
    name = "<b>run {{data}}&amp;"
    page = Page(write_report(make_run(tmp_path / name)))
    assert page.title == page.data["title"] == name and "b" not in page.tags


def test_nothing_is_loaded_from_anywhere(tmp_path: Path):
    page = Page(write_report(make_run(tmp_path / "run")))
    assert "http://" not in page.text and "https://" not in page.text and "//cdn" not in page.text
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("events", "steps", "word"),
    [
        ([("stopped", "after step 4 of 10: Ctrl-C")], 4, "stopped"),
        ([("stopped", "after step 4 of 10: Ctrl-C"), ("resume", "resuming after step 4")], 6, "unfinished"),
        ([("stopped", "after step 4 of 10: Ctrl-C"), ("resume", "going on"), ("done", "10 steps")], 10, "done"),
        ([], 6, "unfinished"),
        ([], 10, "done"),
    ],
)
def test_the_status_is_that_of_the_last_process(tmp_path: Path, events: list[tuple[str, str]], steps: int, word: str):
    run = make_run(tmp_path / "run", steps=steps)
    for kind, text in events:
        EventLog(run / "events.jsonl").append(kind, text)
    status = Page(write_report(run)).data["status"]
    assert status["word"] == word
    if word == "unfinished":
        assert "step 6 of 10" in status["text"]


def test_files_of_steps_that_a_killed_process_left_are_not_shown(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=10)
    MetricsFile(run / "metrics.jsonl").truncate_after(6)
    data = Page(write_report(run)).data
    assert data["rollouts"]["steps"][-1]["step"] == 6 and data["evaluations"]["steps"] == [0, 5]


def test_a_supervised_run_and_an_empty_one_have_reports(tmp_path: Path):
    run = tmp_path / "sft"
    run.mkdir()
    assert Page(write_report(run)).data["charts"] == []
    file = MetricsFile(run / "metrics.jsonl")
    for step in range(1, 6):
        file.append(step, {"train/loss": 4 / step, "train/grad_norm": math.nan if step == 3 else 1.0, "train/lr": 1e-3})
    data = Page(write_report(run)).data
    assert [c["title"] for c in data["charts"]] == ["Loss", "Gradient norm", "Learning rate"]
    assert chart(data, "Loss")["Loss"][0] == [1, 4.0]
    assert chart(data, "Gradient norm")["Gradient norm"][2] == [3, None]
    assert data["evaluations"] is None and data["rollouts"]["steps"] == []


def test_a_large_run_has_a_modest_report_that_says_what_it_leaves_out(tmp_path: Path):
    run = make_run(tmp_path / "run")
    file = MetricsFile(run / "metrics.jsonl")
    for step in range(11, 4_000):
        file.append(
            step,
            {f"metric/{i}": step * math.pi for i in range(12)}
            | {"actor/entropy": 1 / step, "timing_s/step": 1.0, "timing_s/gen": 0.5},
        )
    long = {
        "response": "word " * 9_000,
        "tokens": ["token "] * 2_000,
        "logps": [-1.5] * 2_000,
        "token_ids": [1] * 2_000,
    }
    rows = [row for draw in range(20) for row in answers(10, [1.0, 0.0] * 8, draw=draw, **long)]
    for step in (1, 5, 10):
        write_rollouts(run / f"rollouts/step-{step:06d}.parquet", rows)
    write_rollouts(run / "evaluations/step-000010.parquet", answers(10, [1.0, 0.0, 1.0] * 60, evaluation=True, **long))
    path = write_report(run)
    assert path.stat().st_size < 2_000_000
    data = Page(path).data
    assert data["stride"] == 4 and len(chart(data, "Entropy")["Entropy"]) <= 1_001
    assert chart(data, "Entropy")["Entropy"][-1][0] == 3_999
    bars = data["phases"]["rows"]
    assert len(bars) <= 200 and bars[0][:2] == [0, 19] and bars[-1][1] == 3_999
    assert bars[0][2] == [1.05, 0.5]  # the mean of the bar's steps: gen took 1.5 s eleven times, then 0.5 s nine times
    step = data["rollouts"]["steps"][0]
    assert step["groups"] == 20 and len(step["shown"]) == 4
    group = step["shown"][0]
    assert group["size"] == 16 and len(group["answers"]) == 8
    assert group["answers"][0]["length"] == 2_000 and len(group["answers"][0]["sequences"][0]["tokens"]) == 400
    assert "characters left out" in data["evaluations"]["pairs"][0]["answers"][1]["response"]


NUMBERS = (
    st.none() | st.floats() | st.sampled_from([0.0, -0.0, 3e38, 1e300, 1.797694e308, math.nan, math.inf, -math.inf])
)
METRICS = ("critic/score/mean", "val-core/carry/reward/mean@1", "actor/entropy", "reward/acc/mean", "train/loss")


@st.composite
def steps_of_a_run(draw: st.DrawFn) -> list[tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]]:
    """Metrics, rollouts and evaluation answers of some steps: whatever values the columns can hold, or none at all."""
    text = draw(st.sampled_from([*HOSTILE, "", "caf\u00e9 \u2713", "\x00\n", "bad \ud83d"]))

    def rows(step: int, evaluation: bool) -> list[dict[str, Any]]:
        found = []
        for draw_of, size in enumerate(draw(st.lists(st.integers(1, 3), max_size=2))):
            for row in answers(step, [0.0] * size, draw=draw_of, evaluation=evaluation):
                changes = {"reward": draw(NUMBERS), "response": text, "data_source": text, "ground_truth": text}
                logps = draw(st.lists(NUMBERS, min_size=2, max_size=2))
                found.append(row | changes | {"advantage": draw(NUMBERS), "logps": logps})
        return found

    def measured() -> dict[str, float]:
        found = {name: draw(NUMBERS) for name in draw(st.sets(st.sampled_from(METRICS)))}
        return {name: math.nan if value is None else value for name, value in found.items()} | {
            "timing_s/step": draw(st.sampled_from([0.0, 1.0, math.nan])), "count": draw(st.sampled_from([0, 10**400]))
        }  # fmt: skip

    return [(measured(), rows(step, False), rows(step, True)) for step in range(draw(st.integers(1, 3)))]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps_of_a_run())
def test_whatever_a_run_can_write_has_a_report(steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        (run / "config.yaml").write_text(yaml.safe_dump({"algorithm": GRPO}))
        file = MetricsFile(run / "metrics.jsonl")
        for step, (measured, rollouts, evaluated) in enumerate(steps):
            file.append(step, measured)
            write_rollouts(run / f"rollouts/step-{step:06d}.parquet", rollouts)
            write_rollouts(run / f"evaluations/step-{step:06d}.parquet", evaluated)
        data = Page(write_report(run)).data
    finite = [
        [r["reward"] for r in rows if r["reward"] is not None and math.isfinite(r["reward"])] for _, rows, _ in steps
    ]
    for shown in data["rollouts"]["steps"]:
        given = finite[shown["step"]]
        assert shown["reward"] == (statistics.mean(given) if given else None)
        for group in shown["shown"]:
            for answer in group["answers"]:
                assert (answer["reward"] is None) == (answer["why"] == "no reward: not trained on")


@pytest.mark.parametrize("damaged", [b"train: [", b"", b"- 1", b"\xff\xfe: 1", b"train:\n\tsteps: 3", b"train: 3"])
def test_a_run_whose_settings_are_damaged_has_a_report_of_its_records(damaged: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_bytes(damaged)
    data = Page(write_report(run)).data
    assert data["steps"] == [0, 10] and data["config"] == damaged.decode(errors="replace")
