"""What a model is shown after its turn is what the chat template writes there, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hybridflow.chat.bridge import Bridge
from hybridflow.chat.template import CHAT, Style, apply_template
from hybridflow.errors import UserError
from talks import (
    CALCULATOR,
    PLAIN,
    STRICT,
    THOUGHT,
    TRIMS,
    TWO_ENDS,
    WITHOUT_TOOLS,
    answer,
    byte_tokenizer,
    deepseek,
    hermes,
    real_tokenizer,
    turn,
    user,
)

# Each a conversation that ends in new messages, with the text that the model wrote for each turn.
Talk = tuple[list[dict[str, Any]], list[str]]
TALKS: dict[str, Talk] = {
    "plain": ([user("a"), turn("b"), user("c"), turn("d e"), user("f")], ["b", "d e"]),
    "think user": ([user("a"), turn(THOUGHT + "b"), user("c")], [THOUGHT + "b"]),
    "tool": ([user("a"), turn("", "1+2"), answer("3")], [hermes("1+2")]),
    "text tool": ([user("a"), turn("so", "1+2"), answer("3")], ["so\n" + hermes("1+2")]),
    "two calls": (
        [user("a"), turn("", "1+2", "4\u00e9"), answer("3"), answer("?", call=1)],
        [hermes("1+2", "4\u00e9")],
    ),
    "tool tool": (
        [user("a"), turn("", "1+2"), answer("3"), turn("", "3+4", number=1), answer("7", 1), turn("7"), user("b")],
        [hermes("1+2"), hermes("3+4"), "7"],
    ),
    "think tool": (
        [
            user("a"),
            turn(THOUGHT, "1+2"),
            answer("3"),
            turn(THOUGHT, "3+4", number=1),
            answer("7", 1),
            turn(THOUGHT + "7"),
        ],
        [THOUGHT + hermes("1+2"), THOUGHT + hermes("3+4"), THOUGHT + "7"],
    ),
    "think tool user": (
        [user("a"), turn(THOUGHT, "1+2"), answer("3"), turn(THOUGHT + "3"), user("b"), turn("", "4", number=2)],
        [THOUGHT + hermes("1+2"), THOUGHT + "3", hermes("4")],
    ),
    "system": ([{"role": "system", "content": "be brief"}, user("a"), turn("b"), user("c")], ["b"]),
    "a tool's text from the user": (
        [user("a"), turn("b"), user("<tool_response>\n5\n</tool_response>"), turn("d"), user("e")],
        ["b", "d"],
    ),
}
CALLS = [name for name, (messages, _) in TALKS.items() if any(m.get("tool_calls") for m in messages)]


def expected(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], style: Style) -> list[int]:
    """What a server shows the model: the whole conversation, rendered and tokenised afresh."""
    text = apply_template(tokenizer, messages, style, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def walk(
    tokenizer: PreTrainedTokenizerBase,
    talk: Talk,
    style: Style = CHAT,
    write: Callable[[str], str] = lambda text: text,
) -> list[str]:
    """Plays a conversation with a model that writes its turns as the template would, and compares every context with a
    fresh rendering; returns what came after each turn: "" or the kind of a fork.

    Args:
        tokenizer: with its template.
        talk: the conversation and the texts of its turns.
        style: how it is rendered.
        write: changes how the model writes a turn; then only what is around its turns is compared.
    """
    bridge, (messages, texts) = Bridge(tokenizer, style), talk
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    context, forks = bridge.prompt(messages[: places[0]]), []
    for number, (i, text) in enumerate(zip(places, texts)):
        shown = expected(tokenizer, messages[:i], style)
        assert context == shown
        sampled = tokenizer(write(text), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        news = messages[i + 1 : places[number + 1] if number + 1 < len(places) else len(messages)]
        if not news:
            break
        found = bridge.after(messages[: i + 1], sampled[-1], news)
        fresh = expected(tokenizer, messages[: i + 1 + len(news)], style)
        forks.append(found.fork)
        if found.fork:
            assert found.token_ids == fresh
            context = found.token_ids
            continue
        if write(text) == text:
            context = context + sampled + found.token_ids
            assert context == fresh, tokenizer.decode(context)
            continue
        plain = tokenizer(text, add_special_tokens=False).input_ids
        behind = [shown + own + found.token_ids for own in (plain, [*plain, tokenizer.eos_token_id])]
        assert fresh in behind, tokenizer.decode(fresh)
        context = fresh
    return forks


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("template", [PLAIN, STRICT], ids=["plain", "strict"])
def test_contexts_are_those_of_a_fresh_rendering(template: str, name: str) -> None:
    end = "<|im_end|>" if template == PLAIN else "</s>"
    tokenizer = byte_tokenizer(template, end)
    messages, texts = TALKS[name]
    if template == STRICT:
        texts = [text.replace("so\n<", "so<").replace("</tool_call>\n<", "</tool_call><") for text in texts]
    forks = walk(tokenizer, (messages, texts), Style(tools=(CALCULATOR,)))
    assert not any(forks)


def random_talk(seed: int, calls: Callable[..., str] = hermes) -> Talk:
    """A conversation of one to seven turns, with and without thoughts, texts, calls, and messages of the user.

    Args:
        seed: of all choices.
        calls: how calls are written. DeepSeek's template shows no text beside them, and ends a turn twice behind three.
    """
    rng, alone = random.Random(seed), calls is deepseek
    messages, texts = [{"role": "system", "content": "be brief"}] * (rng.random() < 0.3) + [user("a")], []
    for number in range(rng.randint(1, 7)):
        thought = THOUGHT if rng.random() < 0.4 and not alone else ""
        count = rng.choice([0, 0, 1, 1, 2, 2 if alone else 3])
        text = thought + (("" if alone else rng.choice(["", "so"])) if count else "b")
        expressions = [f"{number}+{i}" for i in range(count)]
        messages.append(turn(text, *expressions, number=number))
        texts.append(text + "\n" * text.endswith("so") + (calls(*expressions) if count else ""))
        messages += [answer(str(i), number, i) for i in range(count)]
        if not count or rng.random() < 0.2:
            messages.append(user(rng.choice(["c", "<tool_response>\n5\n</tool_response>"])))
    return messages, texts


def test_any_conversation_is_that_of_a_fresh_rendering() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    for seed in range(40):
        assert not any(walk(tokenizer, random_talk(seed), Style(tools=(CALCULATOR,))))


def test_a_template_with_two_closings_forks() -> None:
    assert walk(byte_tokenizer(TWO_ENDS), TALKS["plain"]) == ["closing rewritten", "closing rewritten"]


def test_how_the_model_wrote_a_turn_is_no_reason_to_fork() -> None:
    """Spaces that the template strips, and calls that it would write in another way: the sampled tokens stay."""
    tokenizer, style = byte_tokenizer(TRIMS), Style(tools=(CALCULATOR,))
    for name in ("plain", "tool", "two calls", "tool tool"):
        for write in (lambda text: text + "  ", lambda text: " " + text.replace('": "', '":   "')):
            assert not any(walk(tokenizer, TALKS[name], style, write))


def test_a_turn_that_was_cut_gets_its_closing() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    bridge, messages = Bridge(tokenizer), [user("a"), turn("b and")]
    closed = bridge.after(messages, tokenizer.eos_token_id, [user("c")])
    cut = bridge.after(messages, tokenizer("d").input_ids[0], [user("c")])
    assert cut.token_ids == [tokenizer.eos_token_id, *closed.token_ids]
    assert bridge.after(messages, None, [user("c")]).token_ids == cut.token_ids
    assert bridge.text(closed.token_ids) == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_with_half_of_a_surrogate_pair_is_shown() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    found = Bridge(tokenizer).after([user("a"), turn("b")], tokenizer.eos_token_id, [user("\ud83d!")])
    assert tokenizer.decode(found.token_ids).startswith("\n<|im_start|>user\n\ufffd!")


def test_a_turn_behind_a_long_conversation_costs_as_much_as_behind_a_short_one() -> None:
    """What is rendered for it does not grow: counted in characters that are rendered, not in seconds."""
    tokenizer, rendered = byte_tokenizer(PLAIN), []
    usual = tokenizer.apply_chat_template

    def counting(messages: Any, **settings: Any) -> Any:
        text = usual(messages, **settings)
        rendered.append(len(text))
        return text

    bridge = Bridge(tokenizer, Style(tools=(CALCULATOR,)))
    tokenizer.apply_chat_template = counting  # type: ignore[method-assign]
    cycle = [turn("", "1+2"), answer("3")]
    costs = []
    for turns in (2, 3, 20):
        messages = [user("a"), *cycle * turns]
        bridge.after(messages[:-1], tokenizer.eos_token_id, messages[-1:])
        rendered.clear()
        bridge.after(messages[:-1], tokenizer.eos_token_id, messages[-1:])
        costs.append(sum(rendered))
    assert costs[0] == costs[1] == costs[2]


def test_append_never_forks() -> None:
    tokenizer = byte_tokenizer(TWO_ENDS)
    bridge = Bridge(tokenizer, history="append")
    for ended in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")):
        found = bridge.after([user("a"), turn("b")], ended, [user("c")])
        assert not found.fork
        assert bridge.text(found.token_ids) == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_shows_no_calls_is_refused() -> None:
    bridge = Bridge(byte_tokenizer(WITHOUT_TOOLS))
    with pytest.raises(UserError, match="shows neither the text nor the calls"):
        bridge.after([user("a"), turn("", "1+2")], None, [answer("3")])


# --- on tokenizers that people have: `make tokenizers` ---

REAL_TALKS = [
    *(("qwen3", name, True) for name in TALKS),
    *(("deepseek_v3", name, False) for name in ("plain", "tool", "two calls", "think user", "system")),
    *(("llama3_1", name, False) for name in ("plain", "think user", "system")),
    *(("gemma3", name, False) for name in ("plain", "think user", "system")),
    *(("smollm2", name, False) for name in ("plain", "think user", "system")),
]
FORKS = {
    ("qwen3", "think user"): ["thoughts dropped"],
    ("qwen3", "think tool user"): ["", "thoughts dropped"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name", "tools"), REAL_TALKS)
def test_contexts_of_real_templates_are_those_of_a_fresh_rendering(model: str, name: str, tools: bool) -> None:
    tokenizer = real_tokenizer(model)
    messages, texts = TALKS[name]
    if model == "deepseek_v3":
        texts = [deepseek("1+2") if text == hermes("1+2") else text for text in texts]
        texts = [deepseek("1+2", "4\u00e9") if text == hermes("1+2", "4\u00e9") else text for text in texts]
    closed = "<|tool_calls_end|>".replace("|", "\uff5c").replace("_", "\u2581")  # the template lacks it behind one call
    write = (lambda text: text + closed) if (model, name) == ("deepseek_v3", "tool") else str
    forks = walk(tokenizer, (messages, texts), Style(tools=(CALCULATOR,) if tools else ()), write)
    assert forks == FORKS.get((model, name), [""] * len(forks))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3"])
def test_any_conversation_on_real_templates_is_that_of_a_fresh_rendering(model: str) -> None:
    tokenizer, tools, forks = real_tokenizer(model), (CALCULATOR,) if model == "qwen3" else (), set()
    for seed in range(60):
        talk = random_talk(seed, hermes if model == "qwen3" else deepseek)
        forks.update(walk(tokenizer, talk, Style(tools=tools), str if model == "qwen3" else lambda text: text + " "))
    rewritten = {"thoughts dropped"} if model == "qwen3" else {"beginning rewritten", "opening rewritten"}
    assert forks == {"", *rewritten}
