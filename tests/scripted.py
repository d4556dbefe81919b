"""A generation engine that says what a script says, and runs of agents on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybridflow.agents.make import make_agents
from hybridflow.chat.template import Style
from hybridflow.config.sections.agent import AgentSection
from hybridflow.groups.driving import Driver
from hybridflow.groups.playback import Playback, requests_of
from hybridflow.noise import NoiseKey
from hybridflow.protocols.calls import CallStore
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result, Sampling, Span
from hybridflow.protocols.groups import Trajectory
from talks import PLAIN, byte_tokenizer


@dataclass(frozen=True)
class Asked:
    """A prompt of a script."""

    text: str
    row: dict[str, Any]

    ground_truth: Any = None
    written: Any = None
    token_ids: tuple[int, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.text}] if self.text else []


class ScriptedEngine:
    """Answers requests with texts; log-probabilities say the place of a token among all that it ever said.

    Args:
        tokenizer: of the texts.
        say: from (sample, number of the turn) to the text of the turn; one that ends in "~" is cut there.
    """

    version, replicas, max_model_len, cache_block, same_memory = 3, 1, 4000, 0, False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[int, int], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.requests: list[Request] = []
        self.said = 0
        self.interrupts = 0
        self._turns: dict[tuple[int, int], int] = {}
        self._ready: list[Result] = []

    def submit(self, request: Request) -> int:
        self.requests.append(request)
        place = (request.noise.draw, request.noise.sample)
        number = self._turns[place] = self._turns.get(place, -1) + 1
        text = self.say(request.noise.sample, number)
        ids = self.tokenizer(text.removesuffix("~"), add_special_tokens=False).input_ids
        ids += [] if text.endswith("~") else [self.tokenizer.eos_token_id]
        ids = ids[: request.sampling.max_tokens]
        logps = [-float(self.said + i) for i in range(1, len(ids) + 1)]
        self.said += len(ids)
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        handle = len(self.requests) - 1
        self._ready.append(Result(handle, ids, logps, reason, [Span(3, 0, len(ids))], replica=number % 2))  # type: ignore[arg-type]
        return handle

    def wait(self) -> list[Result]:
        ready, self._ready = self._ready, []
        return ready

    def abort(self, handles: Sequence[int]) -> list[Result]:
        self._ready = [result for result in self._ready if result.handle not in set(handles)]
        return []

    def interrupt(self) -> None:
        self.interrupts += 1


@dataclass
class Played:
    """What a script became."""

    engine: ScriptedEngine
    tokenizer: PreTrainedTokenizerBase
    trajectories: list[Trajectory]
    starts: list[Start]

    def repeated(self) -> list[Request]:
        """What the engine is asked where the trajectories are played back."""
        pairs = zip(self.starts, self.trajectories)
        return [request for start, t in pairs for request in requests_of(start, t.sequences)]

    def shown(self, trajectory: int = 0) -> list[tuple[str, str]]:
        """The sequences of a trajectory as (who wrote it, text) pieces: "context" or "model"."""
        pieces: list[tuple[str, str]] = []
        for s in self.trajectories[trajectory].sequences:
            pieces.append(("context", str(self.tokenizer.decode(s.prompt_ids))))
            at = 0
            for turn in s.turns:
                if turn.start > at:
                    pieces.append(("context", str(self.tokenizer.decode(s.token_ids[at : turn.start]))))
                pieces.append(("model", str(self.tokenizer.decode(s.token_ids[turn.start : turn.end]))))
                at = turn.end
        return pieces


def played(
    say: Callable[[int, int], str],
    *,
    samples: int = 1,
    template: str = PLAIN,
    prompt: str = "question",
    row: dict[str, Any] | None = None,
    budget: int = 500,
    longest: int = 4000,
    order: str = "rounds",
    playback: bool = False,
    calls: CallStore | None = None,
    told: list[str] | None = None,
    **section: Any,
) -> Played:
    """Plays a script against the tools or the environment of an ``agent`` section; `budget` counts sampled tokens."""
    tokenizer = byte_tokenizer(template)
    engine = ScriptedEngine(tokenizer, say)
    agents = make_agents(
        AgentSection(**section),
        tokenizer,
        Style(),
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        stops=[int(tokenizer.eos_token_id)],  # type: ignore[arg-type]
        longest=longest,
        order=order,  # type: ignore[arg-type]
        calls=calls,
        tell=(told if told is not None else []).append,
    )
    driver = Driver(engine, Playback(agents) if playback else agents)  # type: ignore[arg-type]
    sampling = Sampling(budget, stop_token_ids=(int(tokenizer.eos_token_id),))  # type: ignore[arg-type]
    asked = Asked(prompt, row or {})
    starts = [Start(NoiseKey(5, "train", 7, i), asked, sampling) for i in range(samples)]
    numbers = [driver.begin(start) for start in starts]
    found: dict[int, Trajectory] = {}
    while driver.running:
        found |= dict(driver.advance())
    agents.close()
    return Played(engine, tokenizer, [found[number] for number in numbers], starts)


def things(folder: Path, text: str) -> str:
    """Writes a file of tools, environments and loops; returns its path."""
    path = folder / "things.py"
    path.write_text(text)
    return str(path)
