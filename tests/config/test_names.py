"""What users of other programs call things, and what a file configures, by what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import read_values, validate
from hybridflow.config.methods import unknown_name
from hybridflow.config.names import _NAMES, meaning
from hybridflow.config.pages.explain import explain, explanation_lines, kind_of
from hybridflow.config.pieces.presets import METHODS, PRESETS
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.errors import UserError

from tiny import CARRY

KEYS = {key.name for kind in KINDS.values() for key in keys_of(kind.config)}
RL: dict[str, dict[str, Any]] = {
    "run": {"folder": "x"},
    "model": {"path": "m"},
    "data": {"train": "t"},
    "reward": {"function": "gsm8k"},
    "train": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
}


def test_every_name_of_the_table_is_a_key_of_ours_or_says_why_there_is_none() -> None:
    assert len(_NAMES) >= 200
    for name in _NAMES:
        found = meaning(name)
        assert found is not None and (found.keys or found.hint), name
        assert set(found.keys) <= KEYS, name
        assert name not in KEYS or "." not in name, f"{name} is a key of ours"
        assert found.line().strip("; ") == found.line()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "optim.lr"),
        ("train.learning_rate", "optim.lr"),
        ("num_generations", "train.samples_per_prompt"),
        ("rollout.n", "train.samples_per_prompt"),
        ("actor_rollout_ref.rollout.n", "train.samples_per_prompt"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "train.sequences_per_update"),
        ("actor_rollout_ref.actor.optim.lr", "optim.lr"),
        ("actor_rollout_ref.rollout.name", "rollout.engine"),
        ("actor_rollout_ref.rollout.val_kwargs.n", "eval.samples_per_prompt"),
        ("actor_rollout_ref.actor.kl_loss_type", "algorithm.kl_loss_estimator"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload", "engine.offload"),
        ("critic.optim.learning_rate", "optim.lr"),
        ("critic.lr", "critic.optim.lr"),
        ("use_vllm", "rollout.engine"),
        ("algorithm.adv_estimator", "algorithm.preset"),
        ("trainer.total_epochs", "train.epochs"),
        ("trainer.project_name", "track.project"),
        ("trainer.n_gpus_per_node", "placement.pools"),
        ("data.train_files", "data.train"),
        ("data.max_response_length", "rollout.max_response_tokens"),
        ("algorithm.kl_ctrl.kl_coef", "algorithm.kl_reward_coef"),
        ("beta", "algorithm.kl_loss_coef"),
        ("max_completion_length", "rollout.max_response_tokens"),
        ("per_device_train_batch_size", "train.sequences_per_update"),
        ("gradient_accumulation_steps", "train.sequences_per_update"),
        ("num_train_epochs", "train.epochs"),
        ("optim.temperature", "rollout.temperature"),
        ("--num-generations", "train.samples_per_prompt"),
        ("reward_model.enable", "reward.model"),
        ("trainer.unheard_of", "train"),
    ],
)
def test_a_name_of_another_program_is_told_what_it_is_here(name: str, key: str) -> None:
    found = meaning(name)
    assert found is not None and key in found.keys
    values = {k: dict(v) for k, v in RL.items()}
    inner: dict[str, Any] = values
    *parents, last = name.lstrip("-").replace("-", "_").split(".")
    for part in parents:
        inner = inner.setdefault(part, {})
    inner[last] = 1
    with pytest.raises(UserError) as caught:
        validate(RlConfig, values)
    assert "here it is" in caught.value.what and (key in caught.value.what or len(parents) > 1)
    asked = "\n".join(explanation_lines(explain(name), None))
    assert asked.startswith(f"{name}: here it is ") and f"\n{key}  (" in asked


# The arguments of TRL 1.16's GRPOConfig, SFTConfig and RewardConfig.
TRL = """
    beta cache_implementation cast_lm_head_to_fp32 chat_template_kwargs delta disable_dropout
    ds3_gather_for_generation entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
    epsilon epsilon_high generation_batch_size generation_kwargs importance_sampling_level learning_rate
    log_completions log_completions_hub_repo log_multimodal log_unique_prompts loss_type
    mask_truncated_completions max_completion_length max_tool_calling_iterations min_p model_init_kwargs
    multi_objective_aggregation num_completions_to_print num_generations num_generations_eval num_iterations
    off_policy_mask_threshold pad_to_multiple_of ref_model_mixup_alpha ref_model_sync_steps
    remove_unused_columns repetition_penalty reward_weights router_aux_loss_coef sapo_temperature_neg
    sapo_temperature_pos scale_rewards shuffle_dataset steps_per_generation sync_ref_model temperature
    top_entropy_quantile top_k top_p transformers_continuous_batching_config trust_remote_code
    use_adaptive_entropy use_bias_correction_kl use_transformers_continuous_batching use_transformers_paged
    use_vllm vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size activation_offloading
    assistant_only_loss center_rewards_coefficient chat_template_path completion_only_loss dataset_kwargs
    dataset_num_proc dataset_text_field eos_token eval_packing max_length packing packing_strategy pad_token
    padding_free truncation_mode
