"""Images in prompts for vLLM, held against a Hugging Face forward pass over the same pixels."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, generate
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.engine import VllmEngine
from hybridflow.rollout.vllm.images import image_prompt
from hybridflow.weights.stream import stream_of, verify

VOCAB, CONTEXT = 104, 512
START, END, IMAGE, VIDEO = 100, 101, 102, 103
TOLERANCE, FAR = 1e-4, 0.05


def picture(seed: int, size: tuple[int, int] = (56, 84)) -> Any:
    from PIL import Image

    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write(folder: Path) -> tuple[Any, Any]:
    """A Qwen2.5-VL of 2 layers and its processor, in a folder."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    text = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14, "spatial_merge_size": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            model.get_output_embeddings().weight *= 4
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(START)} | {s: START + i for i, s in enumerate(special)}))
    words.add_special_tokens([AddedToken(s, special=True) for s in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16), tokenizer, Qwen2VLVideoProcessor()
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Iterator[tuple[VllmEngine, Any, Any]]:
    model, processor = write(folder)
    engine = VllmEngine(EngineModel(folder, CONTEXT))
    yield engine, model, processor
    engine.close()


# Image tokens are never drawn: a forward pass would look for their images.
SAMPLING = Sampling(12, logit_bias=tuple((token, -100.0) for token in range(START, VOCAB)))


def seeing(processor: Any, images: list[Any], draw: int = 0) -> Request:
    """A question with these images in it."""
    ids: list[int] = [5, 6]
    for image in images:
        grid = processor.image_processor([image], return_tensors="pt")["image_grid_thw"]
        ids += [START, *[IMAGE] * (int(grid.prod()) // 4), END, 7]
    return Request((*ids, 8, 9), SAMPLING, NoiseKey(0, "train", draw), images=tuple(images))


@torch.no_grad()
def gap(model: Any, processor: Any, asked: list[Request], results: list[Result]) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    gaps = []
    for request, result in zip(asked, results, strict=True):
        logps = torch.tensor(result.logps)
        gaps.append((logps - expected(model, processor, request, result)).abs().max().item())
    return max(gaps)


@torch.no_grad()
def expected(model: Any, processor: Any, request: Request, result: Result) -> torch.Tensor:
    ids = torch.tensor([*request.prompt_ids, *result.token_ids])[None]
    seen = processor.image_processor(list(request.images), return_tensors="pt") if request.images else {}
    scores = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), use_cache=False, **seen).logits[0]
    scores[:, START:] -= 100
    first = len(request.prompt_ids)
    return scores.log_softmax(-1)[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]


def change(model: Any, seed: int) -> Any:
    """Other weights, of the part that sees too; returns a copy of what it was."""
    before, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return before


@pytest.mark.vllm
def test_answers_about_images_have_the_log_probs_of_a_forward_pass_over_them(setup: tuple[VllmEngine, Any, Any]):
    engine, model, processor = setup
    asked = [seeing(processor, [picture(0)], draw) for draw in range(3)]  # answers to one prompt share its image
    asked.append(seeing(processor, [picture(1, (84, 56)), picture(2)]))
    asked.append(seeing(processor, []))
    results = generate(engine, asked)
    assert gap(model, processor, asked, results) < TOLERANCE
    others = [replace(r, images=tuple(picture(9, i.size[::-1]) for i in r.images)) for r in asked[:4]]
    assert gap(model, processor, others, results[:4]) > FAR, "the comparison would not notice other images"

    before = change(model, seed=1)
    stream = stream_of(model)
    verify(stream, engine.update_weights(stream, 1), 1)
    results = generate(engine, asked)  # the same images, which the old weights had encoded
    assert gap(model, processor, asked, results) < TOLERANCE
    assert gap(before, processor, asked, results) > FAR


@pytest.mark.vllm
def test_images_are_seen_with_new_weights_by_answers_in_flight(setup: tuple[VllmEngine, Any, Any]):
    engine, model, processor = setup
    stream = stream_of(model)
    engine.update_weights(stream, 2)
    long = replace(seeing(processor, [picture(3)]), sampling=replace(SAMPLING, max_tokens=60))
    engine.submit(long)
    engine.submit(seeing(processor, []))
    engine.wait()
    before = change(model, seed=2)
    engine.update_weights(stream_of(model), 3)
    (result,) = engine.wait()
    at, logps = result.spans[0].end, torch.tensor(result.logps)
    assert [s.version for s in result.spans] == [2, 3] and 0 < at < 60
    assert (logps - expected(before, processor, long, result))[:at].abs().max() < TOLERANCE
    assert (logps - expected(model, processor, long, result))[at:].abs().max() < TOLERANCE


@pytest.mark.vllm
def test_images_that_do_not_fit_their_prompt_are_refused(setup: tuple[VllmEngine, Any, Any]):
    engine, _, processor = setup
    request = seeing(processor, [picture(0)])
    with pytest.raises(UserError, match="has 2 images, and its prompt places for 1"):
        engine.submit(replace(request, images=(picture(0), picture(1))))
    with pytest.raises(UserError, match="make 16 tokens in vLLM, and 6 in its prompt"):
        engine.submit(replace(request, images=(picture(0, (112, 112)),)))
    assert engine.wait() == []


def test_a_model_of_text_is_shown_no_images():
    with pytest.raises(UserError, match="has 1 images, and the model sees none"):
        image_prompt(None, [1, 2, 3], ["an image"], None)
