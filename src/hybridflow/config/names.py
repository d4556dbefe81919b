"""What users of TRL, verl, OpenRLHF and the Hugging Face Trainer call things, and what they are called here.

A name is looked up as it is written (`actor_rollout_ref.rollout.n`), then without its first parts (`rollout.n`, `n`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from hybridflow.config.pieces.presets import PRESETS
from hybridflow.errors import nearest


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name of another program is here.

    Args:
        keys: our keys; of several, those that a configuration has.
        hint: what differs: a unit, a default; or why there is none.
    """

    keys: tuple[str, ...]
    hint: str

    def within(self, known: Container[str]) -> Meaning:
        """Returns the same for a configuration that has these keys; all keys, where it has none of them."""
        return Meaning(tuple(k for k in self.keys if k in known) or self.keys, self.hint)

    def line(self) -> str:
        """Describes the meaning in one line."""
        here = f"here it is {' and '.join(self.keys)}" if self.keys else "there is no such key here"
        return f"{here}; {self.hint}" if self.hint else here


UPDATE = "train.sequences_per_update,train.pairs_per_update"
SEQUENCES = "counted in responses of all devices together"
MICRO = "in tokens, and it changes speed and memory only; no key is per device"
ARGS = "the engine's own arguments go below rollout.engine_args"
NONE = "nothing needs it here"

