"""An episode: one trajectory while it is made, turn by turn, as tokens and as messages."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

from hybridflow.agents.observations import cut, state_number, without_markers
from hybridflow.chat.bridge import Bridge
from hybridflow.chat.tool_calls import CallFormat, message_of, read_turn
from hybridflow.config.sections.agent import AgentSection
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey, fork_stream
from hybridflow.protocols.environments import Action, Messages, Observation, ToolCall
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result, Span, Support
from hybridflow.protocols.groups import TokenSequence, Trajectory, Turn


class EpisodeOver(Exception):
    """A budget of the episode is used up; the trajectory so far is what there is.

    Args:
        reason: see `Trajectory.finish_reason`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class World(Protocol):
    """An environment as an episode meets it: everything awaited, normalised and journaled."""

    async def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """See `Environment.reset`."""
        ...

    async def step(self, action: Action) -> Observation:
        """See `Environment.step`."""
        ...


@dataclass(frozen=True, slots=True)
class Language:
    """The tokens and texts of a run's conversations.

    Args:
        bridge: renders what the model is shown.
        format: how calls are written.
        decode: token ids of a turn to the text that rewards see.
        decode_all: the same with special tokens, for parsing.
        ends: the texts of the tokens that close a turn.
        longest: most tokens of a whole sequence, its prompt included.
        markers: texts of special tokens, which no observation may hold.
    """

    bridge: Bridge
    format: CallFormat
    decode: Callable[[list[int]], str]
    decode_all: Callable[[list[int]], str]
    ends: tuple[str, ...]
    longest: int
    markers: tuple[str, ...] = ()


@dataclass(slots=True)
class _Growing:
    """A sequence that grows."""

    sequence: TokenSequence
    key: NoiseKey
    sampled: int = 0  # tokens that the model sampled in it: the next turn's position
    sizes: list[int] = field(default_factory=list)  # of its support
    ids: list[int] = field(default_factory=list)


