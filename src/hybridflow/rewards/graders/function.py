"""Calls a user's reward function safely, and checks what it returns before anything is trained on it.

The names of its arguments decide what it is given. For one response:

    response, solution_str      its text
    ground_truth                the row's
    prompt                      chat messages
    row                         the whole row
    data_source, extra_info     of the row: None and {} where it has none

or for all responses to a prompt at once: ``responses`` with the same others, or ``data_sources``, ``solution_strs``,
``ground_truths`` and ``extra_infos``, lists with one entry per response. So a ``compute_score`` that was written for
verl works as it is, for one response and for a batch. A reward that was written for TRL works as it is too: one with an
argument ``completions``, ``completion_ids`` or ``prompts`` gets lists with one entry per response,

    prompts, completions        strings; where the row's prompt is chat messages, lists of messages
    completion_ids              lists of token ids
    any column of the rows      by its name; all of them where it takes ``**kwargs``

and may return None for a response that it does not judge. All of these may be ``async def``.

Where the model acted, ``response`` is all that it wrote, without results of tools, and there is also

    final                       the text of its last turn
    messages                    the whole conversation, results of tools included
    turns                       {"text": ..., "reward": the environment's or None, "calls": number}, one of each turn

for all responses at once ``finals``, ``messages``, ``turns``, lists of these; ``extra_info`` has ``num_turns``, and
``completions`` are lists of messages from the first turn on, with results of tools.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridflow.config.bounds import LARGEST_REWARD
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError, near, nearest, raised
from hybridflow.protocols.rewards import Answers, Failure, Score
from hybridflow.rewards.verifiable import registry as rewards

ROW = ("ground_truth", "prompt", "row", "data_source", "extra_info")
ROWS = ("data_sources", "ground_truths", "extra_infos")  # for a whole group only
ANSWER = ("response", "solution_str")
ANSWERS = ("responses", "solution_strs")
ACTED = ("final", "turns", "messages")  # where the model acted: of a response
ALL_ACTED = ("finals", "turns", "messages")  # for a whole group
PARTS = ("steps", "turns")  # of what a reward returns
COMPLETIONS = ("completions", "prompts", "completion_ids")  # TRL's, beside the columns
NO_COLUMNS = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from a reward
# What TRL's trainer passes besides; there is nothing here that could be passed for it.
ONLY_TRL = ("trainer_state", "log_extra", "log_metric", "environments")
# What other programs and people call these; None: a word that may be either, the model's or the row's.
NAMES = {
    **dict.fromkeys(("completion", "output", "prediction", "generation", "generated", "text", "pred"), "response"),
    **dict.fromkeys(("model_output", "response_str", "response_text", "candidate", "sequence"), "response"),
    **dict.fromkeys(("outputs", "predictions", "generations", "texts", "sequences"), "responses"),
    **dict.fromkeys(("label", "target", "gold", "reference", "expected", "truth", "gt"), "ground_truth"),
    **dict.fromkeys(("labels", "targets", "references", "answer_key", "gold_answer"), "ground_truth"),
    **dict.fromkeys(("prompts", "query", "queries", "question", "messages", "input", "instruction"), "prompt"),
    **dict.fromkeys(("extra", "info", "metadata", "meta"), "extra_info"),
    **dict.fromkeys(("source", "dataset", "task"), "data_source"),
    **dict.fromkeys(("example", "sample", "item", "record"), "row"),
    **dict.fromkeys(("answer", "answers", "solution", "solutions", "result", "final_answer"), None),
}
CUT = 200  # characters of whatever a message shows
_FORMS = (
    "def score(response: str, ground_truth) -> float, with any of the arguments response, ground_truth, prompt, row; "
    "or def score(responses: list[str], ...) -> list[float] for a whole group; or TRL's def score(completions, "
    "**columns) -> list[float]; a dict of numbers with 'score' among them may take the place of a number"
)
STEPS = "rewards of parts of a response are {'score': ..., 'steps': [(characters up to its end, reward), ...]}"
FIXES = {
    "raised": "make it return a number for every response, however malformed",
    "timeout": "make it end earlier, or raise reward.pool.timeout",
    "died": "its process ended twice on this response (a crash in native code, os._exit, memory): try the response "
    "with reward.pool.processes=0, where a debugger works",
    "nonsense": f"write {_FORMS}; {STEPS}",
    "columns": "name a column that the rows have, or give the argument a default",
    "refused": "read the server's log; reward.pool.retries is the number of further attempts",
}


@dataclass(frozen=True)
class FunctionSpec:
    """A reward function by name: it travels to other processes, which load it there.

    Args:
        reference: ``file.py:function``, or the name of a built-in reward.
        kwargs: further arguments.
    """

    reference: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _called(name: str, known: Sequence[str]) -> str:
    """Returns a hint on an argument that nothing provides: its name here, the nearest name, or the column."""
    column = f"a column of the data is row[{name!r}]"
    if name in NAMES:
        ours = NAMES[name]
        return f"here it is {ours!r}; {column}" if ours else f"the text of the response is 'response'; {column}"
    return nearest(name, known) if near(name, known) else column


class RewardFunction:
    """Scores the responses to one prompt, and never raises for a failure of the function.

    Args:
        function: the user's function.
        name: how to call it in messages.
        kwargs: further arguments that it is given.
        last_turn: whether ``response`` is the text of the last turn, where the model acted.

    Attributes:
        whole_group: whether one call scores all responses to a prompt.
        is_async: whether it is an ``async def``.
        wants_truth: whether it takes the ground truth.

    Raises:
        UserError: the function wants arguments that do not exist, or does not take those of `kwargs`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        last_turn: bool = False,
    ) -> None:
        self.function, self.name, self.kwargs, self.last_turn = function, name, dict(kwargs or {}), last_turn
        inner, bound = function, set[str]()  # what a partial was given stays as it is
        while isinstance(inner, functools.partial):
            bound |= inner.keywords.keys()
            inner = inner.func
        try:
            parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in bound}
        except ValueError as error:  # of functions that are written in C
            if bound and _has_signature(inner):
                taken = list(inspect.signature(inner).parameters)
                said = ", ".join(sorted(bound - set(taken))) or "arguments by position"
                raise UserError(
                    f"the reward {name} does not take what it is given beforehand: {said}",
                    why="a partial, or reward.kwargs, gives it that",
                    fix=f"its arguments are {', '.join(taken)}",
                ) from error
            raise UserError(
                f"the reward {name} has no signature that Python can read",
                why="the names of its arguments say what it is given",
                fix=f"call it in a function of yours: {_FORMS}",
            ) from error
        unlike = "prompts" in parameters and {*ANSWER, *ANSWERS, *ACTED}.isdisjoint(parameters)  # any other form
        self.of_trl = unlike or not {"completions", "completion_ids"}.isdisjoint(parameters)
        self.wants_truth = not {"ground_truth", "ground_truths"}.isdisjoint(parameters)
        self.whole_group = self.of_trl or not {*ANSWERS, "finals"}.isdisjoint(parameters)
        # Of an object it is the class's method that is called.
        self.is_async = any(map(inspect.iscoroutinefunction, (inner, type(inner).__call__)))
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._wanted: list[str] = []  # arguments that a reward of TRL's form cannot do without
        if self.of_trl:
            self._check_columns(parameters)
            return
        answer = (*ANSWERS, *ALL_ACTED) if self.whole_group else (*ANSWER, *ACTED)
        known = (*answer, *ROW, *(ROWS if self.whole_group else ()))
        self.arguments = [n for n in known if n in parameters]
        self._check_signature(parameters, answer, known)

    def _check_columns(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._check_kwargs(named, COMPLETIONS)
        wanted = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in self.kwargs]
        only = next((n for n in wanted if n in ONLY_TRL), None)
        if only is not None:
            raise UserError(
                f"the reward {self.name} wants {only!r}, which TRL's trainer alone has",
                fix="give the argument a default, or take it out: what a reward returns as numbers of a dict is logged",
            )
        self.arguments = named
        self._wanted = wanted

    def _check_kwargs(self, named: Sequence[str], known: Sequence[str]) -> None:
        """Refuses reward.kwargs that the function does not take, or that a run provides."""
        ours = next((k for k in self.kwargs if k in known), None)
        strange = None if self._takes_all else next((k for k in self.kwargs if k not in named), None)
        if ours is not None or strange is not None:
            said = "is given that by the run" if ours is not None else "does not take it"
            raise UserError(
                f"reward.kwargs has {ours or strange!r}, and the reward {self.name} {said}",
                fix=nearest(str(ours or strange), own)
                if (own := [n for n in named if n not in known])
                else f"leave it out of reward.kwargs: {self.name} takes no arguments of its own",
            )

    def _check_signature(
        self, parameters: Mapping[str, inspect.Parameter], answer: Sequence[str], known: Sequence[str]
    ) -> None:
        named = [
            n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
        ]
        self._check_kwargs(named, known)
        wanted = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in self.kwargs]
        unknown = next((n for n in wanted if n not in known), None)
        by_place = next((n for n in named if parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY), None)
        wrong = [
            f"wants {unknown!r} ({_called(unknown, known)})" if unknown else "",
            f"takes {by_place!r} by position only" if by_place else "",
            f"does not take {answer[0]!r}" if set(answer).isdisjoint(parameters) else "",
        ]
        if any(wrong):
            raise UserError(f"the reward {self.name} {' and '.join(filter(None, wrong))}", fix=f"write {_FORMS}")

    def calls(self, answers: Answers) -> list[int | None]:
        """Returns what each call scores: None for all responses at once, else the index of one response."""
        return [None] if self.whole_group else list(range(len(answers.responses)))

    def scores(self, answers: Answers) -> list[Score]:
        """Returns a score for every response; calls follow each other, those of an ``async def`` run at once."""
        if self.is_async:
            return asyncio.run(self.scores_async(answers))
        return [s for index in self.calls(answers) for s in self.score(answers, index)]

    async def scores_async(self, answers: Answers) -> list[Score]:
        """Returns the same as `scores`, for an ``async def``."""
        found = await asyncio.gather(*(self.score_async(answers, index) for index in self.calls(answers)))
        return [s for scores in found for s in scores]

    def score(self, answers: Answers, index: int | None) -> list[Score]:
        """Returns the scores that one call gives; see `calls`."""
        try:
            return self._read(self.function(**self._given(answers, index)), answers, index)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a reward must not end the run silently
            return self._raised(error, answers, index)

    async def score_async(self, answers: Answers, index: int | None) -> list[Score]:
        """Returns the same as `score`, for an ``async def``."""
        try:
            begun: Awaitable[Any] = self.function(**self._given(answers, index))
            return self._read(await begun, answers, index)
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:
            return self._raised(error, answers, index)

    def _given(self, answers: Answers, index: int | None) -> dict[str, Any]:
        if self.of_trl:
            return self._given_columns(answers) | self.kwargs
        row, size = answers.row, len(answers.responses)
        source, truth = row.get("data_source"), answers.ground_truth
        context: dict[str, Any] = {"ground_truth": truth, "prompt": answers.prompt, "row": row, "data_source": source}
        if index is not None:
            context |= dict.fromkeys(ANSWER, answers.responses[index])
        else:
            context |= {name: list(answers.responses) for name in ANSWERS}
            context |= {"ground_truths": [truth] * size, "data_sources": [source] * size}
            context["extra_infos"] = [dict(row.get("extra_info") or {}) for _ in range(size)]
        context["extra_info"] = dict(row.get("extra_info") or {})
        if answers.turns is not None or not {*ACTED, *ALL_ACTED}.isdisjoint(self.arguments):
            self._add_turns(context, answers, index)
        return {name: context[name] for name in self.arguments} | self.kwargs

    def _add_turns(self, context: dict[str, Any], answers: Answers, index: int | None) -> None:
        """Adds the turns of the responses; one that is no trajectory of a model that acts is a single turn."""
        texts = answers.responses
        finals = answers.finals or texts
        every = answers.turns or [[{"text": text, "reward": None, "calls": 0}] for text in texts]
        conversations = answers.conversations or [
            [*answers.prompt, {"role": "assistant", "content": text}] for text in texts
        ]
        if index is not None:
            context |= {"final": finals[index], "turns": every[index], "messages": conversations[index]}
            if self.last_turn:
                context |= dict.fromkeys(ANSWER, finals[index])
        else:
            context |= {"finals": finals, "turns": every, "messages": conversations}
        # What a function does to them stays with it.
        context |= {name: copy.deepcopy(context[name]) for name in ("turns", "messages") if name in self.arguments}
        if answers.turns is None:
            return
        if index is not None:
            context["extra_info"]["num_turns"] = len(every[index])
            return
        for info, turns in zip(context["extra_infos"], every):
            info["num_turns"] = len(turns)

    def _given_columns(self, answers: Answers) -> dict[str, Any]:
        """Returns what TRL's trainer gives to a reward, as far as a run here has it."""
        size, prompt = len(answers.responses), answers.prompt if answers.written is None else answers.written
        columns = {k: v for k, v in answers.row.items() if k not in NO_COLUMNS}
        known, columns = list(columns), {"ground_truth": answers.ground_truth} | columns
        lacking = next((n for n in self._wanted if n not in (*COMPLETIONS, *columns)), None)
        if lacking is not None:
            raise _NoColumn(f"wants {lacking!r}, which is no column of the row: {nearest(lacking, known)}")
        texts: list[Any] = list(answers.responses)
        prompts = [prompt] * size
        if answers.conversations is not None and answers.turns is not None:
            both = [_parted(*each) for each in zip(answers.conversations, map(len, answers.turns))]
            prompts, texts = [first for first, _ in both], [rest for _, rest in both]
        elif not isinstance(prompt, str):  # conversational, as TRL calls it
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        given = {name: [value] * size for name, value in columns.items()}
        given |= {"prompts": prompts, "completions": texts}
        if answers.token_ids is not None:
            given["completion_ids"] = [list(ids) for ids in answers.token_ids]
        elif "completion_ids" in self._wanted:
            raise _NoColumn("wants 'completion_ids', and here it scores texts that have no token ids")
        return given if self._takes_all else {name: given[name] for name in self.arguments if name in given}

    def _read(self, value: Any, answers: Answers, index: int | None) -> list[Score]:
        if index is not None:
            return [read_score(self.name, value, answers, index)]
        return read_scores(self.name, value, answers, may_abstain=self.of_trl)

    def _raised(self, error: BaseException, answers: Answers, index: int | None) -> list[Score]:
        if isinstance(error, _NoColumn):
            return failures(self.name, "columns", str(error), answers, index)
        return failures(self.name, "raised", f"raised {raised(error, _text(error, str))}", answers, index)


