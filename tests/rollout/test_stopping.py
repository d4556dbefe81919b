"""Answers that end by their text: stops over several tokens, within characters, and by regular expressions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.stopping import StopText

PROMPT = (2, 22, 23, 17, 25, 34, 1, 3)


def utf8(token_ids: list[int]) -> str:
    """A byte-level tokenizer: a token is a byte; ids from 256 on are special and have no text."""
    return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def words(token_ids: list[int]) -> str:
    """A decoder in the manner of SentencePiece: the space before the first word is dropped."""
    return "".join([" the", " end", ".", " of", "\n"][i] for i in token_ids).removeprefix(" ")


def stops_at(text: str, *stop: str, regex: str | None = None) -> int | None:
    """After how many bytes the stop is seen."""
    reader = StopText(stop, regex, utf8)
    return next((n for n, byte in enumerate(text.encode(), 1) if reader.ends_with(byte)), None)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), 7),
        ("aaab", ("aab",), 4),
        ("x\n\ny", ("\n\n",), 3),
        ("abc", ("d", "c", "b"), 2),
        ("abc", ("d",), None),
        ("\u00e9t\u00e9!", ("\u00e9!",), 6),  # two bytes a character: the stop ends with the last byte
        ("10\u20ac", ("\u20ac",), 5),
        ("a\u20acb", ("b",), 5),
        ("a\U0001f600\U0001f601z", ("\U0001f601",), 9),
    ],
)
def test_a_stop_is_seen_with_the_token_that_completes_it(text: str, stop: tuple[str, ...], expected: int) -> None:
    assert stops_at(text, *stop) == expected


def test_regular_expressions_search_the_whole_answer() -> None:
    assert stops_at("first 12, then 345;", regex=r"\d{3}") == 18
    assert stops_at("<b>bold text</b>", regex=r"<b>.*</b>$") == 16
    assert stops_at("nothing", "zz", regex=r"\d") is None


def test_a_stop_in_one_token_among_many_words() -> None:
    reader = StopText(("end of",), None, words)
    assert [reader.ends_with(i) for i in (0, 1, 2, 0, 1, 3)] == [False] * 5 + [True]


def test_special_tokens_have_no_text_and_do_no_harm() -> None:
    reader = StopText(("ab",), None, utf8)
    assert [reader.ends_with(i) for i in (300, ord("a"), 301, 302, ord("b"))] == [False] * 4 + [True]


def test_a_continued_answer_knows_what_was_before() -> None:
    reader = StopText(("two",), None, utf8, list(b"one tw"))
    assert reader.ends_with(ord("o"))


def test_reading_takes_time_in_proportion_to_the_answer() -> None:
    """Old tokens are not decoded again with each new one."""
    decoded = 0

    def decode(token_ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return utf8(token_ids)

    reader = StopText(("never",), None, decode)
    for _ in range(2000):
        reader.ends_with(ord("x"))
    assert decoded < 5 * 2000


@pytest.mark.parametrize("quick", [True, False])
def test_answers_end_where_their_own_stop_is_complete(
    trained_model: PreTrainedModel, tiny_model: tuple[PreTrainedModel, PreTrainedTokenizerBase], quick: bool
) -> None:
    tokenizer = tiny_model[1]

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    base = Request(PROMPT, Sampling(30, stop_token_ids=(1,)), NoiseKey(0, "train"))
    asked = [replace(base, noise=NoiseKey(0, "train", i)) for i in range(12)]
    free = generate(InlineEngine(trained_model, quick=quick), asked)
    stopping = [replace(r, sampling=replace(r.sampling, stop=("#", ",", "=1"))) for r in asked[:6]]
    stopping += [replace(r, sampling=replace(r.sampling, stop_regex=r"=\d")) for r in asked[6:9]] + asked[9:]
    results = generate(InlineEngine(trained_model, quick=quick, decode=decode), stopping)
    shorter = 0
    for i, (result, whole) in enumerate(zip(results, free)):
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        text, before = decode(result.token_ids), decode(result.token_ids[:-1])
        ends = ("#", ",", "=1") if i < 6 else tuple(f"={n}" for n in range(10)) if i < 9 else ()
        assert not any(end in before for end in ends)
        if len(result.token_ids) < len(whole.token_ids):
            shorter += 1
            assert result.finish_reason == "stop" and any(text.endswith(end) for end in ends)
        else:
            assert result.finish_reason == whole.finish_reason
    assert shorter >= 6


def test_a_stop_over_the_edge_of_a_continued_request(trained_model: PreTrainedModel) -> None:
    greedy = Request(PROMPT, Sampling(12, 0.0), NoiseKey(0, "greedy"))
    [free] = generate(InlineEngine(trained_model), [greedy])
    ids = free.token_ids

    def decode(token_ids: list[int]) -> str:
        return "".join(chr(100 + i) for i in token_ids)

    stop = decode(ids[3:7])
    assert stop not in decode(ids[:6])
    engine = InlineEngine(trained_model, decode=decode)
    continued = replace(greedy, generated_ids=tuple(ids[:5]), sampling=Sampling(12, 0.0, stop=(stop,)))
    [result] = generate(engine, [continued])
    assert (result.token_ids, result.finish_reason) == (ids[5:7], "stop")
