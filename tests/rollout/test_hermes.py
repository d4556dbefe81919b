"""Calls are read from text as vLLM's parser of the same name reads them."""

from __future__ import annotations

import json

import pytest

from hybridflow.chat.tool_calls import Hermes
from talks import CALCULATOR, PLAIN, byte_tokenizer, hermes

pytestmark = pytest.mark.vllm


def test_calls_are_read_as_vllm_reads_them() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    parser = ToolParserManager.get_tool_parser("hermes")(tokenizer, [])
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "a"}], model="m", tools=[CALCULATOR], tool_choice="auto"
    )
    for text in (
        "no call",
        hermes("1+2"),
        "so\n" + hermes("1+2", "\u00e9{}"),
        '<tool_call>{"name": "f", "arguments": {"a": {"b": [1, {}], "c": "}}"}}}',
        '<tool_call>\n  {"name":"f","arguments":{}}\n\n</tool_call>\n and on',
    ):
        theirs = parser.extract_tool_calls(text, request)
        content, ours = Hermes().parse(text)
        found = [(call.function.name, json.loads(call.function.arguments)) for call in theirs.tool_calls]
        assert [(call.name, call.arguments) for call in ours] == found and not any(call.error for call in ours)
        assert (theirs.content or "").strip() == content.strip()