def _parted(messages: list[dict[str, Any]], turns: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parts a conversation into the prompt and what came from the model's first turn on, as TRL has them."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"][-turns:] if turns else []
    begin = places[0] if places else len(messages)
    return copy.deepcopy(messages[:begin]), copy.deepcopy(messages[begin:])


def _has_signature(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function)
    except ValueError:
        return False
    return True


def name_of(function: Callable[..., Any]) -> str:
    """Returns the name of a function in messages: for a partial the function that it calls, for an object its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def failures(name: str, kind: str, what: str, answers: Answers, index: int | None) -> list[Score]:
    """Returns scores that state why a call has none.

    Args:
        name: of the reward.
        kind: see `protocols.rewards.Failure.kind`.
        what: happened, such as "took longer than 60 s".
        answers: what it was scoring.
        index: which of them; None: all.
    """
    if index is None:
        many = f"{len(answers.responses)} responses, the first "
        response, count = (answers.responses or [""])[0], len(answers.responses)
    else:
        many, response, count = "", answers.responses[index], 1
    against = _text(answers.ground_truth, repr)
    failure = Failure(kind, f"the reward {name} {what}", f"{many}{response[:CUT]!r} against {against}")
    return [Score(0.0, failure=failure)] * count


def read_scores(name: str, values: Any, answers: Answers, *, may_abstain: bool = False) -> list[Score]:
    """Reads what a reward returned for all responses to a prompt: see `read_score`.

    Args:
        name: of the reward.
        values: what it returned.
        answers: what it was scoring.
        may_abstain: whether None says that the reward does not judge a response.
    """
    size = len(answers.responses)
    if not isinstance(values, Sequence) and callable(getattr(values, "tolist", None)):
        values = values.tolist()  # of numpy and torch
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != size:
        found = f"{len(values)} scores" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        return failures(name, "nonsense", f"was given {size} responses and returned {found}", answers, None)
    return [
        Score(0.0, applies=False) if may_abstain and value is None else read_score(name, value, answers, i)
        for i, value in enumerate(values)
    ]


def read_score(name: str, value: Any, answers: Answers, index: int) -> Score:
    """Reads what a reward returned for one response: a number of at most `LARGEST_REWARD`, or a dict with a key such as
    "score".

    Further numbers of a dict are components; other values in it, such as text, are left out. "steps" are rewards of
    parts of the response: pairs of the number of characters at which the part ends, and the reward.
    """
    try:
        if not isinstance(value, Mapping):
            return Score(_number(value))
        if "score" not in value:
            raise _Nonsense(f"returned a dict without 'score' in it: {_text(dict(value), repr)}")
        components = {str(k): _number(v, f" as {k!r}") for k, v in value.items() if k not in PARTS and _is_number(v)}
        score = components.pop("score", None)
        if score is None:
            raise _Nonsense(_no_number(value["score"], " as 'score'"))
        steps = _steps(value.get("steps"), len(answers.responses[index]))
        turns = _turns(value.get("turns"), 1 if answers.turns is None else len(answers.turns[index]))
        _number(score + sum(reward for _, reward in (*steps, *turns)), " as 'score' and its parts together")
        return Score(score, components, steps, turns)
    except _Nonsense as said:
        return failures(name, "nonsense", str(said), answers, index)[0]


class _Nonsense(Exception):
    pass


class _NoColumn(Exception):
    pass


def _number(value: Any, where: str = "") -> float:
    if _is_number(value):
        found = value.item() if not isinstance(value, numbers.Real) else value
        try:
            number = float(found)
        except OverflowError:
            number = math.inf
        if abs(number) <= LARGEST_REWARD:
            return number
    raise _Nonsense(_no_number(value, where))


def _is_number(value: Any) -> bool:
    """Returns whether a value is a real number of Python, or an array or tensor that holds exactly one element."""
    if isinstance(value, numbers.Real):
        return True
    if not callable(getattr(value, "item", None)) or math.prod(getattr(value, "shape", (2,))) != 1:
        return False
    return isinstance(value.item(), numbers.Real)


def _no_number(value: Any, where: str) -> str:
    several = (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or hasattr(value, "shape")
    wanted = f"not a finite number of at most {LARGEST_REWARD:g}"
    said = f"returned {_text(value, repr)} ({type(value).__name__}){where}, {wanted}"
    return f"{said}: {STEPS}" if several and not _is_number(value) else said


def _steps(steps: Any, characters: int) -> tuple[tuple[int, float], ...]:
    found = []
    for step in () if steps is None else steps:
        if not isinstance(step, Sequence) or isinstance(step, str) or len(step) != 2:
            raise _Nonsense(f"returned a step {_text(step, repr)}: {STEPS}")
        end, reward = step
        if isinstance(end, bool) or not isinstance(end, numbers.Integral) or not 1 <= int(end) <= characters:
            raise _Nonsense(f"returned a step that ends after {_text(end, repr)} of {characters} characters")
        found.append((int(end), _number(reward, " in a step")))
    return tuple(found)


def _turns(turns: Any, count: int) -> tuple[tuple[int, float], ...]:
    found = []
    for turn in () if turns is None else turns:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise _Nonsense(
                f"returned a turn {_text(turn, repr)}: rewards of turns are pairs (number of the turn, reward)"
            )
        number, reward = turn
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise _Nonsense(f"returned a reward of turn {_text(number, repr)} of {count} turns")
        found.append((number, _number(reward, " in a turn")))
    return tuple(found)


def _text(value: Any, form: Callable[[Any], str]) -> str:
    """Returns a value as text of at most `CUT` characters, whatever its own methods do."""
    try:
        return form(value)[:CUT]
    except Exception:  # a broken __repr__ must not hide what happened
        return f"<a {type(value).__name__}>"


def load_reward(reference: str, kwargs: Mapping[str, Any] | None = None) -> RewardFunction:
    """Loads the reward that ``file.py:function`` or the name of a built-in one means.

    Raises:
        UserError: no such function, or one with arguments that do not exist.
    """
    if reference not in rewards.REWARDS:
        return RewardFunction(load_function(reference), reference, kwargs)
    last_turn = reference not in rewards.OF_ALL_TURNS
    return RewardFunction(rewards.builtin(reference), reference, kwargs, last_turn=last_turn)


def load_all(functions: Mapping[str, FunctionSpec | Callable[..., Any]]) -> dict[str, RewardFunction]:
    """Loads every function by its name here.

    Raises:
        UserError: see `load_reward`.
    """
    return {
        name: load_reward(f.reference, f.kwargs) if isinstance(f, FunctionSpec) else RewardFunction(f, name_of(f))
        for name, f in functions.items()
    }


def check_builtins(functions: Mapping[str, FunctionSpec | Callable[..., Any]]) -> None:
    """Checks that built-in rewards have what they need.

    Raises:
        UserError: one lacks something.
    """
    for function in functions.values():
        if isinstance(function, FunctionSpec) and function.reference in rewards.CHECKS:
            rewards.CHECKS[function.reference](function.kwargs)
