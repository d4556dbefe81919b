"""Tools that are Python functions: what a model is told of them, what it is answered, and what is refused."""

from __future__ import annotations

import asyncio
import enum
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest
from transformers.utils.chat_template_utils import get_json_schema

from hybridflow.agents.schemas import described
from hybridflow.agents.tools import ToolSet, toolbox
from hybridflow.agents.world import Calls
from hybridflow.config.sections.agent import AgentSection
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.calls import CallPlace
from hybridflow.protocols.environments import Action, Observation, ToolCall, ToolResult, tool


def search(
    query: str,
    count: int = 3,
    depth: float | None = None,
    where: Literal["web", "books"] = "web",
    words: list[str] | None = None,
    weights: dict[str, float] = {},  # noqa: B006
    any: list = [],  # type: ignore[type-arg]  # noqa: B006
    schema: bool = False,
    limit: int | str = 1,
) -> str:
    """Searches books.

    The best ones come first.

    Args:
        query: what to look for,
            in words
        count: how many
        depth: of the search
        where: to look
        words: that must occur
        weights: of words
        any: anything
        schema: whether to
            print it
        limit: of results

    Returns:
        what was found
    """
    return f"{count} for {query!r}, {weights}"


class Unit(enum.Enum):
    CM = "cm"
    INCH = "inch"


@dataclass
class Length:
    value: float
    unit: Unit


def convert(length: Length, to: Unit, digits: Annotated[int, pydantic.Field(ge=0, le=9, description="places")] = 2):  # type: ignore[no-untyped-def]
    """Converts a length.

    :param length: what to convert
    :param Unit to: the other unit
    """
    factor = {Unit.CM: 1.0, Unit.INCH: 2.54}
    return {"value": round(length.value * factor[length.unit] / factor[to], digits), "unit": to}


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


async def slow_add(a: int, b: int) -> int:
    """Adds, later."""
    await asyncio.sleep(0.01 * (5 - a))
    return a + b


def fails(text: str) -> str:
    """Fails."""
    raise OSError(f"no {text}")


def times_out() -> str:
    """Raises an error of its own."""
    raise TimeoutError("the server was slow")


def hangs() -> str:
    """Hangs."""
    time.sleep(9)
    return "late"


def quits() -> str:
    """Ends the program."""
    raise SystemExit(3)


def paid(good: bool) -> ToolResult:
    """Pays."""
    return ToolResult("thanks", reward=1.0 if good else float("nan"))


class Purse:
    """Coins of a trajectory."""

    closed: ClassVar[list[int]] = []

    def __init__(self, row: dict[str, Any]) -> None:
        self.coins = int(row["coins"])

    @tool
    def take(self, coins: int) -> int:
        """Takes coins, and says how many are left."""
        before = self.coins
        time.sleep(0.002 * coins)  # the first call is the slowest
        self.coins = before - coins
        return self.coins

    @tool(stateful=False)
    def name(self) -> str:
        """Says its name."""
        return "purse"

    def hidden(self) -> None:
        """Is no tool."""

    def close(self) -> None:
        self.closed.append(self.coins)


class Kept:
    """Answers of calls, as a run's journal keeps them."""

    def __init__(self) -> None:
        self.answers: dict[CallPlace, str] = {}

    def find(self, place: CallPlace) -> dict[str, Any] | None:
        return json.loads(self.answers[place]) if place in self.answers else None

    def add(self, place: CallPlace, answer: dict[str, Any]) -> None:
        self.answers[place] = json.dumps(answer)

    def sync(self) -> None:
        pass


TOLD: list[tuple[str, str]] = []  # what people were told of failures


def answered(
    sources: list[Any], *calls: tuple[str, dict[str, Any]], store: Kept | None = None, **section: Any
) -> tuple[Observation, Calls]:
    """What a set of tools answers to the calls of one turn."""
    agent = AgentSection.model_validate({"tools": ["tools.py:f"], "call_timeout": 0.8, **section})
    prompt = [{"role": "user", "content": "?"}]
    made = Calls(agent, NoiseKey(0, "train", 1, 2), prompt, store, lambda kind, text: TOLD.append((kind, text)))
    written = tuple(ToolCall(f"call{i}", name, given, given.pop("error", "")) for i, (name, given) in enumerate(calls))

    async def play() -> Observation:
        tools = ToolSet(toolbox([(f"f.py:{i}", source) for i, source in enumerate(sources)]), made)
        assert await tools.reset({"coins": 10}, 7) == Observation([{"role": "user", "content": "?"}])
        found = await tools.step(Action("", written, {}, "stop"))
        await tools.close()
        return found

    return asyncio.run(play()), made


def texts(observation: Observation) -> list[str]:
    return [message["content"] for message in observation.messages]


def test_a_schema_is_what_transformers_makes_and_pydantics_types_are_more() -> None:
    theirs = get_json_schema(search)
    theirs["function"].pop("return")
    assert json.dumps(described(search, "search").schema) == json.dumps(theirs)  # also in the order of its keys
    function = described(convert, "convert").schema["function"]
    unit = {"type": "string", "enum": ["cm", "inch"]}
    assert function["description"] == "Converts a length."
    assert function["parameters"]["required"] == ["length", "to"]
    assert function["parameters"]["properties"] == {
        "length": {
            "type": "object",
            "properties": {"value": {"type": "number"}, "unit": unit},
            "required": ["value", "unit"],
            "description": "what to convert",
        },
        "to": {**unit, "description": "the other unit"},
        "digits": {"type": "integer", "maximum": 9, "minimum": 0, "description": "places"},
    }


