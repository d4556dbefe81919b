"""A reward model at run time: its scores are transformers' own, alone or beside others, of answers or their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import validate
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError
from hybridflow.grading.model_grader import ModelGrader, make_reward_model, step_ends
from hybridflow.placing.places import Places, describe_placement
from hybridflow.protocols.rewards import Answers, Score

from preferences import FAMILIES, saved_classifier
from tiny import CARRY

PROMPT = [{"role": "user", "content": "12+34="}]
RESPONSES = ["2+4=6,1+3=4#46", "46", "I do not know", ""]


def config_of(path: Path | str, placement: dict[str, Any] | None = None, **model: Any) -> RlConfig:
    values = {
        "run": {"folder": "unused", "device": "cpu", "threads": 1},
        "model": {"path": f"{CARRY}:tiny_qwen3"},
        "data": {"train": f"{CARRY}:problems"},
        "reward": {"function": "model", "model": {"path": str(path), "max_tokens": 64} | model},
        "train": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
        "placement": placement or {},
    }
    return validate(RlConfig, values)


def answers(responses: list[str], prompt: list[dict[str, Any]] | None = None) -> Answers:
    return Answers(responses, None, prompt or PROMPT, {})


def scores_of(grader: ModelGrader, asked: Answers) -> list[Score]:
    grader.submit(7, asked)
    ((key, found),) = grader.wait()
    assert key == 7 and grader.wait() == [] == grader.ready()
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Packed where the family is known, padded where it is not (gpt2)."""
    path = saved_classifier(tmp_path / "model", kind)
    found = scores_of(make_reward_model(config_of(path), None), answers(RESPONSES))
    model, own = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for response, score in zip(RESPONSES, found):
        text = own.apply_chat_template([*PROMPT, {"role": "assistant", "content": response}], tokenize=False)
        with torch.no_grad():
            expected = float(model(**own(text, return_tensors="pt", add_special_tokens=False)).logits)
        assert score == Score(pytest.approx(expected, abs=1e-5))
    assert len({score.value for score in found}) == len(RESPONSES)


def test_a_score_does_not_depend_on_what_else_is_scored(tmp_path: Path) -> None:
    grader = make_reward_model(config_of(saved_classifier(tmp_path / "model")), None)
    alone = scores_of(grader, answers(RESPONSES))
    for key in range(3):
        grader.submit(key, answers(RESPONSES if key == 1 else [f"{key}" * 20, "x"]))
    found = dict(grader.ready())
    assert found[1] == alone and len(found) == 3
    grader.submit(5, answers(["forgotten"]))
    grader.cancel()
    assert grader.wait() == []
    grader.close()


def test_an_answer_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    grader = make_reward_model(config_of(saved_classifier(tmp_path / "model")), None)
    short, long, other = scores_of(grader, answers(["1", "9" * 70, "2"]))
    assert (long.value, long.kind) == (0.0, "refused")
    assert f"the reward model {tmp_path / 'model'}: 80 tokens, reward.model.max_tokens is 64" in str(long.failure)
    assert len(str(long.failure)) <= 200
    assert [short, other] == scores_of(grader, answers(["1", "2"])) and short.value != other.value
    assert [s.kind for s in scores_of(grader, answers(["8" * 70]))] == ["refused"]


def test_steps_are_scored_where_they_end(tmp_path: Path) -> None:
    path = saved_classifier(tmp_path / "model")
    response = "one\n\nand two\n\nthree"
    grader = make_reward_model(config_of(path, step_separator="\n\n"), None)
    whole, empty = scores_of(grader, answers([response, ""]))
    assert whole.value == 0.0 and [end for end, _ in whole.steps] == [5, 14, 19]
    model, own = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    before = own.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    for characters, value in whole.steps:
        with torch.no_grad():  # the conversation up to there, read at its last token
            ids = own(before + response[:characters], return_tensors="pt", add_special_tokens=False).input_ids
            assert value == pytest.approx(float(model(input_ids=ids).logits), abs=1e-5)
    ((characters, _),) = empty.steps
    assert characters == 0