"""


def test_every_argument_of_trl_and_every_key_of_verl_is_known() -> None:
    """verl's are those of ppo_trainer.yaml in 0.9.1, without the ones of profilers and of parts that are not here."""
    names = [*TRL.split(), *(Path(__file__).parent / "verl_keys.txt").read_text().split()]
    assert len(names) > 600
    assert [name for name in names if meaning(name) is None and name not in KEYS] == []


def test_a_name_in_a_section_that_has_its_key_too_is_told_that_one() -> None:
    critic = {"optim": {"lr_warmup_steps": 1, "learning_rate": 1}, "strategy": "fsdp2"}
    with pytest.raises(UserError) as caught:
        validate(RlConfig, RL | {"critic": critic, "eval": {"n": 2}})
    assert "critic.optim.lr_warmup_steps: unknown key; here it is critic.optim.warmup_steps" in caught.value.what
    assert "critic.optim.learning_rate: unknown key; here it is critic.optim.lr" in caught.value.what
    assert "critic.strategy: unknown key; here it is critic.engine.strategy" in caught.value.what
    assert "eval.n: unknown key; here it is eval.samples_per_prompt" in caught.value.what


def test_a_configuration_of_another_command_is_told_its_own_key() -> None:
    values = {"run": {"folder": "x"}, "model": {"path": "m"}, "data": {"train": "t"}, "train": {"epochs": 1}}
    with pytest.raises(UserError) as caught:
        validate(SftConfig, values | {"train": {"epochs": 1, "max_length": 3, "batch_size": 2}})
    assert "train.max_length: unknown key; here it is data.max_tokens;" in caught.value.what
    assert "train.batch_size: unknown key; here it is train.sequences_per_update;" in caught.value.what


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("train.lr_", "did you mean 'optim.lr'"),
        ("optim.max_prompt_tokens", "did you mean 'data.max_prompt_tokens'?"),
        ("train.keep", "did you mean 'checkpoint.keep'?"),
        ("optim.lrr", "did you mean 'lr'?"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_the_right_one(where: str, hint: str) -> None:
    section, _, name = where.rstrip("_").partition(".")
    values = {k: dict(v) for k, v in RL.items()}
    values.setdefault(section, {})[name] = 1
    with pytest.raises(UserError) as caught:
        validate(RlConfig, values)
    assert hint.rstrip("?") in caught.value.what or "here it is optim.lr" in caught.value.what


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("dpo", "dpo is a loss on pairs"),
        ("DPO", "hybridflow reward-model"),
        ("kto", "preference.kto"),
        ("sft", "hybridflow sft"),
        ("reinforce", "algorithm.policy_loss=reinforce"),
        ("Dr.GRPO", "did you mean 'dr_grpo'?"),
        ("drgrpo", "did you mean 'dr_grpo'?"),
        ("reinforce++", "did you mean 'reinforce_plus_plus'?"),
        ("reinforce++-baseline", "did you mean 'reinforce_plus_plus_baseline'?"),
        ("grpoo", "did you mean 'grpo'?"),
        ("RLOO", "did you mean 'rloo'?"),
        ("best_of_n", "hybridflow eval"),
        ("zzz", "known: cispo"),
    ],
)
def test_an_unknown_preset_is_told_what_that_method_is_here(preset: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(RlConfig, {**RL, "algorithm": {"preset": preset}})
    assert f"unknown preset {preset!r}; " in caught.value.what and said in caught.value.what
    assert "did you mean 'gdpo'" not in caught.value.what


def test_a_preset_given_as_an_estimator_is_told_so() -> None:
    assert unknown_name("dapo", ADVANTAGES) == "dapo is a preset, algorithm.preset=dapo"
    assert unknown_name("ppo", ADVANTAGES) == "ppo is a preset, algorithm.preset=ppo"
    assert unknown_name("anything", []) == "there are none"


def test_the_presets_are_listed_with_a_line_each() -> None:
    assert METHODS.keys() == PRESETS.keys() and all(20 < len(line) < 115 for line in METHODS.values())
    said = "\n".join(explanation_lines(explain("algorithm.preset"), None))
    assert all(f"    {name} " in said and line in said for name, line in METHODS.items())
    assert all(f"    {name}\n" in f"{said}\n" for name in ("k1", "abs")) is False
    estimators = "\n".join(explanation_lines(explain("algorithm.kl_loss_estimator"), None))
    assert "\n    k3_clamped+" in estimators


@pytest.mark.parametrize("word", ["kl", "klx", "clip", "tokens", "engine.x", "zzz", "optim.", "", "."])
def test_what_is_no_key_is_answered_in_a_few_words(word: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(word)
    assert len(caught.value.fix) < 400 and caught.value.fix and "nothing" not in caught.value.fix


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("eval.every", "; for never, none or all use 0"),
        ("checkpoint.every", "; for never, none or all use 0"),
        ("rollout.top_k", "; for never, none or all use 0"),
        ("eval.max_rows", "; for no limit leave it out, or write null"),
        ("placement.port", "; for no limit leave it out, or write null"),
        ("checkpoint.keep", "(it is -1)"),
    ],
)
def test_minus_one_is_told_what_stands_for_it(key: str, said: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(UserError) as caught:
        validate(RlConfig, {**RL, section: {name: -1}})
    assert caught.value.what.endswith(said) and key in caught.value.what


# --- which command a file is for ---


@pytest.mark.parametrize("folder", [CARRY.parent, CARRY.parent.parent / "rlhf", CARRY.parent.parent / "gsm8k"])
def test_the_recipes_are_known_by_their_sections(folder: Path) -> None:
    for file in sorted(folder.glob("*.yaml")):
        values = read_values(file)
        kind = kind_of(values)
        validate(KINDS[kind].config, values, base=file.parent)
        for name, section in values.items():  # whatever one key is missing, it is still a file for that command
            for key in section if kind != "reward-model" or name != "train" else ():
                rest = values | {name: {k: v for k, v in section.items() if k != key}}
                assert kind_of(rest) == kind, (file, name, key)


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("reward", {"rollout": {"temperature": 1.0}}),
        ("reward", {"algorithm": {"preset": "ppo"}, "critic": {}}),
        ("reward", {"filter": {"equal_rewards": True}}),
        ("reward", {}),
        ("train", {}),
        ("model", {}),
    ],
)
def test_a_file_for_reinforcement_that_lacks_a_section_is_told_that_alone(missing: str, extra: dict[str, Any]) -> None:
    values = {k: v for k, v in (RL | extra).items() if k != missing}
    if missing == "train":
        values |= {"algorithm": {"preset": "grpo"}}
    assert kind_of(values) == "train"
    with pytest.raises(UserError) as caught:
        validate(RlConfig, values)
    assert caught.value.what.endswith(f"has 1 mistake:\n  {missing}: missing")


def test_keys_of_another_program_do_not_make_a_file_one_for_another_command() -> None:
    foreign = {"rollout": {"name": "vllm", "n": 4}, "engine": {"fsdp_size": 4, "a": 1}, "critic": {"strategy": "fsdp"}}
    assert kind_of(RL | foreign) == "train"


def test_a_file_that_could_be_for_several_says_what_is_missing() -> None:
    for values in ({"run": {"folder": "x"}, "model": {"path": "m"}, "data": {"train": "t"}}, {"optim": {"lr": 1}}):
        with pytest.raises(UserError, match="nothing says whether this configuration is for") as caught:
            kind_of(values)
        assert "for sft " in caught.value.fix and "train" in caught.value.fix
