"""`hybridflow audit-reward`: a reward by its name, the rows or the built-in cases that it is audited with, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybridflow.chat.messages import RefusedValue, read_messages
from hybridflow.config.sections.data import PromptDataSection
from hybridflow.config.sections.rewards import SPECIAL, RewardPoolSection, SandboxSection
from hybridflow.data.rows import Row, column, read_rows
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.rewards import Grader
from hybridflow.rewards.audit.audit import CaseSet, Report, add_probe, audit
from hybridflow.rewards.audit.cases import CASES
from hybridflow.rewards.audit.mutations import MUTATIONS, OTHERS, Expected
from hybridflow.rewards.audit.rows import case_of, case_set_of, find_form, truth_in_prompt, with_wrong_answers
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.graders.remote import RemoteGrader
from hybridflow.rewards.pool.grader import ProcessGrader
from hybridflow.rewards.verifiable.registry import REWARDS

PROBE_SECONDS = 100.0  # seconds for the process that calls the reward directly
PROGRAM_SECONDS = 2.0  # as reward.sandbox.seconds, where nothing else is given: an audit waits for many that hang


@dataclass(frozen=True)
class AuditRows:
    """The rows that a reward is audited with.

    Args:
        source: where they are, as ``data.train``.
        count: at most this many of them.
        prompt_key: as ``data.prompt_key``.
        ground_truth_key: as ``data.ground_truth_key``.
        response_key: column with a right response; None: it is made of the ground truth.
        right: the form of a right response, with {ground_truth} in it; None: the form that the reward reads.
    """

    source: str
    count: int = 50
    prompt_key: str = "prompt"
    ground_truth_key: str = "ground_truth"
    response_key: str | None = None
    right: str | None = None


@dataclass(frozen=True)
class AuditOptions:
    """How a reward is audited.

    Args:
        kwargs: as ``reward.kwargs``.
        pool: as ``reward.pool``.
        allowed: mutations of which nothing is expected.
        heavy: with responses of a megabyte.
        calls: number of calls that measure cost and memory.
        seed: of the order of responses, and of the choice of a row's wrong answer.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pool: RewardPoolSection = field(default_factory=lambda: RewardPoolSection(timeout=30))
    allowed: Sequence[str] = ()
    heavy: bool = True
    calls: int = 2000
    seed: int = 0


def audit_reward(reward: str, rows: AuditRows | None, options: AuditOptions) -> Report:
    """Audits a reward.

    Args:
        reward: as ``reward.function``.
        rows: what it is audited with; None: what comes with a built-in reward.
        options: how.

    Raises:
        UserError: there is no such reward, or nothing to audit it with, or no right or wrong response can be made from
            the rows.
    """
    if reward in SPECIAL:
        raise UserError(
            f"{reward!r} is not one function",
            fix="audit the rewards that it selects, or the parser of a judge's verdict",
        )
    if reward not in REWARDS and ".py:" not in reward and "://" not in reward:
        raise UserError(
            f"{reward!r} is neither file.py:function, nor the address of a server, nor a built-in reward",
            fix=nearest(reward, REWARDS),
        )
    if reward == "environment":
        raise UserError(
            "the reward environment judges no response: it adds up what the environment gave",
            fix="audit the other terms of the reward; hybridflow check plays the environment",
        )
    unknown = next((name for name in options.allowed if name not in (*MUTATIONS, OTHERS)), None)
    if unknown is not None:
        raise UserError(f"the audit makes no {unknown!r}", fix=nearest(unknown, (*MUTATIONS, OTHERS)))
    if rows is None and reward not in CASES:
        raise UserError(
            f"there are no known responses to audit {reward} with",
            fix="give rows with ground truths: --data rows.jsonl",
        )
    built_in = CASES[reward] if rows is None else None
    kwargs = {**(built_in.kwargs if built_in else {}), **options.kwargs}
    if reward == "code":
        kwargs.setdefault("sandbox", SandboxSection(seconds=PROGRAM_SECONDS).model_dump())
    grader = open_grader(reward, kwargs, options.pool)
    try:
        grader.check()
        case_set = built_in or _case_set(rows, grader, kwargs, options)
        ignored: tuple[Expected, str] = ("any", "ignored, with --allow")
        by_design = {**case_set.by_design, **dict.fromkeys(options.allowed, ignored)}
        case_set = replace(case_set, by_design=by_design)
        report, tried = audit(reward, case_set, grader, heavy=options.heavy, seed=options.seed)
    finally:
        grader.close()
    died = any(one.score is not None and one.score.kind == "died" for one in tried)
    if "://" not in reward and not died:
        spec = FunctionSpec(reward, kwargs)
        add_probe(report, tried, spec, seconds=PROBE_SECONDS, calls=options.calls)
    shown = None if built_in else truth_in_prompt(case_set.cases)
    report.findings += [shown] if shown else []
    return report


def open_grader(reward: str, kwargs: Mapping[str, Any], pool: RewardPoolSection) -> Grader:
    """Opens the grader that scores with a reward, as training would."""
    if "://" in reward:
        return RemoteGrader(reward, pool, kwargs)
    functions = {reward: FunctionSpec(reward, dict(kwargs))}
    return ProcessGrader(functions, pool) if pool.processes else InProcessGrader(functions)


def _case_set(rows: AuditRows | None, grader: Grader, kwargs: Mapping[str, Any], options: AuditOptions) -> CaseSet:
    assert rows is not None
    read = read_rows(rows.source, seed=options.seed)[: rows.count]
    keyed = [(_question(row, rows, i), _truth(row, rows, i), row) for i, row in enumerate(read)]
    if rows.response_key is not None:
        texts = [
            column(row, rows.response_key, source=rows.source, index=i, setting="--response-key")
            for i, row in enumerate(read)
        ]
        cases = [case_of(*one, None, str(text)) for one, text in zip(keyed, texts)]
    else:
        form = rows.right or find_form(keyed, grader)
        if "{ground_truth}" not in form:
            raise UserError(
                f"--right is {form!r}, without a place for the ground truth", fix="write {ground_truth} there"
            )
        cases = [case_of(*one, form, None) for one in keyed]
    return case_set_of(with_wrong_answers(cases, options.seed), kwargs)


def _question(row: Row, rows: AuditRows, index: int) -> str:
    value = column(row, rows.prompt_key, source=rows.source, index=index, setting="--prompt-key")
    try:
        messages = read_messages(value)
    except RefusedValue as refused:
        raise UserError(
            f"{rows.prompt_key} of row {index} of {rows.source} {refused}", why=refused.why, fix=refused.fix
        ) from None
    return "\n".join(message["content"] for message in messages)


def _truth(row: Row, rows: AuditRows, index: int) -> Any:
    from hybridflow.data.prompts import truth_key  # here, for it imports transformers

    key = truth_key(row, PromptDataSection(ground_truth_key=rows.ground_truth_key))
    assert key is not None, "the command has no way to say that there is none"
    return column(row, key, source=rows.source, index=index, setting="--ground-truth-key")