# name: keys, what differs. Names with dots are verl's, where a shorter one would mean something else.
_NAMES: dict[str, tuple[str, str]] = {
    # optimizer
    "learning_rate": ("optim.lr", ""),
    "actor_learning_rate": ("optim.lr", ""),
    "critic_learning_rate": ("critic.optim.lr", "left out it is optim.lr, not 1e-5 or 9e-6"),
    "lr": ("optim.lr", ""),
    "critic.lr": ("critic.optim.lr", "left out it is optim.lr"),
    "critic.model.path": ("critic.path", ""),
    "critic.ppo_epochs": ("critic.epochs_per_step", ""),
    "adam_beta1": ("optim.betas", "[beta1, beta2]"),
    "adam_beta2": ("optim.betas", "[beta1, beta2]"),
    "adam_betas": ("optim.betas", ""),
    "adam_epsilon": ("optim.eps", ""),
    "weight_decay": ("optim.weight_decay", "on matrices only; default 0"),
    "l2": ("optim.weight_decay", "on matrices only; default 0"),
    "max_grad_norm": ("optim.clip_grad_norm", ""),
    "max_norm": ("optim.clip_grad_norm", ""),
    "grad_clip": ("optim.clip_grad_norm", ""),
    "clip_grad": ("optim.clip_grad_norm", ""),
    "gradient_clipping": ("optim.clip_grad_norm", ""),
    "lr_scheduler_type": ("optim.schedule", "constant, linear or cosine"),
    "lr_scheduler": ("optim.schedule", "constant, linear or cosine"),
    "warmup_style": ("optim.schedule", "constant, linear or cosine"),
    "warmup_ratio": ("optim.warmup_steps", "in optimizer steps, not a share of them"),
    "lr_warmup_ratio": ("optim.warmup_steps", "in optimizer steps, not a share of them"),
    "lr_warmup_steps_ratio": ("optim.warmup_steps", "in optimizer steps, not a share of them"),
    "lr_warmup_steps": ("optim.warmup_steps", "0 for none, where verl has -1"),
    "num_warmup_steps": ("optim.warmup_steps", ""),
    "optim.total_training_steps": ("train.steps", "the schedule ends with the run"),
    # how much
    "num_train_epochs": ("train.epochs", "passes over the rows; a whole number"),
    "total_epochs": ("train.epochs", "passes over the rows; or give train.steps"),
    "num_episodes": ("train.epochs", "passes over the rows"),
    "max_epochs": ("train.epochs_per_step,train.epochs", "passes over a step's responses"),
    "max_steps": (
        "train.steps",
        "steps of generating and training; -1 is not needed: give train.steps or train.epochs",
    ),
    "total_training_steps": ("train.steps", ""),
    "total_episodes": ("train.steps", "in steps of train.prompts_per_step prompts, not in responses"),
    "train_batch_size": (
        f"train.prompts_per_step,{UPDATE}",
        "in prompts for one step (OpenRLHF and SFT: in sequences)",
    ),
    "gen_batch_size": ("train.prompts_per_step", "a filter draws further prompts as it needs them"),
    "rollout_batch_size": ("train.prompts_per_step", "in prompts"),
    "generation_batch_size": ("train.prompts_per_step", "in prompts: responses / train.samples_per_prompt"),
    "num_generations": ("train.samples_per_prompt", "responses to each prompt"),
    "num_return_sequences": ("train.samples_per_prompt,eval.samples_per_prompt", "responses to each prompt"),
    "n_samples_per_prompt": ("train.samples_per_prompt", "responses to each prompt"),
    "n_samples": ("train.samples_per_prompt,eval.samples_per_prompt", "responses to each prompt"),
    "num_samples": ("train.samples_per_prompt,eval.samples_per_prompt", "responses to each prompt"),
    "group_size": ("train.samples_per_prompt", "responses to each prompt"),
    "rloo_k": ("train.samples_per_prompt", "responses to each prompt"),
    "rollout.n": ("train.samples_per_prompt", "responses to each prompt"),
    "n": ("train.samples_per_prompt,eval.samples_per_prompt", "responses to each prompt"),
    "val_kwargs.n": ("eval.samples_per_prompt", "responses to each prompt"),
    "ppo_mini_batch_size": ("train.sequences_per_update", f"{SEQUENCES}, not in prompts: times samples_per_prompt"),
    "mini_batch_size": (UPDATE, SEQUENCES),
    "num_mini_batches": (UPDATE, f"{SEQUENCES}: those of a step / the number of mini-batches"),
    "batch_size": (
        f"train.prompts_per_step,{UPDATE}",
        "in prompts for one step; responses are prompts x samples_per_prompt",
    ),
    "per_device_train_batch_size": (UPDATE, f"{SEQUENCES}: x devices x gradient_accumulation_steps"),
    "gradient_accumulation_steps": (UPDATE, f"{SEQUENCES}: micro-batches are made to fit train.tokens_per_microbatch"),
    "micro_train_batch_size": ("train.tokens_per_microbatch", MICRO),
    "micro_batch_size": ("train.tokens_per_microbatch", MICRO),
    "micro_batch_size_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "micro_rollout_batch_size": ("rollout.max_cache_tokens", "in tokens; a bound on what is generated at once"),
    "ppo_micro_batch_size": ("train.tokens_per_microbatch", MICRO),
    "ppo_micro_batch_size_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "ppo_max_token_len_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "max_token_len_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "forward_max_token_len_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "log_prob_micro_batch_size": ("train.tokens_per_microbatch", MICRO),
    "log_prob_micro_batch_size_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "log_prob_max_token_len_per_gpu": ("train.tokens_per_microbatch", MICRO),
    "per_device_eval_batch_size": ("rollout.max_cache_tokens", "in tokens; a bound on what is generated at once"),
    "use_dynamic_bsz": ("train.tokens_per_microbatch", "micro-batches are always made by tokens"),
    "log_prob_use_dynamic_bsz": ("train.tokens_per_microbatch", "micro-batches are always made by tokens"),
    "ppo_epochs": ("train.epochs_per_step", "passes over a step's responses"),
    "num_ppo_epochs": ("train.epochs_per_step", "passes over a step's responses"),
    "num_iterations": ("train.epochs_per_step", "passes over a step's responses"),
    # lengths and data
    "max_prompt_length": ("data.max_prompt_tokens", "longer prompts are an error unless data.over_long says otherwise"),
    "prompt_max_len": ("data.max_prompt_tokens", "longer prompts are an error unless data.over_long says otherwise"),
    "prompt_length": ("data.max_prompt_tokens", ""),
    "max_completion_length": ("rollout.max_response_tokens", "in tokens"),
    "max_new_tokens": ("rollout.max_response_tokens", "in tokens"),
    "max_tokens": ("rollout.max_response_tokens,data.max_tokens", "in tokens"),
    "generate_max_len": ("rollout.max_response_tokens", "in tokens"),
    "max_response_length": ("rollout.max_response_tokens", "in tokens"),
    "response_length": ("rollout.max_response_tokens", "in tokens"),
    "max_length": ("data.max_tokens,data.max_prompt_tokens", "in tokens; for train also rollout.max_response_tokens"),
    "max_seq_length": (
        "data.max_tokens,data.max_prompt_tokens",
        "in tokens; for train also rollout.max_response_tokens",
    ),
    "max_len": ("data.max_tokens,data.max_prompt_tokens", "in tokens; for train also rollout.max_response_tokens"),
    "max_model_len": ("data.max_prompt_tokens,data.max_tokens", "the engine gets prompt + response together"),
    "train_files": ("data.train", ""),
    "val_files": ("data.eval", ""),
    "train_dataset": ("data.train", ""),
    "eval_dataset": ("data.eval", ""),
    "dataset_name": ("data.train", "org/name:config/split on the hub, or a file"),
    "prompt_data": ("data.train", ""),
    "dataset": ("data.train", ""),
    "input_key": ("data.prompt_key", ""),
    "label_key": ("data.ground_truth_key", ""),
    "answer_key": ("data.ground_truth_key", ""),
    "dataset_text_field": ("data.text_key", "with data.format=text"),
    "output_key": ("data.response_key", ""),
    "truncation": ("data.over_long", "refuse, filter or truncate"),
    "filter_overlong_prompts": ("data.over_long", "data.over_long=filter"),
    "data.shuffle": ("data.order", "shuffled or sequential"),
    "shuffle": ("data.order", "shuffled or sequential"),
    "shuffle_dataset": ("data.order", "shuffled or sequential"),
    "apply_chat_template": ("data.format", "chat or text"),
    "apply_chat_template_kwargs": ("data.thinking", "the switch enable_thinking alone"),
    "enable_thinking": ("data.thinking", ""),
    "assistant_only_loss": ("data.loss_on", "the loss is on the assistant's turns alone"),
    "completion_only_loss": ("data.loss_on", "the loss is on the assistant's turns alone"),
    "packing": ("model.packing", "sequences are side by side without padding, and see nothing of each other"),
    "use_remove_padding": ("model.packing", "on by default"),
    "padding_free": ("model.packing", "on by default"),
    "val_batch_size": ("eval.max_rows", NONE),
    "train_max_samples": ("data.train", "give a file with fewer rows"),
    # model
    "model_name_or_path": ("model.path", ""),
    "pretrain": ("model.path", ""),
    "partial_pretrain": ("model.path", ""),
    "actor_model_name_or_path": ("model.path", ""),
    "actor_rollout_ref.model.path": ("model.path", ""),
    "ref_model": ("model.reference", ""),
    "critic_pretrain": ("critic.path", ""),
    "value_model_path": ("critic.path", ""),
    "reward_model_path": ("reward.model.path", "with reward.function=model"),
    "reward_pretrain": ("reward.model.path", "with reward.function=model"),
    "use_peft": ("model.lora", "model.lora={rank: 16, alpha: 32}"),
    "peft_config": ("model.lora", "model.lora={rank: 16, alpha: 32}"),
    "lora_r": ("model.lora.rank", ""),
    "lora_rank": ("model.lora.rank", ""),
    "lora_alpha": ("model.lora.alpha", ""),
    "lora_target_modules": ("model.lora.target_modules", ""),
    "target_modules": ("model.lora.target_modules", ""),
    "gradient_checkpointing": ("model.activation_checkpointing", "off by default"),
    "enable_gradient_checkpointing": ("model.activation_checkpointing", "off by default"),
    "use_liger_kernel": ("model.liger", ""),
    "use_liger_loss": ("model.liger", ""),
    "use_liger": ("model.liger", ""),
    "trust_remote_code": ("model.trust_remote_code", ""),
    "bf16": ("engine.dtype", "bfloat16 or float32; weights stay float32"),
    "fp16": ("engine.dtype", "bfloat16 or float32; weights stay float32"),
    "torch_dtype": ("engine.dtype", "bfloat16 or float32; weights stay float32"),
    "model_dtype": ("engine.dtype", "weights stay float32"),
    "torch_compile": ("engine.compile", ""),
    "use_torch_compile": ("engine.compile", ""),
    "fsdp": ("engine.strategy", "local, fsdp2 or fsdp1"),
    "actor.strategy": ("engine.strategy", "local, fsdp2 or fsdp1"),
    "strategy": ("engine.strategy", "local, fsdp2 or fsdp1"),
    "deepspeed": ("engine.strategy", "fsdp2 stands for ZeRO 3"),
    "zero_stage": ("engine.strategy", "fsdp2 stands for stage 3"),
    "fsdp_size": ("engine.shard_size", "unset for all, where verl has -1"),
    "param_offload": ("engine.offload", "engine.offload=[parameters]"),
    "optimizer_offload": ("engine.offload", "engine.offload=[optimizer]"),
    "offload_policy": ("engine.cpu_offload", ""),
    "adam_offload": ("engine.offload", "engine.offload=[optimizer]"),
    "ulysses_sequence_parallel_size": ("engine.sequence_parallel", ""),
    "ring_attn_size": ("engine.sequence_parallel", ""),
    "context_parallel_size": ("engine.sequence_parallel", ""),
    "nnodes": ("placement.pools", "processes of each pool, such as {all: 8}"),
    "n_gpus_per_node": ("placement.pools", "processes of each pool, such as {all: 8}"),
    "num_processes": ("placement.pools", "processes of each pool, such as {all: 8}"),
    "actor_num_gpus_per_node": ("placement.pools", "processes of each pool, such as {all: 8}"),
    "nccl_timeout": ("placement.timeout", "in seconds"),
    "ddp_timeout": ("placement.timeout", "in seconds"),
    # generation
    "use_vllm": ("rollout.engine", "rollout.engine=vllm"),
    "vllm_mode": ("rollout.mode", "in_process, workers or server"),
    "vllm_server_base_url": ("rollout.servers", "rollout.servers=[http://host:port]"),
    "vllm_server_host": ("rollout.servers", "rollout.servers=[http://host:port]"),
    "vllm_num_engines": ("rollout.replicas", ""),
    "vllm_tensor_parallel_size": ("rollout.tensor_parallel", ""),
    "tensor_model_parallel_size": ("rollout.tensor_parallel", "of generation; training has no tensor parallelism"),
    "tensor_parallel_size": ("rollout.tensor_parallel", "of generation; training has no tensor parallelism"),
    "data_parallel_size": ("rollout.replicas", ""),
    "rollout.name": ("rollout.engine", "inline, vllm or sglang"),
    "vllm_gpu_memory_utilization": ("rollout.engine_args", "rollout.engine_args.gpu_memory_utilization"),
    "gpu_memory_utilization": ("rollout.engine_args", ARGS),
    "enforce_eager": ("rollout.engine_args", ARGS),
    "max_num_seqs": ("rollout.engine_args", ARGS),
    "max_num_batched_tokens": ("rollout.engine_args", ARGS),
    "enable_chunked_prefill": ("rollout.engine_args", ARGS),
    "enable_prefix_caching": ("rollout.engine_args", ARGS),
    "engine_kwargs": ("rollout.engine_args", ""),
    "free_cache_engine": ("rollout.sleep", "auto, always or never"),
    "vllm_enable_sleep_mode": ("rollout.sleep", "auto, always or never"),
    "temperature": ("rollout.temperature", "eval.temperature is that of evaluations, 0 unless it is set"),
    "top_p": ("rollout.top_p", "eval.top_p is that of evaluations"),
    "top_k": ("rollout.top_k", "0 for all tokens, where others have -1"),
    "min_p": ("rollout.min_p", ""),
    "repetition_penalty": ("eval.repetition_penalty", "in evaluations alone: training scores what it samples"),
    "stop_strings": ("rollout.stop", "a list of texts"),
    "stop_token": ("rollout.stop", "a list of texts"),
    "do_sample": ("eval.temperature", "eval.temperature=0 is greedy; training always samples"),
    "val_kwargs.do_sample": ("eval.temperature", "0 is greedy"),
    "val_kwargs.temperature": ("eval.temperature", ""),
    "val_kwargs.top_p": ("eval.top_p", ""),
    "val_kwargs.top_k": ("eval.top_k", "0 for all tokens, where verl has -1"),
    # algorithm
    "adv_estimator": (
        "algorithm.preset",
        "a preset names the estimator, the loss and the clips; algorithm.advantage alone",
    ),
    "advantage_estimator": ("algorithm.preset", "a preset names the estimator, the loss and the clips"),
    "norm_adv_by_std_in_grpo": ("algorithm.normalize_by_std", ""),
    "scale_rewards": ("algorithm.normalize_by_std", ""),
    "loss_type": ("algorithm.preset", "and algorithm.aggregation, how token losses become one number"),
    "loss_mode": ("algorithm.policy_loss", ""),
    "loss_agg_mode": ("algorithm.aggregation", "the preset grpo has seq-mean-token-mean, where verl has token-mean"),
    "importance_sampling_level": ("algorithm.policy_loss", "sequence: algorithm.preset=gspo"),
    "beta": ("algorithm.kl_loss_coef", "weight of the divergence from the reference in the loss; default 0"),
    "kl_coef": ("algorithm.kl_reward_coef", "taken off the reward; algorithm.kl_loss_coef is that in the loss"),
    "init_kl_coef": ("algorithm.kl_reward_coef", "taken off the reward; algorithm.kl_loss_coef is that in the loss"),
    "use_kl_loss": ("algorithm.kl_loss_coef", "above 0 switches it on"),
    "kl_loss_coef": ("algorithm.kl_loss_coef", ""),
    "kl_loss_type": ("algorithm.kl_loss_estimator", "low_var_kl is k3_clamped, kl is k1, mse is k2"),
    "kl_penalty": ("algorithm.kl_reward_estimator", "low_var_kl is k3_clamped, kl is k1, mse is k2"),
    "kl_estimator": ("algorithm.kl_reward_estimator", "k1, abs, k2, k3, k3_clamped"),
    "use_kl_in_reward": ("algorithm.kl_reward_coef", "above 0 switches it on"),
    "kl_ctrl.type": ("algorithm.kl_controller", "fixed or adaptive"),
    "target_kl": ("algorithm.kl_target", "with algorithm.kl_controller=adaptive"),
    "horizon": ("algorithm.kl_horizon", ""),
    "epsilon": ("algorithm.clip_low", "and algorithm.clip_high"),
    "epsilon_low": ("algorithm.clip_low", ""),
    "epsilon_high": ("algorithm.clip_high", ""),
    "cliprange": ("algorithm.clip_low", "and algorithm.clip_high"),
    "clip_ratio": ("algorithm.clip_low", "and algorithm.clip_high"),
    "clip_range": ("algorithm.clip_low", "and algorithm.clip_high"),
    "eps_clip": ("algorithm.clip_low", "and algorithm.clip_high"),
    "clip_ratio_low": ("algorithm.clip_low", ""),
    "clip_ratio_high": ("algorithm.clip_high", ""),
    "clip_ratio_c": ("algorithm.clip_dual", "unset, where verl has 3.0"),
    "delta": ("algorithm.clip_dual", "unset is none"),
    "cliprange_value": ("algorithm.clip_value", ""),
    "value_clip": ("algorithm.clip_value", ""),
    "vf_coef": ("algorithm.value_coef", "with critic.shared_trunk"),
    "gae_lambda": ("algorithm.lam", "0.95 in the preset ppo, where verl has 1.0"),
    "lambd": ("algorithm.lam", "0.95 in the preset ppo"),
    "entropy_coeff": ("algorithm.entropy_coef", ""),
    "entropy_loss_coef": ("algorithm.entropy_coef", ""),
    "critic_warmup": ("critic.warmup_steps", ""),
    "freezing_actor_steps": ("critic.warmup_steps", "0 for none"),
    "rollout_correction": ("algorithm.correction", "algorithm.correction.preset takes verl's names"),
    "rollout_is": ("algorithm.correction.weights", "token or sequence"),
    "vllm_importance_sampling_correction": ("algorithm.correction.preset", "decoupled_token_is"),
    "mask_truncated_completions": ("filter.overlong", ""),
    "dynamic_filtering": ("filter.equal_rewards", ""),
    "filter_groups.enable": ("filter.equal_rewards", ""),
    "filter_groups.metric": ("filter.metric", ""),
    "max_num_gen_batches": ("filter.max_rounds", ""),
    "sync_ref_model": ("model.reference", "the reference never changes"),
    # reward
    "reward_funcs": ("reward.function", "file.py:function; several are reward.terms"),
    "reward_function": ("reward.function", "file.py:function"),
    "reward_fn": ("reward.function", "file.py:function"),
    "remote_rm_url": ("reward.function", "http://host/path"),
    "custom_reward_function.path": ("reward.function", "file.py:function, in one text"),
    "custom_reward_function.name": ("reward.function", "file.py:function, in one text"),
    "reward_weights": ("reward.terms", "reward.terms.NAME.weight"),
    "reward_fn_key": ("reward.function", "by_source looks at data_source of every row"),
    "reward_manager": ("reward.function", "by_source; DAPO's length penalty is reward.overlong_buffer"),
    "reward_clip_range": ("reward.clip", "[least, greatest]"),
    "overlong_buffer.len": ("reward.overlong_buffer", "in tokens"),
    "penalty_factor": ("reward.overlong_penalty", ""),
    "sandbox_fusion.url": ("reward.sandbox.url", "with reward.sandbox.backend=fusion"),
    # records
    "output_dir": ("run.folder", ""),
    "save_path": ("run.folder", ""),
    "ckpt_path": ("run.folder", "checkpoints are in its folder checkpoints"),
    "default_local_dir": ("run.folder", "checkpoints are in its folder checkpoints"),
    "experiment_name": ("run.folder", "the folder names the run"),
    "run_name": ("run.folder", "the folder names the run"),
    "project_name": ("track.project", ""),
    "wandb_project": ("track.project", "with track.wandb=true"),
    "report_to": ("track.wandb", "or track.tensorboard: true or false"),
    "use_wandb": ("track.wandb", "true or false"),
    "logger": ("track.wandb", "or track.tensorboard, track.console: true or false"),
    "logging_steps": ("track.console", "every step is recorded"),
    "log_val_generations": ("track.rollouts_every", "all responses of evaluations are kept in evaluations/"),
    "log_completions": ("track.rollouts_every", "all responses are kept in rollouts/"),
    "rollout_data_dir": ("track.rollouts_every", "responses are in the run's folder, rollouts/"),
    "save_steps": ("checkpoint.every", "in steps; 0 for the end alone"),
    "save_freq": ("checkpoint.every", "in steps; 0 for the end alone, where verl has -1"),
    "save_total_limit": ("checkpoint.keep", "2 by default"),
    "max_ckpt_num": ("checkpoint.keep", "2 by default"),
    "max_actor_ckpt_to_keep": ("checkpoint.keep", "2 by default, where verl keeps all"),
    "load_best_model_at_end": ("checkpoint.best", "the name of a metric of the evaluation"),
    "metric_for_best_model": ("checkpoint.best", "the name of a metric of the evaluation"),
    "resume_from_checkpoint": ("run.resume", "auto: the same command resumes"),
    "resume_mode": ("run.resume", "auto: the same command resumes"),
    "load_checkpoint": ("run.resume", "auto: the same command resumes"),
    "eval_steps": ("eval.every", "in steps; 0 for before and after training alone"),
    "test_freq": ("eval.every", "in steps; 0 for before and after training alone, where verl has -1"),
    "eval_strategy": ("eval.every", "in steps"),
    "val_before_train": ("eval.before_training", ""),
    "eval_on_start": ("eval.before_training", ""),
    "seed": ("run.seed", ""),
    "data_seed": ("run.seed", "one seed for everything"),
    "full_determinism": ("run.seed", "every run repeats; run.threads is part of it"),
    "device": ("run.device", "auto, cpu, cuda or npu"),
    "use_cpu": ("run.device", "run.device=cpu"),
    # whole sections of verl, where nothing inside is known better
    "actor_rollout_ref": ("model,rollout,algorithm,train,optim,engine", "its parts are sections of their own here"),
    "ref": ("model.reference_engine", "what differs from engine"),
    "custom_reward_function": ("reward.function", "file.py:function"),
    "reward_model": ("reward.model", "a model that scores; a function is reward.function"),
    "trainer": ("train,run,eval,checkpoint,track", "its parts are sections of their own here"),
    "ray_init": ("placement.backend", "placement.backend=ray"),
    "ray_kwargs": ("placement.backend", "placement.backend=ray"),
    "multi_turn": ("", "conversations of several generated turns are not there"),
    "megatron": ("", "Megatron-LM is not there; engine.strategy is local, fsdp2 or fsdp1"),
    "balance_batch": ("", "work is always balanced"),
    "hybrid_engine": ("", "placement.roles says which models share processes"),
    "remove_unused_columns": ("", "rewards see the whole row"),
    "push_to_hub": ("", "the folder model of a run is a Hugging Face folder, which any tool uploads"),
    "hub_model_id": ("", "the folder model of a run is a Hugging Face folder, which any tool uploads"),
    "gradient_checkpointing_kwargs": ("model.activation_checkpointing", "true or false"),
    "steps_per_generation": ("train.sequences_per_update", "the responses of a step / its updates"),
    "dataset_num_proc": ("", "rows are rendered in one process"),
    "dataloader_num_workers": ("", "rows are rendered in one process"),
    "ds3_gather_for_generation": ("", "the engine gets whole weights"),
    "missing_eos_penalty": ("reward.overlong_buffer", "with reward.overlong_penalty, for responses that do not end"),
    "whiten_rewards": ("reward.normalize", ""),
    "return_raw_chat": ("", "rewards see the whole row"),
    "image_key": ("", "only text is read"),
    "video_key": ("", "only text is read"),
    "default_hdfs_dir": ("", "copy run.folder where you want it"),
}


