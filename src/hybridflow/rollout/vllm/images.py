"""Images in prompts for vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridflow.errors import UserError


def image_token(config: Mapping[str, Any]) -> int | None:
    """Returns the token that stands for a part of an image, from a model's configuration; None for models that take no
    images.
    """
    if "vision_config" not in config:
        return None
    token: int | None = config.get("image_token_id", config.get("image_token_index"))
    return token


def image_prompt(renderer: Any, token_ids: Sequence[int], images: Sequence[Any], token: int | None) -> Any:
    """Returns what vLLM's engine takes for a prompt with images: the model's own processor cuts them into patches.

    Args:
        renderer: vLLM's.
        token_ids: the prompt, in which every image is a run of image tokens, as many as training sees.
        images: PIL images, one for each run.
        token: the image token.

    Raises:
        UserError: the model sees no images, there are more or fewer than runs, or an image makes another number of
            tokens than its run has.
    """
    if token is None:
        raise UserError(
            f"a request has {len(images)} images, and the model sees none",
            fix="ask a vision-language model, or leave images out of the data",
        )
    # One token for each image: vLLM expands it again.
    short = [t for i, t in enumerate(token_ids) if t != token or i == 0 or token_ids[i - 1] != token]
    if short.count(token) != len(images):
        raise UserError(
            f"a request has {len(images)} images, and its prompt places for {short.count(token)}",
            fix=f"write every image as one run of the image token {token}, with other tokens between",
        )
    (prompt,) = renderer.render_cmpl([{"prompt_token_ids": short, "multi_modal_data": {"image": list(images)}}])
    if list(prompt["prompt_token_ids"]) != list(token_ids):
        raise UserError(
            f"the images of a request make {prompt['prompt_token_ids'].count(token)} tokens in vLLM, and "
            f"{list(token_ids).count(token)} in its prompt",
            why="the prompt was written with another image processor than the one in the model's folder",
            fix="write prompts with the processor that is saved beside the model",
        )
    return prompt
