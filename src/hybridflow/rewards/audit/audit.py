"""The audit of a reward: it scores changed right and wrong responses, and its scores are compared with what is known.

Every response is scored alone, and again in another order together with others; a process of its own measures what else
the reward does (`probe`). All scoring uses the graders of training, so that the audit survives a reward which hangs,
dies or raises, and reports it. docs/audit.md explains the result.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from hybridflow.protocols.rewards import Answers, Grader, Score
from hybridflow.rewards.audit import mutations
from hybridflow.rewards.audit.mutations import Expected, KnownCase, responses
from hybridflow.rewards.audit.probe import probe
from hybridflow.rewards.graders.function import FunctionSpec

Kind = Literal["false accept", "false reject", "failure", "unstable", "leak", "range", "note"]
FAULTS = ("false accept", "failure", "unstable", "leak", "range")  # the others are warnings
MOST_TIMEOUTS = 5  # then the audit stops: a reward that always hangs would keep it for hours
IN_FLIGHT = 64  # groups of responses
COMPANY = 8  # responses scored together, the second time
LONG = 100_000  # characters: longer responses are scored once
SHOWN = 160  # characters of a response in the report
OF_TIME = ("timeouts", "undecided")  # components by which rewards say that something took too long
LEAK_MB = 50  # growth of the process over the calls of the probe; more is reported


@dataclass(frozen=True)
class CaseSet:
    """What a reward is audited with.

    Args:
        cases: questions with right and wrong answers.
        groups: of mutations that fit; see `mutations`.
        kwargs: of the reward.
        by_design: mutations that the reward scores otherwise than usual by design, and why.
        partial: wrong answers may earn a part: only a response that earns as much as the right one counts as accepted.
            Else one that earns more than half of the way from the wrong one to the right one.
    """

    cases: tuple[KnownCase, ...]
    groups: tuple[str, ...] = ("text", "answer")
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    by_design: Mapping[str, tuple[Expected, str]] = field(default_factory=dict)
    partial: bool = False


@dataclass(frozen=True)
class Tried:
    """A response and its score; None where it was not scored, because too many others had hung."""

    case: KnownCase
    mutation: str
    expected: Expected
    response: str
    score: Score | None


@dataclass
class Finding:
    """A fault of a reward, or something that its user should know.

    Args:
        kind: of what; `FAULTS` are those that a reward must not be used with.
        text: what it is.
        count: how many responses show it.
        of: among how many.
        example: the shortest of them.
    """

    kind: Kind
    text: str
    count: int = 1
    of: int = 1
    example: dict[str, Any] | None = None

    @property
    def fault(self) -> bool:
        """Whether a reward must not be used with it."""
        return self.kind in FAULTS

    def lines(self) -> list[str]:
        """Returns the finding as lines for a reader."""
        told = f" ({self.count} of {self.of})" if self.of > 1 else ""
        said = [f"{self.kind.upper() if self.fault else self.kind}: {self.text}{told}"]
        for name, value in (self.example or {}).items():
            said.append(f"    {name}: {value if isinstance(value, str) else repr(value)}")
        return said


@dataclass
class Report:
    """What an audit found.

    Args:
        reward: its name.
        cases: number of questions.
        answers: number of responses that were scored.
        findings: faults first.
        by_design: what it does by design, with the reason.
        measured: calls per CPU second, the slowest call, growth of memory, ...
    """

    reward: str
    cases: int
    answers: int
    findings: list[Finding]
    by_design: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def sort(self) -> None:
        """Puts faults first."""
        self.findings.sort(key=lambda finding: (not finding.fault, get_args(Kind).index(finding.kind)))

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.fault for finding in self.findings)

    def count(self, kind: Kind) -> int:
        """Counts the findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.ok:
            kinds = [f"{self.count(kind)} x {kind}" for kind in get_args(Kind) if kind in FAULTS and self.count(kind)]
            return f"not to be trained on: {', '.join(kinds)}"
        if self.count("false reject"):
            return f"usable; {self.count('false reject')} kinds of right responses are rejected"
        return "clean"

    def values(self) -> dict[str, Any]:
        """Returns the values as JSON holds them."""
        findings = [asdict(finding) | {"fault": finding.fault} for finding in self.findings]
        return {**asdict(self), "findings": findings, "ok": self.ok, "verdict": self.verdict}

    def lines(self) -> Iterator[str]:
        """Yields the report as lines for a reader."""
        yield f"{self.reward}: {self.answers} responses to {self.cases} questions"
        for finding in self.findings:
            yield from finding.lines()
        for name, reason in self.by_design.items():
            yield f"by design: {name}: {reason}"
        for name, value in self.measured.items():
            yield f"{name}: {value}"
        yield f"verdict: {self.verdict}"


