"""`hybridflow.train` and the loop of one's own: a run whose parts are given as objects, and what is refused."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas
import peft
import pyarrow as pa
import pytest
import torch
import yaml

import hybridflow as hf
from hybridflow.checkpoint.run_folder import locked
from hybridflow.config.locate import load_function
from hybridflow.face.rows import rows_of
from hybridflow.rewards.graders.given import recorded_name
from hybridflow.runs.lifecycle import Interrupted

from runs import assert_same_tensors, metrics, mistake
from tiny import CARRY, plain_model

PAGE = CARRY.parents[2] / "docs/python.md"
ROWS = [{"prompt": f"{a}+{b}=", "ground_truth": str(a + b)} for a in (100, 205, 317) for b in (122, 436)]
SMALL: dict[str, Any] = {
    "run": {"threads": 1, "device": "cpu"},
    "data": {"max_prompt_tokens": 64},
    "rollout": {"max_response_tokens": 8},
    "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2},
    "optim": {"lr": 1e-3},
    "eval": {"before_training": False},
    "track": {"console": False},
}


def score(response: str) -> float:
    """Its values differ between responses, however untrained the model."""
    return sum(map(ord, response)) % 101 / 101


def small(folder: Path, **given: Any) -> Any:
    """The call with small sizes; what is given is laid over them."""
    return hf.train(
        **{"model": f"{CARRY}:tiny_qwen3", "data": ROWS, "reward": score, "folder": folder, "config": SMALL} | given
    )


def refused(folder: Path, **given: Any) -> str:
    with pytest.raises(hf.UserError) as error:
        small(folder, **given)
    return str(error.value)


def programs() -> dict[str, str]:
    """The programs of the page, by the name that they end with."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return {"call": next(b for b in blocks if "hf.train(" in b), "loop": next(b for b in blocks if "next_groups" in b)}


def test_the_programs_of_the_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert programs()["call"] in (PAGE.parents[1] / "README.md").read_text()
    model = f"{CARRY}:tiny_qwen3"
    call = programs()["call"].replace('model="Qwen/Qwen2.5-0.5B-Instruct"', f'model="{model}", config={SMALL!r}')
    (tmp_path / "recipes").symlink_to(CARRY.parents[1])
    monkeypatch.chdir(tmp_path)
    exec(compile(call, "call", "exec"), {"__name__": "call"})
    assert len(metrics(tmp_path / "runs/train")) == 2
    assert (tmp_path / "runs/train/model/config.json").is_file()

    overrides = [
        f"model.path={model}",
        "train.steps=1",
        "train.prompts_per_step=2",
        "eval.every=0",
        "data.eval=null",
        "eval.before_training=false",
    ]
    loop = programs()["loop"].replace('["run.folder=runs/my-loop"]', str(["run.folder=runs/my-loop", *overrides]))
    exec(compile(loop, "loop", "exec"), {"__name__": "loop"})
    assert len(metrics(tmp_path / "runs/my-loop")) == 1
    assert (tmp_path / "runs/my-loop/model/config.json").is_file()
    recorded = yaml.safe_load((tmp_path / "runs/my-loop/config.yaml").read_text())["reward"]["function"]
    assert re.fullmatch(r"given:score@[0-9a-f]{12}", recorded)


def test_objects_train_as_their_files_do_and_the_same_call_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by a callback, resumed, made once more; the weights are those of one run of the kept files."""
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(0)
    seen: list[Any] = []

    def stop(run: Any, step: int, metrics: dict[str, float], groups: list[Any], batch: hf.Batch) -> None:
        seen.append((step, metrics["training/global_step"], len(groups), len(batch)))
        if len(seen) == 1:
            run.stop.request("seen enough")

    one = {"model": model, "tokenizer": tokenizer, "callbacks": [stop, lambda: None], "eval_data": ROWS[4:]}
    first = small(tmp_path / "one", **one)
    assert (first.model, len(first.metrics)) == (None, 1)
    assert first.stopped == "after step 1 of 2: seen enough"
    assert "to resume: make the same call of hybridflow.train" in capsys.readouterr().out
    second = small(tmp_path / "one", **one)
    assert (second.stopped, second.model, len(second.metrics)) == (None, tmp_path / "one/model", 2)
    assert seen == [(1, 1.0, 2, 4), (2, 2.0, 2, 4)]
    assert second.report.is_file()
    capsys.readouterr()
    assert small(tmp_path / "one", **one) == second
    assert "already done: 2 of 2 steps" in capsys.readouterr().out

    kept = tmp_path / "one/given"
    named = {"model": str(kept / "model"), "data": str(kept / "train.jsonl"), "eval_data": kept / "eval.jsonl"}
    assert small(tmp_path / "two", **named).metrics[-1].keys() == second.metrics[-1].keys()
    assert_same_tensors(tmp_path / "one/model/model.safetensors", tmp_path / "two/model/model.safetensors")

    # Other objects in the same folder are refused before anything is written, and another process as well.
    before = (tmp_path / "one/given/train.jsonl").read_text()
    assert "row 1 is the first that differs: 'prompt' was '100+436=', is 'x'" in refused(
        tmp_path / "one", **one | {"data": [ROWS[0], {"prompt": "x"}, *ROWS[2:]]}
    )
    assert "there were 6, and there are 5" in refused(tmp_path / "one", **one | {"data": ROWS[:5]})
    assert (tmp_path / "one/given/train.jsonl").read_text() == before
    other = load_function(f"{CARRY}:tiny_qwen3")(1)[0]
    assert "its tensor model.embed_tokens.weight differs" in refused(tmp_path / "one", **one | {"model": other})
    other = load_function(f"{CARRY}:tiny_qwen3")(0)[0]
    other.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    assert "its generation configuration differs" in refused(tmp_path / "one", **one | {"model": other})
    with locked(tmp_path / "one/given/.lock", run=tmp_path / "one"):
        assert "is running in" in refused(tmp_path / "one", **one)

    # Another function is a changed setting; the command cannot run what only this program has.
    config = yaml.safe_load((tmp_path / "one/config.yaml").read_text())
    assert config["reward"]["function"] == recorded_name(score)
    small(tmp_path / "one", **one | {"reward": lambda response: 0.5, "train": {"steps": 3}})
    assert (
        f"reward.function was {recorded_name(score)}, is given:lambda@" in (tmp_path / "one/events.jsonl").read_text()
    )
    assert "run that program again" in mistake(capsys, "train", tmp_path / "one/config.yaml")


def test_an_exception_in_a_callback_names_it_and_loses_no_step(tmp_path: Path) -> None:
    def broken(step: int) -> None:
        if not (tmp_path / f"mended-{step}").exists():
            (tmp_path / f"mended-{step}").touch()
            raise KeyError("no such thing")

    said = refused(tmp_path / "run", callbacks=[broken])
    assert "the callback broken raised after step 1: KeyError: 'no such thing'" in said
    assert "test_face.py, line" in said and "the run resumes with step 2" in said
    assert "the run then writes its model" in refused(tmp_path / "run", callbacks=[broken])
    done = small(tmp_path / "run", callbacks=[broken])
    assert [m["step"] for m in done.metrics] == [1, 2] and done.model == tmp_path / "run/model"
    assert len((tmp_path / "run/events.jsonl").read_text().split('"resume"')) == 3


def test_ctrl_c_saves_everything_and_reaches_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        small(tmp_path / "run", callbacks=[lambda: os.kill(os.getpid(), signal.SIGINT)])
    assert "to resume: make the same call of hybridflow.train" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step-000001").is_dir()


class Rows:
    """A data set of torch: it has no more than these."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, str]:
        return [{"prompt": "a"}, {"prompt": "b"}][index]


@pytest.mark.parametrize("rows", [[{"prompt": "a"}, {"prompt": "b"}], Rows(), pa.table({"prompt": ["a", "b"]})])
def test_rows_are_taken_from_lists_data_sets_and_tables(rows: Any) -> None:
    assert rows_of(rows, "data") == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows_of((row for row in [{"prompt": ("a", 1.5)}]), "data") == [{"prompt": ["a", 1.5]}]


def test_rows_of_pandas_and_datasets_are_taken() -> None:
    frame = pandas.DataFrame({"prompt": ["a", "b"], "n": [1, None]})
    assert rows_of(frame, "data") == [{"prompt": "a", "n": 1.0}, {"prompt": "b", "n": None}]
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    assert rows_of(rows, "data") == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(
        hf.UserError, match=r"with the splits train, test\n  fix: give one of them: data=dataset\['train"
    ):
        rows_of(datasets.DatasetDict(train=rows, test=rows), "data")
    with pytest.raises(hf.UserError, match=r"streaming data set"):
        rows_of(rows.to_iterable_dataset(), "data")


BAD_ROWS: list[tuple[Any, list[str]]] = [
    ([], ["data has no rows", '[{"prompt": "2+2="']),
    (["what is 2+2?"], ["row 0 of data is a str", '[{"prompt": text} for text in texts]']),
    ({"prompt": ["a"], "answer": ["b"]}, ["dict of columns (prompt, answer)", "zip(*columns.values())"]),
    (
        [{"prompt": "a"}, {"prompt": "b", "when": object()}],
        ["column 'when' of row 1 of data is a object", "str(value)"],
    ),
    ([{"prompt": "a", "image": b"..."}], ["column 'image' of row 0", "images are not supported"]),
    ([{"prompt": "a", "worth": float("nan")}], ["column 'worth' of row 0 of data is nan", "None"]),
    ([{"prompt": "a", 3: "b"}], ["row 0 of data has the key 3, a int"]),
    (3, ["data is a int, not rows"]),
    (plain_model, ["data is a function, not rows", "call it: data=plain_model()"]),
    ([{"question": "a", "ground_truth": "b"}], ["no column 'prompt'", "set data.prompt_key=question"]),
]
BAD_CALLS: list[tuple[dict[str, Any], list[str]]] = [
    ({"train": {"epochs": 1}, "reward": lambda: 1.0}, ["does not take 'response'"]),  # and not "both are given"
    ({"optimm": {}}, ["has no argument 'optimm'", "did you mean 'optim'"]),
    ({"learning_rate": 1e-5}, ['here it is optim={"lr": ...}']),
    ({"gradient_accumulation_steps": 2}, ['here it is train={"sequences_per_update": ...}; counted']),
    ({"epochs": 1}, ['here it is train={"epochs": ...}']),
    ({"max_prompt_length": 9}, ['here it is data={"train": data, "max_prompt_tokens": ...}']),
    ({"every": 1}, ['here it is eval={"every": ...} or checkpoint={"every": ...}']),
    ({"algorithm": "dr_grpo"}, ['algorithm={"preset": "dr_grpo"}']),
    ({"reward": 1.0}, ["reward is a float, and not a function", "reward=score"]),
    ({"num_generations": 8}, ['here it is train={"samples_per_prompt": ...}']),
    ({"reward_funcs": [score]}, ["here it is reward=function"]),
    ({"train_dataset": ROWS}, ["here it is data=rows"]),
    ({"processing_class": None}, ["here it is tokenizer=tokenizer"]),
    ({"args": SimpleNamespace()}, ["here it is sections as dicts"]),
    ({"config": SimpleNamespace()}, ["config is a SimpleNamespace", "path of a YAML file"]),
    ({"optim": {"learning_rate": 1e-5}}, ["optim.learning_rate: unknown key; here it is optim.lr"]),
    ({"tokenizer": object()}, ["a tokenizer is given beside a model that is named"]),
    ({"callbacks": [lambda loss: None]}, ["the callback <lambda> wants 'loss'", "any of the arguments step, metrics"]),
    ({"callbacks": [lambda state, **kwargs: None]}, ["the callback <lambda> wants 'state'"]),
    ({"callbacks": [lambda step, /: None]}, ["the callback <lambda> takes 'step' by position only"]),
    ({"callbacks": score}, ["callbacks is a function, not a list", "callbacks=[function]"]),
    ({"callbacks": [3]}, ["entry 0 of callbacks is a int, not a function"]),
    ({"reward": lambda answer_text: 0.0}, ["wants 'answer_text'", "def score(response: str"]),
    ({"reward": "org/scorer"}, ["set reward.function=model and reward.model.path=org/scorer"]),
    ({"reward": []}, ["reward is an empty list"]),
    ({"reward": [score, torch.nn.Identity()]}, ["reward is a model (Identity)", '"function": "model"']),
    (
        {"reward": {"function": score, "kwargs": {"typo": 1}}},
        ["the reward score does not take what it is given beforehand: typo", "response"],
    ),
    ({"reward": ["gsm8k"]}, ["entry 0 of reward is a str", '"terms"']),
    ({"model": object()}, ["model is a object", "PreTrainedModel with tokenizer="]),
]


@pytest.mark.parametrize(("given", "words"), [*(({"data": rows}, words) for rows, words in BAD_ROWS), *BAD_CALLS])
def test_a_mistake_in_the_call_is_told_and_nothing_is_trained(
    tmp_path: Path, given: dict[str, Any], words: list[str]
) -> None:
    said = refused(tmp_path / "run", **given)
    assert [word for word in words if word not in said] == [], said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_folder_that_is_no_path_is_refused() -> None:
    with pytest.raises(hf.UserError, match="folder is a int, not a path"):
        hf.train("a-model", ROWS, score, folder=3)  # type: ignore[arg-type]


def test_a_model_object_needs_the_tokenizer_that_belongs_to_it(tmp_path: Path) -> None:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(0)
    assert "no tokenizer is given" in refused(tmp_path, model=model)
    few = plain_model()
    few.resize_token_embeddings(10)
    assert "the model's vocabulary ends at 9" in refused(tmp_path, model=few, tokenizer=tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    said = refused(tmp_path, model=model, tokenizer=tokenizer)
    assert "the tokenizer's eos_token_id is" in said and "give the model's own tokenizer" in said
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert "merge_and_unload" in refused(tmp_path, model=adapted, tokenizer=tokenizer)


class Scorer:
    """A callable object with a setting, and a method."""

    def __init__(self, worth: float) -> None:
        self.worth = worth

    def __call__(self, response: str) -> float:
        return self.worth

    def method(self, response: str) -> float:
        return self.worth


def closure(worth: float) -> Callable[[str], float]:
    return lambda response: worth


def calls(inner: Callable[..., float]) -> Callable[[str], float]:
    return lambda response: inner(response)


def test_a_lambda_is_recorded_by_what_it_does_and_not_by_its_line() -> None:
    one, other = (lambda response: 1.0), (lambda response: 2.0)
    again = lambda response: 1.0  # noqa: E731
    assert recorded_name(one) != recorded_name(other)
    assert recorded_name(one) == recorded_name(again)


def test_a_reward_is_recorded_by_what_it_computes_with() -> None:
    def names(make: Callable[[float], Any]) -> tuple[str, str, str]:
        return recorded_name(make(1.0)), recorded_name(make(1.0)), recorded_name(make(2.0))

    makers: list[Callable[[float], Any]] = [
        Scorer,
        lambda worth: Scorer(worth).method,
        closure,
        lambda worth: functools.partial(score, weight=worth),
        lambda worth: [score, Scorer(worth)],
        lambda worth: functools.partial(score, client=object(), weights=[{"a": worth}]),
        lambda worth: functools.partial(score, allowed={worth, "a", "b"}),
        lambda worth: calls(closure(worth)),
        lambda worth: calls(functools.partial(score, weight=worth)),
    ]
    for make in makers:
        one, again, other = names(make)
        assert one == again != other
        assert re.fullmatch(r"given:[\w+]+@[0-9a-f]{12}", one)


class Counter:
    """A reward that changes itself when it is called."""

    def __init__(self, lock: Any = None) -> None:
        self.calls, self.lock = 0, lock

    def __call__(self, response: str) -> float:
        self.calls += 1
        return score(response)


def test_a_reward_that_counts_its_calls_is_the_same_to_the_next_process(tmp_path: Path) -> None:
    """It holds a lock besides, which cannot be copied."""
    config = SMALL | {"reward": {"function": Counter(threading.Lock())}}
    name = recorded_name(config["reward"]["function"])
    small(tmp_path / "run", config=config, reward=None, train={"steps": 1})
    assert config["reward"]["function"].calls > 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["reward"]["function"] == name


REWARD_FILE = """
import functools
def score(completions, completion_ids, weight=1.0):
    return [weight * len(ids) for ids in completion_ids]

def kept(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

def _plain(response):
    return 0.0

decorated = kept(_plain)
"""


def test_a_reward_in_processes_of_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"pool": {"processes": 1}}
    for function in (lambda response: 0.0, closure(1.0), Scorer(1.0)):
        said = refused(tmp_path / "run", reward={"function": function, **pool})
        assert "another process loads a reward by its name" in said and "file of its own" in said
    (tmp_path / "my_reward_file.py").write_text(REWARD_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_reward_file

    said = refused(tmp_path / "run", reward={"function": my_reward_file.decorated, **pool})
    assert "the reward _plain is not what" in said and "my_reward_file.py has under that name" in said
    half, whole = (functools.partial(my_reward_file.score, weight=weight) for weight in (0.5, 1.0))
    done = small(tmp_path / "run", reward={"function": [half, whole], **pool}, train={"steps": 1})
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["reward"]["terms"]
    assert {name: (term["function"], term["kwargs"]) for name, term in recorded.items()} == {
        "score": (f"{tmp_path / 'my_reward_file.py'}:score", {"weight": 0.5}),
        "score_2": (f"{tmp_path / 'my_reward_file.py'}:score", {"weight": 1.0}),
    }
    found = done.metrics[0]
    assert found["reward/score_2/max"] == 2 * found["reward/score/max"] == found["response_length/max"] > 0


def test_a_configuration_is_the_base_of_a_call(tmp_path: Path) -> None:
    """A file, sections or an object; what the call gives wins over them, and a reward replaces the base's whole."""
    small(tmp_path / "run")
    data = SMALL["data"] | {"train": str(tmp_path / "run/given/train.jsonl")}
    model = {"path": f"{CARRY}:tiny_qwen3"}
    base = SMALL | {
        "run": SMALL["run"] | {"folder": "none"},
        "model": model,
        "data": data,
        "reward": {"function": "math"},
    }
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(base))
    for i, config in enumerate((str(file), base, hf.load_config(file))):
        folder, stop = tmp_path / f"run{i}", lambda run: run.stop.request("one is enough")
        hf.train(config=config, reward=score, folder=folder, optim={"lr": 2e-3}, callbacks=[stop])
        one, other = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("run", f"run{i}"))
        assert other["optim"] == one["optim"] | {"lr": 2e-3}
        assert [other[name] for name in ("train", "reward", "rollout")] == [
            one[n] for n in ("train", "reward", "rollout")
        ]


def test_a_short_call_makes_one_pass_with_no_more_prompts_than_there_are_rows(tmp_path: Path) -> None:
    config = {name: section for name, section in SMALL.items() if name != "train"}
    done = small(tmp_path / "run", config=config, train={"samples_per_prompt": 2})
    train = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]
    assert (train["epochs"], train["prompts_per_step"], len(done.metrics)) == (1, 6, 1)
