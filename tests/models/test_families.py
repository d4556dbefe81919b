"""Every known family walks the whole way: load, score, train, generate, adapt, export; against plain Hugging Face."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.locate import load_function
from hybridflow.config.sections.model import LoraSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.models import families
from hybridflow.models.attention import ATTENTION
from hybridflow.models.families import KNOWN, use_packing
from hybridflow.models.files import export_model, read_weights, write_weights
from hybridflow.models.forward import packs, score_tokens
from hybridflow.models.load import load_model, require_context
from hybridflow.models.lora import add_lora, merged
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.protocols.training import Loss
from hybridflow.rollout.inline.engine import InlineEngine

from tiny import CARRY, KINDS, SIZES, plain_model, ragged_batch

LENGTHS = (7, 3, 60, 1, 12, 33, 2)  # windows are 8 tokens


def tokenizer() -> object:
    return load_function(f"{CARRY}:make_tokenizer")()


def folder_of(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return str(folder)


def own_scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities by the model's own eager forward of each sequence alone."""
    model.set_attn_implementation("eager")
    found = []
    for ids, mask in zip(batch.rows("input_ids_T"), batch.rows("loss_mask_T")):
        logp_LV = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        place = mask.nonzero()[:, 0]
        found.append(logp_LV[place - 1, ids[place]])
    return torch.cat(found)


def train_batch() -> Batch:
    batch = ragged_batch(LENGTHS)
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_from_folder_to_export(kind: str, tmp_path: Path) -> None:
    plain, batch = plain_model(kind), train_batch()
    model, _ = load_model(folder_of(plain, tmp_path / "start"))
    assert model.config.model_type in KNOWN and packs(model)

    expected_M = own_scores(plain, batch)
    found = score_tokens(model, batch, temperature=1.0, entropy="no")
    torch.testing.assert_close(found.logp_M, expected_M, atol=1e-5, rtol=0)

    weight_M = batch["policy_weight_T"][found.index_M]
    (-expected_M * weight_M).sum().backward()
    engine = LocalEngine(model, OptimSection(lr=1e-2, clip_grad_norm=1e9), total_steps=8, tokens_per_microbatch=64)
    first = engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"]
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=0, msg=name)
    for _ in range(4):
        last = engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"]
    assert last < first - 0.1

    export_model(model, tmp_path / "end")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    with torch.no_grad():
        scores = score_tokens(model, batch, temperature=1.0, entropy="no")
        torch.testing.assert_close(own_scores(exported, batch), scores.logp_M, atol=1e-5, rtol=0)
        write_weights(model, tmp_path / "checkpoint", model.state_dict())
        fresh, _ = load_model(str(tmp_path / "start"))
        read_weights(fresh, tmp_path / "checkpoint")
        for (name, p), q in zip(model.state_dict().items(), fresh.state_dict().values()):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_with_adapters(kind: str, tmp_path: Path) -> None:
    plain, batch = plain_model(kind), train_batch()
    path = folder_of(plain, tmp_path / "start")
    model = add_lora(load_model(path)[0], LoraSection(rank=4), seed=0)
    with torch.no_grad():
        before_M = own_scores(plain, batch)
    engine = LocalEngine(model, OptimSection(lr=1e-2), total_steps=8, tokens_per_microbatch=64)
    losses = [engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.02
    with torch.no_grad():
        adapted_M = score_tokens(model, batch, temperature=1.0, entropy="no").logp_M
        assert (adapted_M - before_M).abs().max() > 0.01
        with model.disable_adapter():
            off_M = score_tokens(model, batch, temperature=1.0, entropy="no").logp_M
        torch.testing.assert_close(off_M, before_M, atol=1e-5, rtol=0)
        together_M = score_tokens(merged(model), batch, temperature=1.0, entropy="no").logp_M
        torch.testing.assert_close(together_M, adapted_M, atol=1e-5, rtol=0)
        export_model(model, tmp_path / "end")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
        torch.testing.assert_close(own_scores(exported, batch), adapted_M, atol=1e-5, rtol=0)
        write_weights(model, tmp_path / "checkpoint", model.state_dict())
        fresh = add_lora(load_model(path)[0], LoraSection(rank=4), seed=1)
        read_weights(fresh, tmp_path / "checkpoint")
        resumed_M = score_tokens(fresh, batch, temperature=1.0, entropy="no").logp_M
        assert torch.equal(resumed_M, adapted_M)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_generates_what_it_is_trained_on(kind: str, tmp_path: Path) -> None:
    """Past the window: greedy answers are those of transformers' own generation, and log-probs are the trainer's."""
    plain = plain_model(kind)
    plain.set_attn_implementation("eager")
    model, _ = load_model(folder_of(plain, tmp_path))
    prompts = [(5, 9, 11), tuple(range(4, 24)), (7,)]
    requests = [
        Request(prompt, Sampling(max_tokens=14, temperature=temperature), NoiseKey(0, "train", draw, 0))
        for temperature in (0.0, 0.8)
        for draw, prompt in enumerate(prompts)
    ]
    results = generate(InlineEngine(model), requests)
    for prompt, result in zip(prompts, results):
        ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        expected = plain.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None)
        assert result.token_ids == expected[0, len(prompt) :].tolist()
    for request, result in zip(requests[3:], results[3:]):
        ids_T = torch.tensor([*request.prompt_ids, *result.token_ids])
        mask_T = torch.arange(len(ids_T)) >= len(request.prompt_ids)
        batch = Batch.from_rows({"input_ids_T": [ids_T], "loss_mask_T": [mask_T]})
        with torch.no_grad():
            scores = score_tokens(model, batch, temperature=0.8, entropy="no")
        torch.testing.assert_close(torch.tensor(result.logps), scores.logp_M, atol=1e-5, rtol=0)