def audit(
    reward: str, case_set: CaseSet, grader: Grader, *, heavy: bool = True, seed: int = 0
) -> tuple[Report, list[Tried]]:
    """Scores all responses twice, and compares the scores.

    Args:
        reward: its name.
        case_set: what it is audited with.
        grader: scores; it is closed by the caller.
        heavy: with responses of a megabyte.
        seed: of the second order.

    Returns:
        What was found, and the responses with their scores, for `probe`.
    """
    cases = case_set.cases
    plan = [
        (case, *made)
        for index, case in enumerate(cases)
        for made in responses(cases, index, case_set.groups, heavy=heavy and index == 0)
    ]
    plan.sort(key=lambda one: len(one[3]) >= LONG)  # long responses last: where they hang, the others are known
    alone = score_all(grader, [answers_of(case, [response]) for case, _, _, response in plan])
    tried = [Tried(*one, None if scores is None else scores[0]) for one, scores in zip(plan, alone)]
    found = [*judge(case_set, tried), *_company(grader, tried, seed)]
    done = sum(one.score is not None for one in tried)
    by_design = {name: reason for name, (_, reason) in case_set.by_design.items() if reason}
    report = Report(reward, len(cases), done, found, by_design)
    report.sort()
    return report, tried


def add_probe(report: Report, tried: Sequence[Tried], function: FunctionSpec, *, seconds: float, calls: int) -> None:
    """Adds to a report what only a process of its own shows.

    Args:
        report: of `audit`.
        tried: the responses and their scores.
        function: the reward.
        seconds: that the process may take.
        calls: see `probe.probe`.
    """
    again = [one for one in tried if one.score is not None and one.score.failure is None]
    if not again:
        return
    random.Random(len(again)).shuffle(again)  # the process may run out of time: show it some of every kind first
    probed = probe(function, [answers_of(one.case, [one.response]) for one in again], seconds=seconds, calls=calls)
    if isinstance(probed, str):
        report.findings.insert(0, Finding("failure", f"its process {probed}, when it was called directly"))
        return
    for when, scores in [
        ("scored in another process", probed.scores),
        ("scored twice in a row", probed.again),
        ("scored in a thread that is not the main one", probed.in_thread),
    ]:
        report.findings += differences(when, list(zip(again, scores)))
    if probed.changed is not None:
        example = example_of(again[probed.changed])
        report.findings.append(Finding("leak", "it changes the row, the prompt or the ground truth", 1, 1, example))
    if probed.growth_mb > LEAK_MB:
        grown = f"its process grew by {probed.growth_mb:.0f} MB over {probed.calls:,} calls"
        report.findings.append(Finding("leak", grown))
    slowest = max(range(len(probed.seconds)), key=lambda i: probed.seconds[i])
    report.measured |= {
        "calls per CPU second": round(probed.calls / max(probed.cpu_seconds, 1e-9), 1) if probed.calls else 0.0,
        "slowest call": f"{probed.seconds[slowest]:.3f} s, {again[slowest].mutation}",
        "memory grew by": f"{max(probed.growth_mb, 0):.1f} MB over {probed.calls:,} calls",
    }
    report.sort()


def answers_of(case: KnownCase, texts: Sequence[str]) -> Answers:
    """Returns responses to a case, as a grader takes them."""
    prompt = [{"role": "user", "content": case.question}]
    row = {"prompt": prompt, "ground_truth": case.ground_truth, **case.row}
    return Answers(list(texts), case.ground_truth, prompt, row, written=row["prompt"])


def score_all(grader: Grader, asked: Sequence[Answers]) -> list[list[Score] | None]:
    """Returns the scores in the order of the responses; None for a response that was not scored, because too many calls
    had timed out.
    """
    found: list[list[Score] | None] = [None] * len(asked)
    submitted, done, timeouts = 0, 0, 0
    while done < len(asked):
        while submitted < len(asked) and submitted - done < IN_FLIGHT:
            grader.submit(submitted, asked[submitted])
            submitted += 1
        for key, scores in grader.wait():
            found[key] = scores
            done += 1
            timeouts += any(score.kind == "timeout" for score in scores)
        if timeouts >= MOST_TIMEOUTS:
            grader.cancel()
            break
    return found


def judge(case_set: CaseSet, tried: Sequence[Tried]) -> list[Finding]:
    """Derives findings on a reward from the scores of all responses."""
    judged = _Judged()
    for case in case_set.cases:
        mine = [one for one in tried if one.case is case and one.score is not None]
        _judge_case(case_set, mine, judged)
    found = list(judged.findings())
    skipped = sum(one.score is None for one in tried)
    if skipped:
        found.append(
            Finding("note", f"{skipped} responses were not scored, because {MOST_TIMEOUTS} others took too long")
        )
    names = {tuple(sorted(one.score.components)) for one in tried if one.score and one.score.failure is None}
    if len(names) > 1:
        shown = " or ".join(sorted(", ".join(some) or "none" for some in names))
        found.append(Finding("range", f"responses have different components: {shown}"))
    return found


