"""The audit finds what is wrong with a reward, and nothing where nothing is; every shipped reward passes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.cli.main import main
from hybridflow.commands.audit_reward import AuditOptions, AuditRows, audit_reward
from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.rewards.audit.audit import Report, audit
from hybridflow.rewards.audit.cases import CASES
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.verifiable.registry import REWARDS

FORM = "Sum: {ground_truth}."
SUMS = ((3, 4), (10, 15), (40, 21), (300, 33), (7, 5), (29, 60))
# What an honest reward of such answers is: the last line alone counts, and a number in it must be the only one.
HONEST = """
import re

def right(response, ground_truth):
    found = re.fullmatch(r"Sum: \\$?\\+?((?:[0-9]{1,20}|[0-9]{1,3}(?:,[0-9]{3})+)(?:\\.0*)?)( dollars| cm)?\\.*", response.strip().rpartition("\\n")[2].strip())
    return float(found is not None and float(found[1].replace(",", "") or -1) == float(ground_truth))
"""  # noqa: E501
BAD = {
    "deletes_separators": "return right(re.sub('[ ,;&]+', '', response).replace('Sum:', 'Sum: '), ground_truth)",
    "skips_a_bare_marker": "lines = [line for line in response.split('\\n') if re.search('[0-9]', line)]\n"
    "    return right((lines or [''])[-1], ground_truth)",
    "found_anywhere": "return float(str(ground_truth) in response)",
    "noisy": "import random\n    return right(response, ground_truth) + random.random() / 10",
    "hashing": "return right(response, ground_truth) + hash(response) % 7 / 100",
    "hangs": "import time\n    len(response) > 100_000 and time.sleep(60)\n    return right(response, ground_truth)",
    "crashes": "import os\n    '{{' in response and os._exit(3)\n    return right(response, ground_truth)",
    "raises": "int(re.search('[0-9]+', response)[0])\n    return right(response, ground_truth)",
    "remembers": "seen.add(response)\n    return right(response, ground_truth) + len(seen) / 10_000",
    "likes_empty": "return 0.4 if not response.strip() else right(response, ground_truth)",
    "changes_the_row": "row['seen'] = 1\n    return right(response, ground_truth)",
    "nan": "return float('nan') if '$' in response else right(response, ground_truth)",
    "main_thread_only": "import threading\n    main = threading.current_thread() is threading.main_thread()\n"
    "    return right(response, ground_truth) * main",
    "grows": "kept.append(bytearray(50_000))\n    return right(response, ground_truth)",
    "uneven": "s = right(response, ground_truth)\n    return {'score': s, 'seen': 1.0} if s else s",
    "upside_down": "return 1 - right(response, ground_truth)",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {a} and {b} in all?", "ground_truth": str(a + b)} for a, b in SUMS]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(
    tmp_path: Path,
    rows: Path,
    name: str,
    *,
    processes: int = 0,
    timeout: float = 10,
    calls: int = 0,
    heavy: bool = False,
) -> Report:
    """The audit of one of the rewards above."""
    file = tmp_path / f"{name}.py"
    body = BAD.get(name, "return right(response, ground_truth)")
    file.write_text(f"{HONEST}\nseen, kept = set(), []\n\ndef {name}(response, ground_truth, row):\n    {body}\n")
    pool = RewardPoolSection(processes=processes, timeout=timeout)
    options = AuditOptions(pool=pool, heavy=heavy, calls=calls)
    return audit_reward(f"{file}:{name}", AuditRows(str(rows), right=FORM), options)


def found(report: Report) -> set[tuple[str, str]]:
    return {(finding.kind, finding.text) for finding in report.findings if finding.fault}


def test_an_honest_reward_is_clean(tmp_path: Path, rows: Path) -> None:
    report = run(tmp_path, rows, "honest", processes=1, calls=2000, heavy=True)
    assert found(report) == set()
    assert report.ok and report.answers > 500 and report.cases == len(SUMS)
    assert report.measured["calls per CPU second"] > 1000
    assert {f.text for f in report.findings if f.kind == "false reject"} <= {
        "CRLF line ends", "bold", "full-width digits", "white space inside", "no-break spaces",
    }  # fmt: skip


def test_a_reward_of_trls_form_is_audited_on_the_prompts_that_its_rows_have(tmp_path: Path, rows: Path) -> None:
    scored = "return [right(c, t) for c, t in zip(completions, ground_truth)]"
    (tmp_path / "trl.py").write_text(f"{HONEST}\ndef trl(completions, ground_truth, **columns):\n    {scored}\n")
    options = AuditOptions(pool=RewardPoolSection(processes=0), heavy=False, calls=0)
    assert found(audit_reward(f"{tmp_path / 'trl.py'}:trl", AuditRows(str(rows), right=FORM), options)) == set()


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("deletes_separators", "false accept", "separators elsewhere"),
        ("skips_a_bare_marker", "false accept", "a marker without an answer after it"),
        ("noisy", "unstable", "scored twice in a row"),
        ("hashing", "unstable", "scored in another process"),
        ("remembers", "unstable", "in another order and together with others"),
        ("main_thread_only", "unstable", "in a thread that is not the main one"),
        ("raises", "failure", "raised: empty"),
        ("nan", "failure", "nonsense: a currency"),
        ("upside_down", "failure", "a right response earns no more than a wrong one"),
        ("likes_empty", "leak", "empty: earns more than a wrong answer"),
        ("changes_the_row", "leak", "it changes the row"),
        ("uneven", "range", "responses have different components: none or seen"),
    ],
)
def test_a_bad_reward_is_found(tmp_path: Path, rows: Path, name: str, kind: str, text: str) -> None:
    report = run(tmp_path, rows, name)
    assert not report.ok
    assert [f for f in report.findings if f.kind == kind and text in f.text], found(report)
    assert all(f.example is None or len(str(f.example)) < 2000 for f in report.findings)


def test_false_accepts_have_the_shortest_answer_as_their_example(tmp_path: Path, rows: Path) -> None:
    report = run(tmp_path, rows, "found_anywhere")
    accepted = {f.text: f for f in report.findings if f.kind == "false accept"}
    both = "two answers, accepted in both orders: right or wrong and wrong or right"
    assert {both, "0 to 1000 counted through", "the ground truth quoted", "a list of candidates"} <= set(accepted)
    finding = accepted["other numbers"]
    assert finding.example == {"answer": "'Sum: -7.'", "ground truth": "'7'", "score": 1.0}
    assert f"({finding.count} of {finding.of})" in finding.lines()[0] and 1 <= finding.count < finding.of


def test_growing_memory_is_found(tmp_path: Path, rows: Path) -> None:
    report = run(tmp_path, rows, "grows", calls=2000)
    assert [f.text for f in report.findings if f.kind == "leak" and "its process grew by" in f.text]


@pytest.mark.slow
def test_a_reward_that_hangs_or_dies_is_found_and_not_suffered(tmp_path: Path, rows: Path) -> None:
    hangs = run(tmp_path, rows, "hangs", processes=1, timeout=0.5, heavy=True)
    assert ("failure", "timeout: 1 MB of letters") in found(hangs)
    assert any("were not scored, because 5 others took too long" in f.text for f in hangs.findings)
    assert hangs.answers > 500
    crashes = run(tmp_path, rows, "crashes", processes=1)
    assert ("failure", "died: code as the answer") in found(crashes)


def test_a_ground_truth_in_the_prompt_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Which is larger, {n} or {n - 3}?", "ground_truth": str(n)} for n in (15, 28, 137)]
    path.write_text("\n".join(map(json.dumps, lines)))
    [note] = [f for f in run(tmp_path, path, "honest").findings if f.kind == "note"]
    assert note.lines()[0] == "note: the prompt holds the ground truth (3 of 3)" and not note.fault


def test_the_command_finds_the_form_of_answers_and_ends_with_1_on_a_fault(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def score(response, ground_truth):\n    return float(f'#### {ground_truth}' in response)\n"
    )
    command = ["audit-reward", "mine.py:score", "--data", str(rows), "--processes", "0"]
    assert main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["verdict"].startswith("not to be trained on: ")
    accepted = {f["text"] for f in report["findings"] if f["kind"] == "false accept"}
    assert {"other numbers", "0 to 1000 counted through"} <= accepted
    assert main([*command, "--allow", "other number"]) == 1
    assert "did you mean 'other numbers'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["by_source"], "'by_source' is not one function"),
        (["environment"], "the reward environment judges no response: it adds up what the environment gave"),
        (["gsm9k"], "'gsm9k' is neither file.py:function"),
        (["mine.py:score"], "give rows with ground truths: --data"),
        (["gsm8k", "--data", "rows.jsonl", "--right", "####"], "without a place for the ground truth"),
        (["gsm8k", "--data", "rows.jsonl", "--response-key", "solution"], "has no column 'solution'"),
        (["qa_em", "--data", "one.jsonl"], "all rows have the same ground truth"),
        (["regex", "--data", "rows.jsonl", "--kwargs", '{"pattern": "x"}'], "in none of the usual forms"),
    ],
)
def test_a_mistake_is_told_in_words(
    arguments: list[str], said: str, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text('{"prompt": "Who?", "ground_truth": "Ada"}\n')
    assert main(["audit-reward", *arguments, "--processes", "0"]) == 1
    assert said in capsys.readouterr().err


def test_a_reward_of_ours_is_audited_with_rows_of_verl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": [{"role": "user", "content": f"{a} + {b}?"}], "reward_model": {"ground_truth": str(a + b)}}
        for a, b in SUMS
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = AuditOptions(pool=RewardPoolSection(processes=0), heavy=False, calls=0)
    report = audit_reward("gsm8k", AuditRows(str(path)), options)
    assert report.ok and report.cases == len(SUMS), found(report)


def test_every_shipped_reward_has_cases() -> None:
    assert set(CASES) == set(REWARDS) - {"environment"}  # which judges no text
    assert all(len(case_set.cases) >= 1 for case_set in CASES.values())


@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"code", "environment"}))
def test_shipped_rewards_accept_no_wrong_answer(name: str) -> None:
    case_set = replace(CASES[name], cases=CASES[name].cases[:2])
    report, _ = audit(name, case_set, InProcessGrader({name: FunctionSpec(name, case_set.kwargs)}), heavy=False)
    assert report.answers > 50
    assert found(report) == set()


@pytest.mark.slow
@pytest.mark.timeout(900)  # that of code takes minutes
@pytest.mark.parametrize("name", sorted(CASES))
def test_shipped_rewards_pass_the_whole_audit(name: str) -> None:
    report = audit_reward(name, None, AuditOptions())
    assert report.ok, "\n".join(report.lines())
