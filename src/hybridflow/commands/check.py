"""Checks before training everything that can fail then: `hybridflow check`, and the start of every run.

Shapes: T tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.given import NOTHING, Given
from hybridflow.chat.special_tokens import reader
from hybridflow.commands.check_agent import check_environment, describe_tools, turn_tokens
from hybridflow.commands.special_advice import advice_on_ends, advice_on_tokens
from hybridflow.commands.trial import lacking_components, try_reward
from hybridflow.commands.turns import describe_turns
from hybridflow.commands.verl_defaults import differences_from_verl, is_verl_row
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.registry import kind_for
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES, POLICY_LOSSES
from hybridflow.data.prompts import PromptSet
from hybridflow.data.sft import load_sft
from hybridflow.devices import pick_device
from hybridflow.errors import UserError, nearest
from hybridflow.evaluation.evaluate import sampling_for, vote_in
from hybridflow.models.load import longest_trainable, stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.placing.acting import prompts_of
from hybridflow.placing.build import load_role
from hybridflow.placing.companions import check_companions
from hybridflow.placing.generation import describe_engine, training_sampling
from hybridflow.placing.places import describe_placement
from hybridflow.placing.role import actor_role, sft_role
from hybridflow.rewards.graders.given import GivenReward, with_given
from hybridflow.rollout.inline.engine import require_room
from hybridflow.rollout.sampling import check_sampling
from hybridflow.runs.session import total_steps
from hybridflow.tracking.trackers import not_installed
from hybridflow.trainers.sft import require_rows_in_context

MAX_ROWS = 20_000  # prompts that are checked; later ones are checked when they are drawn
MAX_CONVERSATIONS = 2_000  # conversations whose masks are checked; that takes longer


def check(config: Any, **objects: Any) -> Iterator[str]:
    """Runs one check after the other, and yields the findings as lines for a reader.

    Args:
        config: a configuration of any kind.
        objects: what a program gives beside it, see `Kind.checked`.

    Raises:
        UserError: the first thing that is wrong.
    """
    pick_device(config.run.device)  # refused if there is no such device
    if config.run.resume == "never" and (Path(config.run.folder) / "metrics.jsonl").exists():
        raise UserError(
            f"{config.run.folder} already holds a run, and run.resume is never",
            fix="choose another run.folder, delete this one, or set run.resume=auto to resume",
        )
    yield from kind_for(config).checked(config, **objects)


def check_rl(config: RlConfig, *, reward: GivenReward | None = None, given: Given = NOTHING) -> Iterator[str]:
    """Checks a reinforcement-learning run: its models, its rows, its reward, its evaluation and its sizes.

    Args:
        config: the configuration.
        reward: a reward that a program gives as an object, see `open_run`.
        given: other objects that it gives, see `open_run`.
    """
    config = with_given(config, reward)
    model, tokenizer = load_role(actor_role(config, 1), outline=True)
    yield from _describe_model(config.model.path, model, tokenizer)
    yield from describe_placement(config)
    if config.rollout.engine != "inline":
        yield describe_engine(config.rollout)
    yield from _check_own_functions(config)
    yield from _describe_sequences(config)
    yield from check_companions(config, tokenizer)
    yield from describe_tools(config, given)
    yield from describe_turns(config, tokenizer, given)
    lacking = partial(lacking_components, config)
    prompts, seen = yield from _check_prompts(config, model, tokenizer, "training", lacking, reward=reward, given=given)
    yield from check_environment(config, model, tokenizer, prompts, given)
    yield from _advise_on_tokens(config, model, tokenizer, prompts)
    if is_verl_row(prompts.data.rows[0]):
        yield from (f"  {line}" for line in differences_from_verl(config))
    prompts.sampler(seed=config.run.seed).take(1)  # tries data.order
    if config.has_evaluation:
        yield from _check_prompts(config, model, tokenizer, "evaluation", lacking, seen, reward=reward, given=given)
        measured = yield from _check_evaluation(config, model, tokenizer, given)
        best = config.checkpoint.best
        if best is not None and best not in measured:
            raise UserError(f"checkpoint.best {best!r} is not among what is measured", fix=nearest(best, measured))
    yield arithmetic(config, len(prompts))
    yield from not_installed(config.track)


def check_eval(config: EvalConfig) -> Iterator[str]:
    """Checks an evaluation: its model, its rows and its reward."""
    model, tokenizer = load_trainable(config.model, seed=config.run.seed, outline=True)
    yield from _describe_model(config.model.path, model, tokenizer)
    yield from describe_tools(config)
    yield from describe_turns(config, tokenizer)
    prompts, _ = yield from _check_prompts(config, model, tokenizer, "evaluation")
    yield from check_environment(config, model, tokenizer, prompts)
    yield from _advise_on_tokens(config, model, tokenizer, prompts)
    yield from _check_evaluation(config, model, tokenizer)


def _describe_model(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield f"model {path}: tokenizer with {len(tokenizer)} tokens, responses end with {tokenizer.eos_token!r}"
    rows, ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if rows > ids:
        yield f"  its vocabulary has {rows} rows, {rows - ids} more than the tokenizer has ids (padding, as a rule)"


def _check_own_functions(config: RlConfig) -> Iterator[str]:
    a = config.algorithm
    for what, name in [("advantage", a.advantage), ("policy loss", a.policy_loss), ("aggregation", a.aggregation)]:
        if is_function_reference(name):
            load_function(name)
            yield f"{what} {name}: found"


def _describe_sequences(config: RlConfig) -> Iterator[str]:
    """Tells what is computed by sequence, where a trajectory can have several."""
    a = config.algorithm
    if config.agent is None or config.agent.history == "append":
        return
    found = [f"policy loss {a.policy_loss}"] * needs_of(a.policy_loss, POLICY_LOSSES).by_sequence
    found += ["importance weights (algorithm.correction.weights)"] * (a.correction.weights == "sequence")
    found += [f"{level} (algorithm.correction.reject)" for level in a.correction.reject if level.startswith("seq_")]
    if found:
        begins = {
            "template": "where the chat template rewrites an earlier turn, a trajectory begins a new one",
            "steps": "each turn is a sequence of its own",
        }[config.agent.history]
        yield (
            f"{', '.join(found)}: computed for each sequence, and with agent.history={config.agent.history} {begins}"
        )


def _check_evaluation(
    config: RlConfig | EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Given = NOTHING,
) -> Generator[str, None, list[str]]:
    """Returns the names of what is measured."""
    e = config.eval
    sampling = sampling_for(e, training_sampling(config.rollout, stop_ids(model, tokenizer)))
    check_sampling(sampling, model.get_input_embeddings().weight.shape[0])
    prompts = _rows_for(config, tokenizer, "evaluation", given)
    rows = prompts.data.rows[: e.max_rows]
    how = "greedy" if e.temperature == 0 else f"sampled at temperature {e.temperature:g}"
    plural = "s" * (e.samples_per_prompt > 1)
    yield f"  an evaluation: {len(rows)} prompts, {e.samples_per_prompt} {how} response{plural} to each"
    sources = sorted({str(row.get("data_source") or "data") for row in rows})
    measured = [f"val-core/{source}/reward/{name}" for source in sources for name in e.metric_names()]
    yield f"  it measures {', '.join(measured)}"
    if e.answer is not None:
        text = str(prompts[0].ground_truth)
        yield f"  eval.answer: the answer in {text[:60]!r} is {vote_in(text, e.answer)!r}"
    return measured


def arithmetic(config: RlConfig, rows: int) -> str:
    """Describes a step of this run in numbers, with this many training rows."""
    t, r = config.train, config.rollout
    answers, updates = t.answers_per_step, t.updates_per_step
    steps = total_steps(t.steps, t.epochs, rows=rows, rows_per_step=t.prompts_per_step)
    turns = "" if config.agent is None else f" in at most {config.agent.max_turns} turns"
    return (
        f"a step draws {t.prompts_per_step} prompts and generates {t.samples_per_prompt} responses to each: {answers} "
        f"responses of at most {r.max_response_tokens} tokens{turns}; it makes {updates} optimizer "
        f"step{'s' * (updates > 1)} on {t.answers_per_update} responses each, in micro-batches of at most "
        f"{t.tokens_per_microbatch} tokens (the longest possible sequence has {config.longest}). {steps} steps: "
        f"{steps * t.prompts_per_step} prompts, {steps * answers} responses, {steps * updates} optimizer steps."
        + " Every prompt also has a greedy response." * needs_of(config.algorithm.advantage, ADVANTAGES).needs_greedy
        + f" The filter draws up to {config.filter.max_rounds} times where groups do not pass." * config.filter.active
    )


def _check_prompts(
    config: RlConfig | EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    purpose: str,
    lacking: Callable[[set[str]], UserError | None] = lambda components: None,
    trained: Set[int] = frozenset(),
    reward: GivenReward | None = None,
    given: Given = NOTHING,
) -> Generator[str, None, tuple[PromptSet, set[int]]]:
    """Returns the prompts, and hashes of their texts; `trained` are those of the training rows."""
    prompts = _rows_for(config, tokenizer, purpose, given)
    if prompts.made_later:
        yield f"{purpose} data {prompts.source}: {len(prompts)} rows, of which the environment makes prompts"
        texts = []
    else:
        measured = list(prompts.measure(MAX_ROWS))
        yield from _check_lengths(config, model, prompts, measured, purpose)
        texts = [hash(text) for text, _ in measured]
    shared = sum(text in trained for text in texts)
    if shared:
        yield (
            f"  advice: {shared} of {len(texts)} evaluation prompts are training prompts too; what is learned by heart "
            "will look like progress"
        )
    if not prompts.made_later:
        yield f"  first prompt, token by token: {show_tokens(tokenizer, prompts[0].token_ids)}"
    ends, keep = stop_ids(model, tokenizer), config.reward.keep_special_tokens
    yield from try_reward(config, prompts, reader(tokenizer, ends, keep=keep), MAX_ROWS, lacking, reward)
    return prompts, set(texts)


def _rows_for(
    config: RlConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, purpose: str, given: Given
) -> PromptSet:
    agent, d = config.agent, config.data
    own = (None, None) if agent is None else (agent.tasks, agent.eval_tasks)
    sources, tasks = (d.train, own[0]) if purpose == "training" else (d.eval, own[1])
    prompts = prompts_of(config, tokenizer, sources, tasks, given)
    assert prompts is not None, "the configuration was checked"
    return prompts


def _check_lengths(
    config: RlConfig | EvalConfig,
    model: PreTrainedModel,
    prompts: PromptSet,
    measured: list[tuple[str, int]],
    purpose: str,
) -> Iterator[str]:
    longest = max(range(len(measured)), key=lambda i: measured[i][1])
    prompts[longest]  # refused if it is over the limit and data.over_long is refuse
    r, asked = config.rollout, measured[: config.eval.max_rows if purpose == "evaluation" else None]
    if r.engine == "inline":
        most = min(max(tokens for _, tokens in asked), config.data.max_prompt_tokens)
        require_room(model, most, turn_tokens(config), r.max_cache_tokens)
    unseen = f" (the first {MAX_ROWS} were read)" if len(prompts) > MAX_ROWS else ""
    yield f"{purpose} data {prompts.source}: {len(prompts)} rows{unseen}, longest prompt {measured[longest][1]} tokens"
    for note in prompts.notes():
        yield f"  {note}"
    for advice in prompts.data.advice():
        yield f"  advice: {advice}"


def _advise_on_tokens(
    config: RlConfig | EvalConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet
) -> Iterator[str]:
    for advice in advice_on_tokens(config, model, tokenizer, prompts[0]):
        yield f"  advice: {advice}"


def check_sft(config: SftConfig) -> Iterator[str]:
    """Checks a supervised run: its model, its conversations and its sizes."""
    model, tokenizer = load_role(sft_role(config, 1), outline=True)
    yield from _describe_model(config.model.path, model, tokenizer)
    yield from describe_placement(config)
    data, t = load_sft(config.data, tokenizer, seed=config.run.seed), config.train
    lengths = data.lengths(MAX_ROWS)
    longest = data.batch([max(range(len(lengths)), key=lengths.__getitem__)])  # refused if it is over the limit
    require_rows_in_context(longest, data, longest_trainable(model))
    batch = data.batch(list(range(min(len(data), MAX_CONVERSATIONS))))
    unseen = f" (the first {MAX_ROWS} were read)" if len(data) > MAX_ROWS else ""
    yield f"data {data.source}: {len(data)} conversations{unseen}, longest {max(lengths)} tokens"
    for note in data.notes():
        yield f"  {note}"
    for advice in data.data.advice():
        yield f"  advice: {advice}"
    data.sampler(seed=config.run.seed).take(1)  # tries data.order
    learned = [int(i) for i, m in zip(batch.rows("input_ids_T")[0], batch.rows("loss_mask_T")[0]) if m]
    yield f"  first conversation, token by token: {show_tokens(tokenizer, batch.rows('input_ids_T')[0].tolist())}"
    yield f"  of these the loss is on: {show_tokens(tokenizer, learned)}"
    if config.data.format == "chat":
        for advice in advice_on_ends(model, tokenizer, data.style):
            yield f"  advice: {advice}"
    steps = total_steps(t.steps, t.epochs, rows=len(data), rows_per_step=t.sequences_per_update)
    passes = f"{steps * t.sequences_per_update / len(data):,.2f}".rstrip("0").rstrip(".")
    yield (
        f"{steps} optimizer steps on {t.sequences_per_update} conversations each: {passes} passes over the data"
        + (f", ending early below a loss of {t.stop_below_loss:g}" if t.stop_below_loss else "")
    )


def show_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[int] | tuple[int, ...], limit: int = 80) -> str:
    """Returns token texts, one by one between bars, at most `limit` of them."""
    shown = "|".join(str(tokenizer.decode([i])).replace("\n", "\\n") for i in token_ids[:limit])
    return f"{shown}| ... {len(token_ids) - limit} more" if len(token_ids) > limit else shown
