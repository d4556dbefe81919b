"""A model whose adapters are merged is the trained one, or nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.files import export_model
from hybridflow.models.lora import add_lora
from hybridflow.models.probe import probe_scores, require_same

from tiny import packed_model, plain_model


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose trained parameters have moved."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        *((kind, "all-linear") for kind in ("qwen3", "qwen3_moe", "deepseek_v3")),
        *((kind, ["q_proj", "lm_head"]) for kind in ("qwen3", "gemma2", "llama")),
        *((kind, ["embed_tokens", "o_proj"]) for kind in ("qwen3", "gemma2", "qwen2")),
    ],
    ids=str,
)
def test_what_is_exported_is_what_was_trained(kind: str, modules: Any, tmp_path: Path) -> None:
    """Or it is refused before anything is trained: where an adapted weight is another module's too."""
    section = LoraSection(rank=2, target_modules=modules)
    tied = packed_model(kind).config.tie_word_embeddings
    if tied and modules != "all-linear":
        with pytest.raises(UserError) as caught:
            add_lora(packed_model(kind), section, seed=0)
        assert "lm_head.weight" in caught.value.what and "embed_tokens.weight" in caught.value.what
        assert "leave " in caught.value.fix
        return
    model = moved(add_lora(packed_model(kind), section, seed=0))
    trained = probe_scores(model)
    export_model(model, tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(probe_scores(written), trained, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (probe_scores(model) - trained).abs().max() > 1e-2
    assert torch.equal(probe_scores(model), trained)  # it was left as it is


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),  # peft unties it
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "use_dora": True}, True),
        ({"target_modules": ["q_proj"], "use_rslora": True, "bias": "lora_only"}, True),
    ],
    ids=["lm_head", "embed_tokens", "saved lm_head", "saved embed_tokens", "dora", "rslora"],
)
def test_what_is_written_is_looked_at_whoever_made_the_adapters(
    options: dict[str, Any], right: bool, tmp_path: Path
) -> None:
    """Adapters on a tied model that `add_lora` would not make."""
    model = moved(peft.get_peft_model(packed_model("qwen3"), peft.LoraConfig(r=2, **options)))
    if not right:
        with pytest.raises(UserError, match="is not the trained one: log-probabilities differ by"):
            export_model(model, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    trained = probe_scores(model)
    export_model(model, tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(probe_scores(written), trained, atol=1e-5, rtol=1e-5)


def test_rounding_to_fewer_bits_is_no_fault(tmp_path: Path) -> None:
    model = moved(add_lora(packed_model("qwen2"), LoraSection(rank=2), seed=0))
    export_model(model, tmp_path, torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    apart = (probe_scores(written) - probe_scores(model)).abs().max()
    assert 1e-4 < apart < 0.3


def test_a_small_step_of_training_must_not_drown_in_a_tolerance() -> None:
    """The difference that was found once: 2.7e-3 where training had moved the model by 2.0e-3."""
    trained = probe_scores(plain_model())
    with pytest.raises(UserError, match=r"differ by 0\.0027 on a probe, training moved them by 0\.002"):
        require_same("it", trained + 2.7e-3, trained, trained + 2.0e-3)
    require_same("it", trained + 5e-5, trained, trained)
    with pytest.raises(UserError, match="differ by inf"):
        require_same("it", trained * torch.nan, trained, trained)
