"""Tries the reward before training: on the ground truth, on an empty response, and on the usual forms of responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing

from hybridflow.config.fingerprints import GIVEN
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.config.sections.rewards import EndpointJudgeSection
from hybridflow.data.prompts import Prompt, PromptSet, answers_to
from hybridflow.errors import UserError, nearest
from hybridflow.grading.make import JUDGE, MODEL, check_rows, data_sources, first_of_each, make_grader, require_score
from hybridflow.protocols.rewards import Grader, Score, score_all, total
from hybridflow.rewards.audit.rows import FORMS, HOLE, answer_in
from hybridflow.rewards.graders.given import GivenReward

ANSWERS = ("response", "answer", "solution", "completion", "output")  # columns that may hold a right response
SHOWN = 60  # characters of a response

Read = Callable[[str], str]


def try_reward(
    config: RlConfig | EvalConfig,
    prompts: PromptSet,
    read: Read,
    rows: int,
    lacking: Callable[[set[str]], UserError | None] = lambda components: None,
    function: GivenReward | None = None,
) -> Iterator[str]:
    """Scores the ground truth of the first row of every data source. Where that scores no more than an empty response,
    scores other forms of it too, and yields the best one.

    Args:
        config: the configuration.
        prompts: the rows.
        read: what a reward sees of a response with this text.
        rows: number of rows that are searched for the first one of each source.
        lacking: makes the error where the run reads components that the reward did not return.
        function: a reward that a program gives, instead of the configured one.

    Raises:
        UserError: the reward fails on the ground truth, or returns no components that the configuration names.
    """
    check_rows(config, prompts, function=function)
    r, name = config.reward, reward_name(config)
    loaded = [name for name in (MODEL, JUDGE) if name in r.functions() and function is None]
    if JUDGE in loaded and isinstance(r.judge, EndpointJudgeSection):
        loaded.remove(JUDGE)
    with closing(make_grader(config, None, data_sources(prompts), function=function, scoring=not loaded)) as grader:
        grader.check()
        if loaded:
            yield f"  reward {name}: its {' and '.join(loaded)} can be loaded; nothing was scored"
            return
        first, components = list(first_of_each(prompts, rows)), set[str]()
        for prompt in first:
            of = f" of {prompt.data_source}" if len(first) > 1 else ""
            if prompt.ground_truth is None:
                tried = _forms(prompt)
                text = next(iter(tried), "")
                what = f"{tried[text]} given as the response," if tried else "an empty response"
                [score] = _scores(grader, prompts, prompt, [read(text)])
                require_score(score, r, f"the first row of {prompt.data_source}, {what.rstrip(',')}")
                components |= set(score.components)
                yield f"  reward {name}: the first row{of} has no ground truth; {what} scores {total(score):g}"
                continue
            answer = _as_answer(prompt.ground_truth)
            [score] = _scores(grader, prompts, prompt, [read(answer)])
            require_score(score, r, f"the first row of {prompt.data_source}")
            components |= set(score.components)
            more = f" (components: {', '.join(sorted(score.components))})" if score.components else ""
            seen = "" if read(answer) == answer else f", of which the reward sees {read(answer)[:SHOWN]!r},"
            yield (
                f"  reward {name}: the first row's{of} ground truth {answer[:SHOWN]!r} given as the response{seen} "
                f"scores {total(score):g}{more}"
            )
            yield from _other_forms(grader, prompts, prompt, read, total(score))
        if lacking(components) is not None:
            for prompt in first:  # a response may lack what others have
                scores = _scores(grader, prompts, prompt, [read(text) for text in ["", *_forms(prompt)]])
                components |= {name for score in scores for name in score.components}
            if (mistake := lacking(components)) is not None:
                raise mistake


def reward_name(config: RlConfig | EvalConfig) -> str:
    """Returns the name of a configuration's reward for messages."""
    function = config.reward.function.removeprefix(GIVEN).partition("@")[0]
    return function if config.reward.terms is None else " + ".join(config.reward.terms)


def _other_forms(grader: Grader, prompts: PromptSet, prompt: Prompt, read: Read, truth: float) -> Iterator[str]:
    """Says which form a right response may need, where the bare ground truth scores no more than an empty response."""
    [empty] = _scores(grader, prompts, prompt, [""])
    if empty.failure is not None:
        said = str(empty.failure).splitlines()[0]
        yield f"    advice: the reward fails on an empty response, and models give some: {said}"
        return
    floor = total(empty)
    if truth > floor:
        return
    tried = _forms(prompt)
    scores = _scores(grader, prompts, prompt, [read(text) for text in tried])
    worth = {text: total(score) for text, score in zip(tried, scores) if score.failure is None}
    best = max(worth, key=worth.__getitem__, default="")
    if worth.get(best, floor) > floor:
        yield f"    {tried[best]} {best[:SHOWN]!r} it scores {worth[best]:g}: a right response needs such a form"
        return
    others = f" and {len(tried)} other forms of it" if tried else ""
    yield (
        f"    advice: the ground truth{others} score no more than an empty response ({floor:g}), so nothing shows here "
        "that any response can earn more, and if none can, nothing is learned. Score a response that you know to be "
        "right, or see what the reward reads: hybridflow audit-reward"
    )


def _forms(prompt: Prompt) -> dict[str, str]:
    """Returns responses that may be right besides the bare ground truth, each with its description."""
    tried = {prompt.row[key]: f"its column {key!r}," for key in ANSWERS if isinstance(prompt.row.get(key), str)}
    answer = "" if prompt.ground_truth is None else answer_in(prompt.ground_truth).strip()
    if answer and answer[0] not in "{[":  # JSON is test data for a response, not the response
        tried |= {form.replace(HOLE, answer): "written as" for form in FORMS if form != HOLE}
    return tried


def _scores(grader: Grader, prompts: PromptSet, prompt: Prompt, texts: list[str]) -> list[Score]:
    end = prompts.tokenizer.eos_token_id  # a response that ends has it, so an empty one has one token
    ids = [prompts.tokenizer.encode(text, add_special_tokens=False) + [end] for text in texts]
    asked = [answers_to(prompt, [text], [tokens]) for text, tokens in zip(texts, ids)]
    return [scores[0] for scores in score_all(grader, asked)]


def _as_answer(ground_truth: object) -> str:
    return ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth, default=str)


def lacking_components(config: RlConfig, found: set[str]) -> UserError | None:
    """Returns the error for a configuration that names a component which the reward never returned."""
    a, needs = config.algorithm, needs_of(config.algorithm.advantage, ADVANTAGES)
    if needs.needs_components and not found:
        return UserError(
            f"the {a.advantage} advantage works on the components of a reward, and {reward_name(config)} has none",
            fix='return a dict from it: {"score": ..., "correct": ..., "format": ...}',
        )
    named = {"filter.metric": [config.filter.metric] if config.filter.metric != "reward" else []}
    named["algorithm.reward_weights"] = list(a.reward_weights or {})
    for key, names in named.items():
        for name in names:
            if name not in found:
                return UserError(
                    f"{key} names {name!r}, which {reward_name(config)} does not return", fix=nearest(name, found)
                )
    return None
