"""Loading models: what is covered loads, what is not is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hybridflow.config.locate import load_function
from hybridflow.config.sections import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.forward import score_tokens
from hybridflow.models.load import load_model, load_tokenizer, stop_ids
from hybridflow.models.lora import add_lora, load_adapters, merged, save_adapters

from tiny import CARRY, KINDS, SIZES, plain_model, ragged_batch


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    load_function(f"{CARRY}:make_tokenizer")().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_as_it_was(kind: str, tmp_path: Path) -> None:
    plain = plain_model(kind)
    model, tokenizer = load_model(save(plain, tmp_path))
    assert tokenizer.decode(tokenizer("3+4=").input_ids) == "3+4="
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(a, b), name
    scores = score_tokens(model, ragged_batch(), temperature=1.0, entropy="no")
    assert torch.isfinite(scores.logp_M).all()


def test_bfloat16_weights_become_float32_masters(tmp_path: Path) -> None:
    model, _ = load_model(save(plain_model().bfloat16(), tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_function_is_called_with_the_seed() -> None:
    a, b, c = (load_model(f"{CARRY}:tiny_qwen3", seed=s)[0].model.embed_tokens.weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding_attention"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=8)), "soft-capping"),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 2)),
            "soft-capping",
        ),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
            ),
            "sliding_attention",
        ),
    ],
)
def test_attention_that_packing_does_not_cover_is_refused(make: object, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"packed sequences do not cover.*{word}") as caught:
        load_model(save(make(), tmp_path))  # type: ignore[operator]
    assert "across sequences" in caught.value.why and "Qwen3" in caught.value.fix


def test_mistral_without_a_window_is_covered(tmp_path: Path) -> None:
    model, _ = load_model(save(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), tmp_path))
    score_tokens(model, ragged_batch(), temperature=1.0, entropy="no")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_model(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))
    function = tmp_path / "mine.py"
    function.write_text("def model():\n    return 3\n")
    with pytest.raises(UserError, match=r"must return \(model, tokenizer\)") as caught:
        load_model(f"{function}:model")
    assert "int" in caught.value.why
    with pytest.raises(UserError, match="no function 'modle'") as caught:
        load_model(f"{function}:modle")
    assert "did you mean 'model'?" in caught.value.fix


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    tokenizer = load_function(f"{CARRY}:make_tokenizer")()
    tokenizer.eos_token = None
    plain_model().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_stop_ids_join_tokenizer_and_generation_config(
    tiny_model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = tiny_model
    assert stop_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    model.generation_config = GenerationConfig(eos_token_id=[7, 5])
    assert stop_ids(model, tokenizer) == tuple(sorted({tokenizer.eos_token_id, 5, 7}))


def test_adapters_start_as_nothing_and_come_back_from_disk(
    tiny_model: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, batch = tiny_model[0], ragged_batch()
    with torch.no_grad():
        before = score_tokens(model, batch, temperature=1.0, entropy="no").logp_M
        wrapped = add_lora(model, LoraSection(rank=2), seed=0)
        assert torch.equal(score_tokens(wrapped, batch, temperature=1.0, entropy="no").logp_M, before)
        trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in n for n in trained)
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 10)
        after = score_tokens(wrapped, batch, temperature=1.0, entropy="no").logp_M
        assert (after - before).abs().max() > 0.1
        plain = merged(wrapped)
        torch.testing.assert_close(
            score_tokens(plain, batch, temperature=1.0, entropy="no").logp_M, after, atol=1e-4, rtol=0
        )
        save_adapters(wrapped, tmp_path)
        fresh = add_lora(load_model(f"{CARRY}:tiny_qwen3", seed=0)[0], LoraSection(rank=2), seed=5)
        load_adapters(fresh, tmp_path)
        assert torch.equal(score_tokens(fresh, batch, temperature=1.0, entropy="no").logp_M, after)
    other = add_lora(load_model(f"{CARRY}:tiny_qwen3", seed=0)[0], LoraSection(rank=3), seed=5)
    with pytest.raises(UserError, match="another shape"):
        load_adapters(other, tmp_path)


MODEL_WITH_DROPOUT = f"""
import torch
from hybridflow.config.locate import load_function

def build():
    model, tokenizer = load_function({str(CARRY)!r} + ":tiny_qwen3")()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj, torch.nn.Dropout(0.5))
    return model, tokenizer
"""


def test_dropout_is_off_so_that_the_trainer_scores_what_was_sampled(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(MODEL_WITH_DROPOUT)
    model, _ = load_model(f"{tmp_path}/source.py:build")
    model.train()
    first, second = (score_tokens(model, ragged_batch(), temperature=1.0, entropy="no").logp_M for _ in range(2))
    assert torch.equal(first, second)


def test_a_cut_weight_file_is_told_in_words(tmp_path: Path) -> None:
    path = save(plain_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(path)
