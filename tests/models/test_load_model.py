"""Loading models: what is covered loads, what is not is refused in words."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
)

from hybridflow.config.locate import load_function, locate
from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.forward import score_tokens
from hybridflow.models.load import load_model, load_tokenizer, stop_ids
from hybridflow.models.lora import add_lora, load_adapters, merged
from hybridflow.models.source import model_folder

from tiny import CARRY, KINDS, SIZES, VOCAB, plain_model, ragged_batch


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
    model.generation_config = GenerationConfig(eos_token_id="<|end|>")
    with pytest.raises(UserError, match=r"eos_token_id .* has '<\|end\|>', which is no token id"):
        stop_ids(model, tokenizer)


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
        wrapped.save_pretrained(tmp_path)
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


# --- folders of another kind ---

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
HEADLESS = {
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(vocab_size=VOCAB, **TINY)),
    "T5EncoderModel": lambda: T5EncoderModel(T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
    "Qwen2ForSequenceClassification": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SIZES, pad_token_id=0)),
    "Qwen2Model": lambda: Qwen2Model(Qwen2Config(**SIZES)),
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_a_causal_head_is_refused_by_name(name: str, packing: bool, tmp_path: Path) -> None:
    path = save(HEADLESS[name](), tmp_path)
    with pytest.raises(UserError, match=f"is a {name}: it has no head that predicts the next token") as caught:
        load_model(path, packing=packing)
    assert "ForCausalLM" in caught.value.fix


def test_an_encoder_saved_with_a_causal_head_is_refused(tmp_path: Path) -> None:
    path = save(BertLMHeadModel(BertConfig(vocab_size=VOCAB, **TINY)), tmp_path)
    for packing in (True, False):
        with pytest.raises(UserError, match="attends in both directions"):
            load_model(path, packing=packing)


def test_weights_without_their_head_are_refused(tmp_path: Path) -> None:
    """Loading would make the missing tensors of random numbers."""
    path = save(plain_model("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack tensors of a LlamaForCausalLM \(1\): lm_head.weight"):
        load_model(path)


# --- code of the folder's own ---

OWN_MODEL = """
import pathlib
from transformers import Qwen2Config, Qwen2ForCausalLM

pathlib.Path({mark!r}).write_text("run")

class MineConfig(Qwen2Config):
    model_type = "mine"

class MineForCausalLM(Qwen2ForCausalLM):
    config_class = MineConfig
"""


def test_code_of_the_folder_is_run_only_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "own", tmp_path / "mark"
    path = save(plain_model("qwen2"), folder)
    (folder / "modeling_mine.py").write_text(OWN_MODEL.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    built_in = {**config, "auto_map": names}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"would run code of its own: modeling_mine.py") as caught:
        load_model(path)
    assert "model.trust_remote_code=true" in caught.value.fix and not mark.exists()
    model, _ = load_model(path, trust_remote_code=True)
    assert mark.exists() and type(model).__name__ == "MineForCausalLM"
    mark.unlink()
    (folder / "config.json").write_text(
        json.dumps(built_in)
    )  # a family that transformers has itself: its code is taken
    assert type(load_model(path)[0]) is Qwen2ForCausalLM and not mark.exists()


def test_a_tokenizer_of_the_folders_own_code_is_refused(tmp_path: Path) -> None:
    path = save(plain_model("qwen2"), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_mine.py").write_text("raise AssertionError('this is not to be run')")
    with pytest.raises(UserError, match=r"would run code of its own: tokenization_mine.py"):
        load_tokenizer(path)


# --- names on a hub ---


def test_a_name_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache of the hub's library, which is where a fetched model lies."""
    name = "somebody/tiny-qwen3"
    snapshot = tmp_path / "models--somebody--tiny-qwen3/snapshots/abc"
    save(plain_model(), snapshot)
    refs = tmp_path / "models--somebody--tiny-qwen3/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, tokenizer = load_model(name)
    assert tokenizer.decode(tokenizer("3+4=").input_ids) == "3+4="
    assert torch.equal(model.model.embed_tokens.weight, plain_model().model.embed_tokens.weight)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_name_that_cannot_be_fetched_is_told(
    load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/gone cannot be fetched from the Hugging Face hub") as caught:
        load("nobody/gone")
    assert "no folder of this name" in caught.value.why and "HF_HUB_OFFLINE" in caught.value.fix
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/carry-sft").mkdir(parents=True)
    with pytest.raises(UserError, match="the nearest is runs/carry-sft"):
        load("runs/cary-sft")


def test_modelscope_needs_its_library_and_fetches_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match=r"modelscope://Qwen/Qwen3 needs the modelscope library") as caught:
        load_model("modelscope://Qwen/Qwen3")
    assert "hybridflow[modelscope]" in caught.value.fix
    asked: list[str] = []
    save(plain_model(), tmp_path)
    library = types.ModuleType("modelscope")
    library.snapshot_download = lambda name, **_: asked.append(name) or str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", library)
    load_model("modelscope://Qwen/Qwen3")
    assert set(asked) == {"Qwen/Qwen3"}
    with pytest.raises(UserError, match="no model at s3://bucket/model"):
        load_model("s3://bucket/model")


def test_names_on_a_hub_are_left_as_they_are_by_the_configuration(tmp_path: Path) -> None:
    for name in ("Qwen/Qwen3-0.6B", "modelscope://Qwen/Qwen3-0.6B"):
        assert locate(name, tmp_path) == name


def test_a_runs_folder_is_the_model_that_it_left(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    (run / "checkpoints/step-000012").mkdir(parents=True)
    with pytest.raises(UserError, match="has no model yet") as caught:
        model_folder(str(run))
    assert f"hybridflow export '{run}' '{run}-step-12'" in caught.value.fix
    (run / "model").mkdir()
    (run / "model/config.json").write_text("{}")
    assert model_folder(str(run)) == run / "model"