class _Judged:
    """Responses that give a finding, by the kind of finding."""

    def __init__(self) -> None:
        self._shown: dict[tuple[Kind, str], list[Tried]] = {}
        self._of: dict[str, int] = {}

    def count(self, one: Tried) -> None:
        self._of[one.mutation] = self._of.get(one.mutation, 0) + 1

    def add(self, kind: Kind, text: str, one: Tried) -> None:
        self._shown.setdefault((kind, text), []).append(one)

    def findings(self) -> Iterator[Finding]:
        for (kind, text), shown in self._shown.items():
            shortest = min(shown, key=lambda one: len(one.response))
            of = self._of.get(shortest.mutation, len(shown))
            yield Finding(kind, text, len(shown), max(of, len(shown)), example_of(shortest))


def _judge_case(case_set: CaseSet, tried: Sequence[Tried], judged: _Judged) -> None:
    by_name: dict[str, Tried] = {}
    for one in tried:
        judged.count(one)
        by_name.setdefault(one.mutation, one)
        assert one.score is not None
        if one.score.failure is not None:
            judged.add("failure", f"{one.score.failure.kind}: {one.mutation}", one)
    right, wrong = (_value(by_name.get(name)) for name in (mutations.RIGHT, mutations.WRONG))
    if right is None or wrong is None:
        return
    if right <= wrong:
        judged.add("failure", "a right response earns no more than a wrong one", by_name[mutations.RIGHT])
        return
    least = right - 1e-9 if case_set.partial else (right + wrong) / 2 + 1e-9
    for one in tried:
        assert one.score is not None
        if one.score.failure is not None:
            continue
        expected, _ = case_set.by_design.get(one.mutation, (one.expected, ""))
        accepted = one.score.value >= least
        if one.mutation == mutations.NOTHING_AFTER and _value(by_name.get(mutations.RIGHT_THEN_WRONG)) == right:
            continue  # the first answer counts, whatever comes after it
        if accepted and expected == "wrong":
            judged.add("false accept", one.mutation, one)
        if not accepted and expected == "right":
            judged.add("false reject", one.mutation, one)
        if one.mutation in ("empty", "the question") and one.score.value > wrong + 1e-9 and not accepted:
            judged.add("leak", f"{one.mutation}: earns more than a wrong answer", one)
    for orders in mutations.BOTH_ORDERS:
        both = [by_name.get(name) for name in orders]
        if all((value := _value(one)) is not None and value >= least for one in both):
            assert both[0] is not None
            judged.add("false accept", f"two answers, accepted in both orders: {' and '.join(orders)}", both[0])


def _value(one: Tried | None) -> float | None:
    return None if one is None or one.score is None or one.score.failure is not None else one.score.value


def _company(grader: Grader, tried: Sequence[Tried], seed: int) -> list[Finding]:
    """Scores all responses again, in another order and several at once, and returns what differs."""
    again = [one for one in tried if _value(one) is not None and len(one.response) < LONG]
    random.Random(seed).shuffle(again)
    by_case: dict[int, list[Tried]] = {}
    groups: list[list[Tried]] = []
    for one in again:
        mine = by_case.setdefault(id(one.case), [])
        mine.append(one)
        if len(mine) == COMPANY:
            groups.append(by_case.pop(id(one.case)))
    groups += by_case.values()
    scored = score_all(grader, [answers_of(group[0].case, [one.response for one in group]) for group in groups])
    pairs = [(one, score) for group, scores in zip(groups, scored) if scores for one, score in zip(group, scores)]
    return differences("scored again, in another order and together with others", pairs)


def differences(when: str, pairs: Sequence[tuple[Tried, Score]]) -> list[Finding]:
    """Returns at most one finding: the responses whose second score differs from the first."""
    other = [(one, score) for one, score in pairs if one.score is not None and not _same(one.score, score)]
    if not other:
        return []
    one, score = min(other, key=lambda pair: len(pair[0].response))
    example = example_of(one) | {"score then": score.value if score.failure is None else str(score.failure)}
    return [Finding("unstable", f"another score when {when}", len(other), len(pairs), example)]


def _same(a: Score, b: Score) -> bool:
    """Returns whether two scores of a response agree; what they say of time limits depends on the machine, and need not
    agree.
    """
    parts = [{name: value for name, value in s.components.items() if name not in OF_TIME} for s in (a, b)]
    return (a.value, a.kind) == (b.value, b.kind) and parts[0] == parts[1]


def example_of(one: Tried) -> dict[str, Any]:
    """Returns a response in the form that a report shows."""
    assert one.score is not None
    shown = {"answer": shortened(one.response), "ground truth": shortened(one.case.ground_truth)}
    return shown | ({"score": one.score.value} if one.score.failure is None else {"it": one.score.failure.what})


def shortened(value: Any) -> str:
    """Returns any value as one line of text."""
    text = ascii(value)  # ASCII shows look-alike characters as they are
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