def test_arguments_are_cast_and_calls_are_answered_in_their_order() -> None:
    partial = functools.partial(add, b=5)
    functools.update_wrapper(partial, add)
    partial.__name__ = "add_five"  # type: ignore[attr-defined]
    given = {"length": {"value": "2", "unit": "inch"}, "to": "cm", "digits": "1"}
    found, calls = answered(
        [search, convert, slow_add, paid],
        ("search", {"query": 5, "count": "2", "weights": {"a": 1}}),
        ("convert", given),
        *(("slow_add", {"a": a, "b": 1}) for a in range(4)),
        ("paid", {"good": "true"}),
    )
    assert texts(found) == [
        "2 for '5', {'a': 1.0}",
        '{"value": 5.1, "unit": "cm"}',
        *("1234"),
        "thanks",
    ]
    assert [m["tool_call_id"] for m in found.messages] == [f"call{i}" for i in range(7)]
    assert found.reward == 1.0 and not found.done
    assert calls.counts["calls/slow_add"] == 4
    assert answered([search])[0] == Observation([], done=True)  # a turn without calls


def test_an_error_of_a_call_is_an_answer_that_says_what_to_do() -> None:
    store = Kept()
    found, calls = answered(
        [add, fails, hangs, quits, times_out],
        ("add", {"a": "x", "c": 1}),
        ("ad", {}),
        ("add", {"error": "the call is no valid JSON"}),
        ("fails", {"text": "disk"}),
        ("times_out", {}),
        ("quits", {}),
        ("hangs", {}),
        store=store,
    )
    assert texts(found) == [
        "Error: wrong arguments: a: input should be a valid integer, unable to parse string as an integer, not 'x'; "
        "b: it is missing; c: there is no such argument. add takes a, b",
        "Error: there is no tool 'ad'; did you mean 'add'?",
        "Error: the call is no valid JSON",
        "Error: OSError: no disk",
        "Error: TimeoutError: the server was slow",
        "Error: RuntimeError: it raised SystemExit 3",
        "Error: hangs took longer than 0.8 seconds",
    ]
    kinds = {"arguments": 1, "unknown": 1, "format": 1, "raised": 3, "timeout": 1}
    assert {k.removeprefix("errors/"): v for k, v in calls.counts.items() if k.startswith("errors/")} == kinds
    kept = store.find(calls.place(3))  # the model sees no traceback, and people do
    assert kept is not None and "in fails" in kept["detail"] and "Traceback" not in str(found.messages)
    said = dict(TOLD)["tool fails"]
    assert (
        said.startswith("the tool fails raised; the model was shown 'Error: OSError: no disk'") and "in fails" in said
    )
    with pytest.raises(UserError, match=r"the tool paid returned the reward nan"):
        answered([paid], ("paid", {"good": False}))


def test_objects_of_a_class_belong_to_a_trajectory_and_answer_as_they_did_before_a_resume() -> None:
    Purse.closed.clear()
    turn = [("take", {"coins": 5}), ("name", {}), ("take", {"coins": 1}), ("add", {"a": 1, "b": 1})]
    store = Kept()
    for _ in range(2):  # each trajectory has its own; calls that change state run in order
        found, _ = answered([Purse, add], *turn, store=store)
        assert texts(found) == ["5", "purse", "4", "2"]
    place = next(place for place, kept in store.answers.items() if '"text": "5"' in kept)
    store.add(place, {"text": "as the model saw it"})
    made: list[int] = []

    def add_again(a: int, b: int) -> int:
        """Adds."""
        made.append(a)
        return a + b

    add_again.__name__ = "add"
    found, _ = answered([Purse, add_again], *turn, store=store)
    assert texts(found) == ["as the model saw it", "purse", "4", "2"]
    assert made == []  # a stateless call that was answered is not made again
    assert Purse.closed == [4, 4, 4]  # stateful ones are, for their state


def _nothing(a, b: int) -> int:  # type: ignore[no-untyped-def]
    """Lacks an annotation."""
    return b


def _undescribed(a: int) -> int:
    return a


def _of_any_number(*a: int) -> int:
    """Takes any number."""
    return sum(a)


def _of_an_object(a: Calls) -> str:
    """Takes an object."""
    return str(a)


class _Empty:
    """Has no tools."""

    def look(self) -> str:
        """Looks."""
        return "x"


class _Asking:
    """Asks for what nothing gives."""

    def __init__(self, size: int) -> None:
        self.size = size

    @tool
    def look(self) -> str:
        """Looks."""
        return "x"


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([_nothing], "the argument a of the tool _nothing has no annotation"),
        ([_undescribed], "the tool _undescribed has no docstring"),
        ([_of_any_number], "the tool _of_any_number takes *a: int"),
        ([_of_an_object], "the tool _of_an_object has an argument that no JSON can be"),
        ([lambda a: a], "<lambda> is no name of a tool"),
        ([add, Purse, add], "two tools are called add: one of f.py:0, one of f.py:2"),
        ([_Empty], "the class _Empty has no tools"),
        ([_Asking], "the class of tools _Asking is made with size, which nothing gives"),
        ([3], "a tool is a int, and not a function"),
    ],
)
def test_what_is_no_tool_is_refused(sources: list[Callable[..., Any]], said: str) -> None:
    with pytest.raises(UserError) as error:
        toolbox([(f"f.py:{i}", source) for i, source in enumerate(sources)])
    assert said in error.value.what and error.value.fix