# --- families that are not known ---


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.Generator().manual_seed(i)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


PROVE_THEMSELVES = {
    "phi3, a window": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, sliding_window=20, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "cohere, logits scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite, logits divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "gpt2, positions embedded": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ),
}


@pytest.mark.parametrize("name", PROVE_THEMSELVES)
def test_an_unknown_family_proves_itself_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    plain, batch = randomized(PROVE_THEMSELVES[name]()), ragged_batch(LENGTHS)
    assert plain.config.model_type not in KNOWN
    model, _ = load_model(folder_of(plain, tmp_path))
    assert packs(model)
    with torch.no_grad():
        scores = score_tokens(model, batch, temperature=1.0, entropy="no")
        torch.testing.assert_close(scores.logp_M, own_scores(plain, batch), atol=1e-5, rtol=0)
    assert getattr(model.config, "sliding_window", None) == getattr(plain.config, "sliding_window", None)


REFUSED = {
    "attention sinks": (
        lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, sliding_window=8)),
        "s_aux",
    ),
    "chunked attention": (lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES, head_dim=8)), "chunked_attention"),
    "linear biases": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=37, hidden_size=32, n_layer=2, n_head=4)),
        "an attention of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_packing_does_not_compute_is_refused(name: str) -> None:
    make, word = REFUSED[name]
    with pytest.raises(UserError, match=word) as caught:
        use_packing(make())
    assert "model.packing=false" in caught.value.fix and "another model" in caught.value.why


def test_a_family_whose_packed_scores_differ_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that mixes neighbouring tokens outside of its attention, as some convolutions do."""

    class Shifted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden + hidden.roll(1, dims=1) * (torch.arange(hidden.shape[1]) > 0)[None, :, None])

    model = plain_model("qwen2")
    monkeypatch.setattr(families, "KNOWN", ())
    use_packing(copy.deepcopy(model))  # as it is, it passes
    model.model.layers[0].mlp = Shifted(model.model.layers[0].mlp)
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM \(qwen2\) cannot run on packed.*differ from its own by"):
        use_packing(model)


def test_a_window_that_is_not_heeded_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=100, max_window_layers=1)
    model = randomized(Qwen2ForCausalLM(config))
    monkeypatch.setattr(families, "KNOWN", ())
    use_packing(copy.deepcopy(model))
    attend = families.score_tokens
    monkeypatch.setattr(families, "score_tokens", lambda m, *a, **k: attend(without_windows(m), *a, **k))
    with pytest.raises(UserError, match="differ from its own"):
        use_packing(model)


def without_windows(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


# --- without packing ---


@pytest.mark.parametrize("name", ["bloom", "qwen3", "gpt2"])
def test_without_packing_the_scores_and_gradients_are_the_models_own(name: str, tmp_path: Path) -> None:
    make = {
        "bloom": REFUSED["linear biases"][0],
        "qwen3": lambda: plain_model("qwen3"),
        "gpt2": PROVE_THEMSELVES["gpt2, positions embedded"],
    }[name]
    plain, batch = randomized(make()), train_batch()
    model, _ = load_model(folder_of(plain, tmp_path), packing=False)
    assert model.config._attn_implementation != ATTENTION and not packs(model)
    expected_M = own_scores(plain, batch)
    found = score_tokens(model, batch, temperature=1.0, entropy="no")
    torch.testing.assert_close(found.logp_M, expected_M, atol=1e-5, rtol=0)
    (-expected_M * batch["policy_weight_T"][found.index_M]).sum().backward()
    engine = LocalEngine(model, OptimSection(clip_grad_norm=1e9), total_steps=8, tokens_per_microbatch=64)
    engine.update(batch, Loss("cross_entropy"))
    for (label, p), q in zip(plain.named_parameters(), model.parameters()):
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=0, msg=label)


def test_a_model_that_does_not_pack_generates_what_transformers_does(tmp_path: Path) -> None:
    plain = randomized(REFUSED["linear biases"][0]())
    model, _ = load_model(folder_of(plain, tmp_path), packing=False)
    prompts = [(5, 9, 11), tuple(range(4, 24)), (7,)]
    sampling = Sampling(max_tokens=9, temperature=0.0)
    requests = [Request(prompt, sampling, NoiseKey(0, "train", draw, 0)) for draw, prompt in enumerate(prompts)]
    for prompt, result in zip(prompts, generate(InlineEngine(model), requests)):
        ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        expected = plain.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert result.token_ids == expected[0, len(prompt) :].tolist()


# --- what is random or changes with the batch ---


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_scores_in_training_are_those_of_evaluation_whatever_dropout_is_configured(
    name: str, packing: bool, tmp_path: Path
) -> None:
    """Attention dropout is a number in the configuration and in modules, not a Dropout module."""
    if name == "qwen2":
        model = randomized(Qwen2ForCausalLM(Qwen2Config(**SIZES, attention_dropout=0.5)))
    else:
        rates = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
        model = randomized(GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, **rates)))
    loaded, _ = load_model(folder_of(model, tmp_path), packing=packing)
    batch = ragged_batch(LENGTHS)
    with torch.no_grad():
        evaluated_M = score_tokens(loaded.eval(), batch, temperature=1.0, entropy="no").logp_M
        trained_M = score_tokens(loaded.train(), batch, temperature=1.0, entropy="no").logp_M
    assert torch.equal(trained_M, evaluated_M)


def test_a_rotary_embedding_that_changes_with_the_longest_sequence_is_kept_short() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=rope))
    require_context(model, 64)
    with pytest.raises(UserError, match="longer than 64"):
        require_context(model, 65)
    require_context(plain_model("llama3"), 128)  # other scalings do not change with the batch
