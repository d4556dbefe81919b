"""Which tests run again with the oldest supported transformers, what each shows of it, and why the others need not.

`make test-oldest` runs what this prints. `tests/test_parts.py` holds that no test file of the rooms that meet
transformers is forgotten.
"""

from __future__ import annotations

AGAIN = {
    "tests/chat/test_bridge.py": "tools, and calls of tools, are rendered alike",
    "tests/chat/test_chat.py": "chat templates are rendered, and cut into turns, alike",
    "tests/chat/test_special.py": "tokenizers say their special tokens",
    "tests/chat/test_tools.py": "templates list tools, and show calls and results",
    "tests/data/test_messages.py": "templates are given messages with tools, and refuse what they refuse",
    "tests/data/test_row_forms.py": "rows of every form become the same tokens",
    "tests/engines/test_fsdp.py": "models of Hugging Face's are cut over processes by their layers",
    "tests/engines/test_reference.py": "adapters are switched off and on",
    "tests/models/test_checkpointing.py": "layers are computed again in the backward pass",
    "tests/models/test_families.py": "every family loads, scores, trains and is written as transformers does",
    "tests/models/test_files.py": "weights are assigned to a model by name",
    "tests/models/test_liger.py": "kernels take the place of modules",
    "tests/models/test_load_model.py": "models, tokenizers and adapters load from folders",
    "tests/models/test_merging.py": "merged adapters are read by transformers",
    "tests/models/test_outline.py": "models are made without memory",
    "tests/models/test_packed_forward.py": "packed attention takes the place of the model's own",
    "tests/models/test_ulysses.py": "attention is exchanged between processes",
    "tests/models/test_value.py": "value heads are read and written",
    "tests/rollout/test_conformance.py": "the inline engine keeps the protocol",
    "tests/rollout/test_families.py": "every family is generated from as it scores",
    "tests/weights/test_adapters.py": "adapters are added into weights",
    "tests/weights/test_stream.py": "tied weights have all their names",
}

FAMILIES = "arithmetic of ours; tests/models/test_families.py trains every family"
GENERATION = "ours above the model, which tests/rollout/test_families.py and test_conformance.py hold"
ROWS = "rows and their order; templates are of tests/chat"
BYTES = "tensors in transit; their names are of tests/weights/test_stream.py"
VLLM, SGLANG = (
    "runs in vLLM's environment, with its transformers",
    "runs in SGLang's environment, with its transformers",
)
ONCE = {
    "tests/data/test_prepare.py": ROWS,
    "tests/data/test_prompts_and_rows.py": ROWS,
    "tests/engines/test_critic.py": FAMILIES,
    "tests/engines/test_local.py": FAMILIES,
    "tests/engines/test_own_loss.py": FAMILIES,
    "tests/engines/test_sharded_files.py": "shards are ours; plain folders are of tests/models/test_families.py",
    "tests/models/test_log_probs.py": "arithmetic on hidden states; tests/models/test_packed_forward.py makes them",
    "tests/rollout/test_inline.py": GENERATION,
    "tests/rollout/test_hermes.py": VLLM,
    "tests/rollout/test_kept_turns.py": GENERATION,
    "tests/rollout/test_judge_on_vllm.py": VLLM,
    "tests/rollout/test_replica.py": GENERATION,
    "tests/rollout/test_sampling.py": GENERATION,
    "tests/rollout/test_sglang.py": SGLANG,
    "tests/rollout/test_stopping.py": GENERATION,
    "tests/rollout/test_verified_sync.py": VLLM,
    "tests/rollout/test_vllm.py": VLLM,
    "tests/rollout/test_vllm_adapters.py": VLLM,
    "tests/rollout/test_vllm_images.py": VLLM,
    "tests/weights/test_buckets.py": BYTES,
    "tests/weights/test_channel.py": BYTES,
    "tests/weights/test_delta.py": BYTES,
    "tests/weights/test_drill.py": BYTES,
    "tests/weights/test_gathered.py": BYTES,
    "tests/weights/test_transport.py": BYTES,
}

if __name__ == "__main__":
    print(*AGAIN)