def test_white_space_is_no_step() -> None:
    assert step_ends("a\n\n\n\nb\n", "\n") == [2, 6 + 1]
    assert step_ends("a<s>b<s>", "<s>") == [4, 8]
    assert step_ends("a<s><s> ", "<s>") == [4]


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = saved_classifier(tmp_path / "model")
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content | trim }}\n{% endfor %}"
    )
    grader = make_reward_model(config_of(path, template=str(tmp_path / "plain.jinja"), step_separator=";"), None)
    (found,) = scores_of(grader, answers([" x;y "]))
    assert [end for end, _ in found.steps] == [3, 5]
    model, own = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for text, (_, value) in zip(["u: 12+34=\na: x;", "u: 12+34=\na: x;y"], found.steps):
        with torch.no_grad():
            ids = own(text, return_tensors="pt", add_special_tokens=False).input_ids
            assert value == pytest.approx(float(model(input_ids=ids).logits), abs=1e-5)
    with pytest.raises(UserError, match=r"reward.model.template: no file .*none.jinja"):
        make_reward_model(config_of(path, template=str(tmp_path / "none.jinja")), None)
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no roles here') }}")
    with pytest.raises(UserError, match="cannot render a conversation: no roles here"):
        make_reward_model(config_of(path, template=str(tmp_path / "strict.jinja")), None)
    (tmp_path / "short.jinja").write_text("{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}x")
    refusing = make_reward_model(config_of(path, template=str(tmp_path / "short.jinja")), None)
    (failed,) = scores_of(refusing, answers(["1"], [*PROMPT, *PROMPT]))
    assert failed.kind == "raised" and "too many" in str(failed.failure)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    causal, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    causal.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(UserError, match="is a Qwen3ForCausalLM: it has no classification head"):
        make_reward_model(config_of(tmp_path / "causal"), None)
    with pytest.raises(UserError, match=r"the Qwen3ForSequenceClassification in .* has 3 labels"):
        make_reward_model(config_of(saved_classifier(tmp_path / "three", labels=3)), None)
    with pytest.raises(UserError, match="no model at"):
        make_reward_model(config_of(tmp_path / "nothing"), None)
    path = saved_classifier(tmp_path / "model")
    with pytest.raises(UserError, match=r"reward\.model\.max_tokens is 4096, the context of .* is 128"):
        make_reward_model(config_of(path, max_tokens=4096), None)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    path = saved_classifier(tmp_path / "model")
    exact, near = (
        scores_of(make_reward_model(config_of(path, dtype=dtype), None), answers(RESPONSES))
        for dtype in ("float32", "bfloat16")
    )
    gaps = [abs(a.value - b.value) for a, b in zip(exact, near)]
    assert 0 < max(gaps) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "engine"),
    [
        ({"pools": {"all": 1}, "backend": "processes"}, None),
        ({"pools": {"train": 1, "score": 1}, "roles": {"reward": "score"}}, None),
        ({"pools": {"train": 1, "score": 2}, "roles": {"reward": "score"}}, {"strategy": "fsdp2"}),
    ],
)
def test_a_pool_scores_alike(placement: dict[str, Any], engine: dict[str, Any] | None, tmp_path: Path) -> None:
    path = saved_classifier(tmp_path / "model")
    expected = scores_of(make_reward_model(config_of(path), None), answers(RESPONSES))
    config = config_of(path, placement, engine=engine)
    assert any("reward (" in line for line in describe_placement(config))
    places = Places(config, lambda kind, text: None)
    try:
        grader = make_reward_model(config, places)
        for key in range(3):
            grader.submit(key, answers(RESPONSES))
        found: dict[int, list[Score]] = dict(grader.ready())
        while len(found) < 3:
            found.update(grader.wait())
    finally:
        places.close()
    assert found[0] == found[1] == found[2]
    assert [s.value for s in found[0]] == pytest.approx([s.value for s in expected], abs=1e-5)