class Episode:
    """What a loop works with: `reset`, `sample`, `step`, `end`.

    Attributes:
        messages: the conversation so far.
        turns: the number of turns that were sampled.

    Args:
        start: which trajectory to make.
        section: the budgets.
        language: see `Language`.
        world: the environment.
        generate: has the engine run a request.
    """

    def __init__(
        self,
        start: Start,
        section: AgentSection,
        language: Language,
        world: World,
        generate: Callable[[Request], Awaitable[Result]],
    ) -> None:
        self.start, self.section, self.language, self.world = start, section, language, world
        self._generate = generate
        self.messages: Messages = []
        self.turns = 0
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.failure: str | None = None
        self.ending = ""
        self._grown: list[_Growing] = []
        self._first: Messages = []
        self._news: Messages = []  # messages behind the last turn that the model has not been shown
        self._anchor: str | int | None = None
        self._replica: int | None = None
        self._last_id: int | None = None

    # --- what a loop calls ---

    async def reset(self, row: dict[str, Any]) -> Observation:
        """Begins the episode in the environment; what it observes is the prompt."""
        observation = await self.world.reset(row, environment_seed(self.start))
        self._observe(observation)
        return observation

    async def sample(self, messages: Messages = (), *, max_tokens: int | None = None) -> Action:  # type: ignore[assignment]
        """Samples the model's next turn.

        Args:
            messages: shown to the model first, beside those that the environment gave.
            max_tokens: most tokens of this turn, within the budgets.

        Raises:
            EpisodeOver: a budget leaves no room for a turn.
        """
        self.messages += messages
        self._news += messages
        if self.turns == self.section.max_turns:
            self.end("max_turns")
        left = self.start.sampling.max_tokens - self._sampled()
        if left <= 0:
            self.end("length")
        growing = self._continue()
        room = self._room(growing)
        if room <= 0:
            self.end("context")
        asked = min(filter(None, (left, room, self.section.max_turn_tokens, max_tokens)))
        sequence = growing.sequence
        result = await self._generate(
            Request(
                (*sequence.prompt_ids, *sequence.token_ids),
                replace(self.start.sampling, max_tokens=asked),
                growing.key,
                replica=self._replica,
                position=growing.sampled,
            )
        )
        action = self._take(growing, result, asked)
        if result.finish_reason == "length" and asked == min(left, room) and asked != self.section.max_turn_tokens:
            self.end("length" if asked == left else "context")
        return action

    async def step(self, action: Action) -> Observation:
        """Has the environment take a turn; what it observes is shown with the next turn."""
        observation = await self.world.step(action)
        self._observe(observation)
        return observation

    def reward(self, value: float) -> None:
        """Adds a reward to the last turn.

        Raises:
            UserError: there is no turn yet, or it is no number.
        """
        if not self.turns or not math.isfinite(value):
            raise UserError(
                f"the loop gives the reward {value!r} " + ("before the first turn" if not self.turns else "to a turn"),
                why="a reward is a finite number, and belongs to the last turn",
                fix="call episode.reward(number) after episode.sample()",
            )
        turn = self._grown[-1].sequence.turns[-1]
        turn.reward = (turn.reward or 0.0) + value

    def end(self, reason: str = "done") -> NoReturn:
        """Ends the episode, for a reason of the loop's own.

        Raises:
            EpisodeOver: always. The first reason stays, also where the loop catches it.
            UserError: the reason is "failed", which trajectories have that raised.
        """
        if reason == "failed":
            raise UserError(
                'a loop ends its episode as "failed"',
                why="that is the ending of trajectories that have no reward",
                fix="raise an exception, whose text then says why; or give another reason",
            )
        self.ending = self.ending or reason
        raise EpisodeOver(self.ending)

    # --- its parts ---

    def _observe(self, observation: Observation) -> None:
        for message in observation.messages:
            content, found = without_markers(message.get("content"), self.language.markers)
            if self._grown:  # a prompt is never cut
                content, lost = cut(content, self.section.max_observation_tokens, self.language.bridge)
                self.counts["cut_observations"] += bool(lost)
            self.counts["observed_markers"] += found
            message = message | {"content": content}
            self.messages.append(message)
            self._news.append(message)
        if not self._grown:
            self._first = list(self.messages)
        if observation.reward is not None and self._grown:
            self.reward(observation.reward)
        self._anchor = observation.anchor
        for name, value in observation.info.items():
            self.counts[f"info/{name}"] = value

    def _continue(self) -> _Growing:
        """Returns the sequence that the next turn stands in, with all messages that came since."""
        if not self._grown:
            return self._begin(self.language.bridge.prompt(self.messages), "")
        if self.section.history == "steps":
            return self._begin(self.language.bridge.prompt(self._shown()), "step")
        growing = self._grown[-1]
        if not self._news:  # the loop samples again without telling the model anything
            return growing
        before = self.messages[: len(self.messages) - len(self._news)]
        rendered = self.language.bridge.after(before, self._last_id, self._news)
        if rendered.fork:
            return self._begin(rendered.token_ids, rendered.fork)
        sequence = growing.sequence
        sequence.token_ids += rendered.token_ids
        sequence.logps += [0.0] * len(rendered.token_ids)
        growing.sizes += [0] * len(rendered.token_ids)
        self.counts["observation_tokens"] += len(rendered.token_ids)
        self._news = []
        return growing

    def _shown(self) -> Messages:
        """Returns the messages of a step: those of the system, the last turns of the window, and what came since."""
        system = [m for m in self._first if m["role"] == "system"]
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        window = len(turns) if self.section.window is None else self.section.window
        if window >= len(turns):
            return self.messages
        first = turns[len(turns) - window - 1] + 1  # behind the last turn that is not shown
        return system + self.messages[first:]

    def _begin(self, prompt_ids: list[int], fork: str) -> _Growing:
        key = self.start.key
        if self._grown and not self._grown[-1].sequence.turns:
            self._grown.pop()  # nothing was sampled in it
        if self._grown:
            before = sum(g.sequence.prompt_ids == prompt_ids for g in self._grown)
            key = replace(key, stream=fork_stream(key.stream, prompt_ids, before))
        growing = _Growing(TokenSequence(prompt_ids, [], [], [], [], fork=fork), key)
        self._news = []
        self._grown.append(growing)
        return growing

    def _room(self, growing: _Growing) -> int:
        """Returns how many tokens the sequence has left."""
        behind = len(growing.sequence.token_ids)
        budget = self.section.longest(self.start.sampling.max_tokens) - behind
        return min(budget, self.language.longest - len(growing.sequence.prompt_ids) - behind)

    def _take(self, growing: _Growing, result: Result, limit: int) -> Action:
        """Takes a sampled turn into the sequence and the conversation."""
        sequence, start = growing.sequence, len(growing.sequence.token_ids)
        sequence.token_ids += result.token_ids
        sequence.logps += result.logps
        sequence.spans += [Span(s.version, s.start + start, s.end + start) for s in result.spans]
        support = result.support or Support([0] * len(result.token_ids), [])
        growing.sizes += support.sizes
        growing.ids += support.ids
        anchor = None if self._anchor is None else state_number(self._anchor)
        sequence.turns.append(
            Turn(start, len(sequence.token_ids), result.finish_reason, None, anchor, limit, result.replica)
        )
        growing.sampled += len(result.token_ids)
        self._replica = result.replica
        self._last_id = result.token_ids[-1] if result.token_ids else None
        self.turns += 1
        action = self._action(result)
        self.messages.append(action.message)
        return action

    def _action(self, result: Result) -> Action:
        written = self.language.decode_all(result.token_ids)
        for end in self.language.ends:
            written = written.removesuffix(end)
        _, found = read_turn(written, self.language.format)
        calls = tuple(
            ToolCall(call_id(self.start.key, self.turns, i), call.name, call.arguments, call.error)
            for i, call in enumerate(found)
        )
        message = message_of(written, self.language.format, [call.id for call in calls])
        return Action(self.language.decode(result.token_ids), calls, message, result.finish_reason)

    def _sampled(self) -> int:
        return sum(g.sampled for g in self._grown)

    def trajectory(self) -> Trajectory:
        """Returns what the episode has become; without a turn where none was sampled."""
        sequences = []
        for growing in self._grown:
            sequence = growing.sequence
            if growing.ids:
                sequence.support = Support(growing.sizes, growing.ids)
            if sequence.turns:
                last = sequence.turns[-1].end  # what no turn answers is not trained on, nor needed
                del sequence.token_ids[last:], sequence.logps[last:], growing.sizes[last:]
                sequences.append(sequence)
        texts = [
            self.language.decode(s.token_ids[turn.start : turn.end]) for s in sequences for turn in s.turns
        ]  # fmt: skip
        return Trajectory(
            self.start.key.sample,
            sequences,
            self.ending,
            "\n".join(texts),
            0.0,
            failure=self.failure,
            messages=self.messages,
            final=texts[-1] if texts else "",
            counts=dict(self.counts),
        )


def environment_seed(start: Start) -> int:
    """Returns the seed of an episode's environment, 31 bits: the same for all samples of a draw."""
    return NoiseKey(start.key.seed, start.world, start.key.draw).bits() & (2**31 - 1)


def call_id(key: NoiseKey, turn: int, number: int) -> str:
    """Returns the name of a call: nine letters and digits, as some chat templates want, a function of its place."""
    text = f"{key.seed}/{key.stream}/{key.draw}/{key.sample}/{turn}/{number}".encode()
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(letters[bits // 36**i % 36] for i in range(9))