def meaning(name: str) -> Meaning | None:
    """Returns what a name of another program means here; None for a name that is not known.

    >>> meaning("--num-generations").line()
    'here it is train.samples_per_prompt; responses to each prompt'
    """
    parts = name.lstrip("-+~").replace("-", "_").lower().split(".")
    for i in range(len(parts)):  # the longest ending that is known
        found = _NAMES.get(".".join(parts[i:]))
        if found is not None:
            return Meaning(tuple(filter(None, found[0].split(","))), found[1])
    for part in reversed(parts[:-1]):  # a part of verl's that is known as a whole
        if part in _NAMES and part not in ("optim", "model"):
            found = _NAMES[part]
            return Meaning(tuple(filter(None, found[0].split(","))), found[1])
    return None


# Methods by their common names: what they are here. Keys have small letters and digits only.
_METHODS: dict[str, str] = {
    "dpo": "a loss on pairs, hybridflow.algorithms.preference.dpo, without a trainer; pairs train a reward model "
    "(hybridflow reward-model), with which ppo or grpo then trains",
    "ipo": "a loss on pairs, hybridflow.algorithms.preference.ipo, without a trainer",
    "simpo": "a loss on pairs, hybridflow.algorithms.preference.simpo, without a trainer",
    "orpo": "a loss on pairs, hybridflow.algorithms.preference.orpo, without a trainer",
    "kto": "a loss on good and bad responses, hybridflow.algorithms.preference.kto, without a trainer",
    "cpo": "a loss on pairs that is not there; the nearest is hybridflow.algorithms.preference.simpo",
    "onlinedpo": "not there; grpo with a reward model (reward.function=model) is the nearest",
    "nashmd": "not there; sppo is the nearest",
    "xpo": "not there; grpo with a reward model (reward.function=model) is the nearest",
    "sft": "a command of its own: hybridflow sft",
    "rm": "a command of its own: hybridflow reward-model",
    "rewardmodel": "a command of its own: hybridflow reward-model",
    "raft": "hybridflow eval with several samples, then hybridflow sft on the best",
    "rejectionsampling": "hybridflow eval with several samples, then hybridflow sft on the best",
    "bestofn": "hybridflow eval with several samples, then hybridflow sft on the best",
    "gkd": "algorithm.preset=distillation, with the teacher in model.reference",
    "opd": "algorithm.preset=distillation, with the teacher in model.reference",
    "onpolicydistillation": "algorithm.preset=distillation, with the teacher in model.reference",
    "minillm": "algorithm.preset=distillation, with the teacher in model.reference",
    "prime": "losses of implicit rewards as functions, hybridflow.algorithms.prime",
    "pfppo": "the section reweight, beside algorithm.preset=ppo",
    "a2c": "algorithm.preset=ppo with algorithm.policy_loss=reinforce",
    "actorcritic": "algorithm.preset=ppo with algorithm.policy_loss=reinforce",
    "trpo": "not there; ppo is what came after it",
    "reinforce": "algorithm.policy_loss=reinforce; presets with a baseline: rloo, remax, opo, reinforce_plus_plus",
    "policygradient": "algorithm.policy_loss=reinforce; as a preset with a baseline: rloo, remax, opo",
    "vanilla": "algorithm.policy_loss=ppo_clip",
    "ppoloss": "algorithm.policy_loss=ppo_clip",
    "regular": "algorithm.policy_loss=ppo_clip",
    "bnpo": "algorithm.preset=grpo with algorithm.aggregation=token-mean",
    "drgrpo": "dr_grpo",
    "reinforcepp": "reinforce_plus_plus",
    "rpp": "reinforce_plus_plus",
    "reinforceplusplus": "reinforce_plus_plus",
    "reinforcebaseline": "reinforce_plus_plus_baseline",
    "reinforceppbaseline": "reinforce_plus_plus_baseline",
    "groupnorm": "grpo",
    "grpovectorized": "grpo",
    "rloovectorized": "rloo",
    "passk": "grpo_passk",
    "geomean": "gmpo",
    "gspotoken": "algorithm.policy_loss=gspo_token",
    "optimaltokenbaseline": "algorithm.advantage=optimal_token_baseline, in the preset otb",
    "bypassmode": "algorithm.correction.mode=bypass",
    "lowvarkl": "k3_clamped",
    "mse": "k2",
    "kl": "k1",
    "full": "not there; k1, k2 and k3 estimate the divergence from the tokens that were sampled",
    "seqmean": "algorithm.aggregation=seq-mean-token-mean",
    "mean": "algorithm.aggregation=token-mean",
    "sum": "algorithm.aggregation=token-sum",
}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Returns the hint that follows an unknown preset, estimator or loss: the name here for a method of that name, or
    the nearest name.

    >>> unknown_name("Dr.GRPO", ["grpo", "dr_grpo"])
    "did you mean 'dr_grpo'?"
    """
    known = list(known)
    plain = _plain(name)
    same = next((k for k in known if _plain(k) == plain), None)
    preset = next((f"a preset, algorithm.preset={preset}" for preset in PRESETS if _plain(preset) == plain), None)
    found = same or _METHODS.get(plain) or preset
    if found is None:
        return nearest(name, known)
    return f"did you mean {found!r}?" if found in known else f"{name} is {found}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "plusplus"))
