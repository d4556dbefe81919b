"""Rewards from a server, and in this process: the same promises as the pool's."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.graders.remote import RemoteGrader

from reward_server import Server

PROMPT = [{"role": "user", "content": "2+2="}]


def answers(*responses: str, row: Any = None) -> Answers:
    return Answers(list(responses), "4", PROMPT, row or {"level": 1, "data_source": "sums"})


def drain(grader: Any) -> dict[int, list[Score]]:
    found: dict[int, list[Score]] = {}
    while came := grader.wait():
        assert not found.keys() & dict(came).keys()
        found.update(came)
    return found


@pytest.fixture
def server() -> Iterator[Server]:
    def score(body: Any) -> Any:
        return {"scores": [{"score": float(r == body["ground_truth"]), "n": len(r)} for r in body["responses"]]}

    with Server(score) as running:
        yield running


Make = Callable[..., RemoteGrader]


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    graders: list[RemoteGrader] = []

    def made(url: str = "", kwargs: Any = None, **pool: Any) -> RemoteGrader:
        section = RewardPoolSection(**{"timeout": 10, "retries": 0, **pool})
        graders.append(RemoteGrader(url or f"{server.url}/score", section, kwargs))
        return graders[-1]

    yield made
    for grader in graders:
        grader.close()
        grader.close()


def test_a_server_gets_the_turns_of_a_model_that_acted(make: Make, server: Server) -> None:
    turns = [[{"text": "hm", "reward": 0.5, "calls": 1}, {"text": "4", "reward": None, "calls": 0}]]
    told = [[*PROMPT, {"role": "assistant", "content": "hm"}, {"role": "tool", "content": "4"}]]
    server.score = lambda body: {
        "scores": [{"score": float(body["finals"] == ["4"] and body["messages"] == told), "turns": [[1, 2.0]]}]
    }
    grader = make()
    grader.submit(0, replace(answers("hm\n4"), finals=["4"], conversations=told, turns=turns))
    assert drain(grader) == {0: [Score(1.0, turns=((1, 2.0),))]}
    grader.submit(1, answers("4"))  # a single turn: the request is what it was
    drain(grader)
    assert [{"finals", "messages", "turns"} & body.keys() for body in server.bodies] == [
        {"finals", "messages", "turns"},
        set(),
    ]


def test_a_group_is_one_request_and_its_scores_come_back(server: Server, make: Make) -> None:
    grader = make(kwargs={"strict": True})
    grader.check()  # a GET is answered 405: somebody is there
    for key in range(5):
        grader.submit(key, answers("4", str(key)))
    found = drain(grader)
    assert found == {
        key: [Score(1.0, {"n": 1.0}), Score(float(key == 4), {"n": 1.0})] for key in range(5)
    }  # fmt: skip
    assert len(server.bodies) == 5
    assert server.bodies[0] | {"responses": []} == {
        "responses": [], "ground_truth": "4", "prompt": PROMPT, "row": {"level": 1, "data_source": "sums"},
        "strict": True,
    }  # fmt: skip
    assert grader.wait() == [] and grader.ready() == []


def test_groups_are_asked_about_at_once_up_to_the_limit(server: Server, make: Make) -> None:
    server.delay = 0.1
    grader = make(concurrency=8)
    for key in range(32):
        grader.submit(key, answers("4"))
    assert len(drain(grader)) == 32 and server.most_at_once == 8


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        (422, "refused", "answers 422: not now"),
        (500, "refused", "answers 500: not now"),
        ("<html>", "nonsense", "is not JSON"),
        ("[1.0, 1.0]", "nonsense", "answers without 'scores': [1.0, 1.0]"),
        ('{"scores": [1.0]}', "nonsense", "was given 2 responses and returned 1 scores"),
        ('{"scores": 1.0}', "nonsense", "returned a float"),
        ("close", "refused", "closed the connection"),
    ],
)
def test_a_server_that_misbehaves_loses_that_group_alone(
    server: Server, make: Make, behaviour: Any, kind: str, said: str
) -> None:
    server.answers = [behaviour]
    grader = make(concurrency=1)
    for key in range(3):
        grader.submit(key, answers("4", "5"))
    found = drain(grader)
    assert [s.kind for s in found[0]] == [kind] * 2 and said in str(found[0][0].failure)
    assert "it was scoring 2 responses, the first '4' against '4'" in str(found[0][0].failure)
    assert found[1] == found[2] == [Score(1.0, {"n": 1.0}), Score(0.0, {"n": 1.0})]


def test_one_bad_score_is_one_failure(server: Server, make: Make) -> None:
    server.answers = ['{"scores": [1, null, {"score": NaN}, {"score": 1, "steps": [[1, 0.5]]}]}']
    grader = make()
    grader.submit(0, answers("a", "b", "c", "d"))
    scores = drain(grader)[0]
    assert [s.kind for s in scores] == ["", "nonsense", "nonsense", ""] and scores[3].steps == ((1, 0.5),)


def test_a_server_that_hangs_has_its_time(server: Server, make: Make) -> None:
    server.delay = 30
    grader = make(timeout=0.3, retries=0)
    grader.submit(0, answers("4"))
    (score,) = drain(grader)[0]
    assert score.kind == "timeout" and "did not answer within 0.3 s" in str(score.failure)


def test_a_server_that_comes_back_within_its_retries_loses_nothing(server: Server, make: Make) -> None:
    server.answers = [503, "close"]
    grader = make(retries=2)
    grader.submit(0, answers("4"))
    assert drain(grader) == {0: [Score(1.0, {"n": 1.0})]} and len(server.times) == 3


def test_nobody_there_is_told_before_training(make: Make) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, and not listening
        url = f"http://127.0.0.1:{held.getsockname()[1]}/score"
        with pytest.raises(UserError, match=r"the reward server cannot be used: .*cannot be reached") as caught:
            make(url).check()
        assert url in caught.value.why and "start the server" in caught.value.fix
        grader = make(url)
        grader.submit(0, answers("4"))
        assert [s.kind for s in drain(grader)[0]] == ["refused"]


def test_what_json_has_no_form_for_is_named(make: Make) -> None:
    grader = make()
    with pytest.raises(UserError, match=r"row\['image'\] cannot be sent to the reward server .* as JSON"):
        grader.submit(0, answers("4", row={"level": 1, "image": b"png"}))
    with pytest.raises(UserError, match=r"ground_truth cannot be sent"):
        grader.submit(0, Answers(["4"], float("nan"), PROMPT, {}))
    assert grader.wait() == []
    with pytest.raises(UserError, match=r"reward\.kwargs has 'row'"):
        make(kwargs={"row": 1})


def test_what_is_cancelled_never_comes(server: Server, make: Make) -> None:
    server.delay = 0.3
    grader = make(concurrency=2)
    for key in range(10):
        grader.submit(key, answers("4"))
    while not server.times:
        time.sleep(0.01)
    grader.cancel()
    assert grader.wait() == []
    grader.submit(3, answers("5"))
    assert drain(grader) == {3: [Score(0.0, {"n": 1.0})]} and len(server.times) <= 5


# --- in this process ---


def test_functions_of_this_process_are_called_here() -> None:
    seen: list[int] = []

    def mine(response: str) -> float:
        seen.append(threading.get_ident())
        return float(response)

    grader = InProcessGrader({"mine": mine, "gsm8k": FunctionSpec("gsm8k")})
    grader.check()
    grader.submit(0, answers("1", "x"), "mine")
    grader.submit(1, answers("#### 4", "#### 5"), "gsm8k")
    found = dict(grader.ready())
    assert found[1] == [Score(1.0), Score(0.0)] and found[0][0] == Score(1.0) and found[0][1].kind == "raised"
    assert "the reward mine raised ValueError" in str(found[0][1].failure)
    assert set(seen) == {threading.get_ident()} and grader.wait() == []
    grader.submit(0, answers("1"), "mine")
    grader.cancel()
    assert grader.wait() == []
    grader.close()


def test_async_functions_of_this_process_share_a_loop_and_run_beside_a_notebooks() -> None:
    loops = set()

    async def mine(response: str) -> float:
        loops.add(asyncio.get_running_loop())
        return 1.0

    async def cell() -> list[tuple[int, list[Score]]]:
        grader = InProcessGrader({"mine": mine})
        grader.submit(0, answers("1"))
        grader.submit(1, answers("1"))
        found = grader.wait()
        grader.close()
        grader.close()
        return found

    before = threading.active_count()
    assert asyncio.run(cell()) == [(0, [Score(1.0)]), (1, [Score(1.0)])]
    assert len(loops) == 1 and threading.active_count() == before
