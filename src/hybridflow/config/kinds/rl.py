"""The configuration of a reinforcement-learning run: `hybridflow train`."""

from __future__ import annotations

from pydantic import Field, model_validator

from hybridflow.config.checks.algorithm import problems_of_algorithm, problems_of_reward
from hybridflow.config.checks.placement import PlacedModel, RolesOfRun, check_placement
from hybridflow.config.inherit import inherited
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.config.sections.agent import AgentSection
from hybridflow.config.sections.algorithm import AlgorithmSection, FilterSection, ReweightSection
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.data import PromptDataSection
from hybridflow.config.sections.engine import EngineSection, LocalSection
from hybridflow.config.sections.eval import EvalSection, check_best
from hybridflow.config.sections.model import CriticSection, RlModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.rewards import RewardSection
from hybridflow.config.sections.rollout import InlineSection, RolloutSection
from hybridflow.config.sections.run import CheckpointSection, RunSection, TrackSection
from hybridflow.config.sections.train import RlTrainSection


class RlConfig(Section):
    """A reinforcement-learning run: `hybridflow train`."""

    run: RunSection
    model: RlModelSection
    data: PromptDataSection
    reward: RewardSection
    rollout: RolloutSection = InlineSection()
    agent: AgentSection | None = Field(None, description="Tools or an environment that the model acts on.")
    algorithm: AlgorithmSection = Field(default_factory=lambda: AlgorithmSection.model_validate({}))
    filter: FilterSection = FilterSection()
    reweight: ReweightSection | None = Field(None, description="Draw some responses of a step again (PF-PPO).")
    train: RlTrainSection
    optim: OptimSection = OptimSection()
    engine: EngineSection = LocalSection()
    placement: PlacementSection = PlacementSection()
    critic: CriticSection | None = Field(None, description="The critic, of advantages that need one (gae).")
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: object) -> object:
        return inherited(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_sizes(self) -> RlConfig:
        t = self.train
        if needs_of(self.algorithm.advantage, ADVANTAGES).needs_group and t.samples_per_prompt < 2:
            raise ValueError(
                f"train.samples_per_prompt is {t.samples_per_prompt}, but the {self.algorithm.advantage} advantage "
                "compares responses to one prompt: give at least 2"
            )
        algorithm = problems_of_algorithm(
            self.algorithm, t, critic=self.critic, reference=self.model.reference, filters=self.filter
        )
        longest_answer = self.rollout.max_response_tokens
        reward = problems_of_reward(self.reward, advantage=self.algorithm.advantage, longest_answer=longest_answer)
        if problems := [*algorithm, *reward]:
            raise ValueError("; ".join(problems))
        check_placement(self.placement, self.roles(), packing=self.model.packing)
        if t.answers_per_step % t.answers_per_update:
            raise ValueError(
                f"train.sequences_per_update {t.sequences_per_update} does not divide the {t.answers_per_step} "
                f"responses of a step ({t.prompts_per_step} prompts x {t.samples_per_prompt} samples)"
            )
        rooms = {"train.tokens_per_microbatch": t.tokens_per_microbatch}
        if self.rollout.engine == "inline":
            rooms["rollout.max_cache_tokens"] = self.rollout.max_cache_tokens
        for key, room in rooms.items():
            if room < self.longest:
                raise ValueError(
                    f"{key} is {room}, but one sequence can have {self.longest} tokens (data.max_prompt_tokens "
                    f"{self.data.max_prompt_tokens} + {self._behind_prompts}); "
                    f"set {key}={self.longest} or more, or lower one of the two limits"
                )
        if self.agent is not None and self.agent.tasks is not None and self.data.train is not None:
            raise ValueError("data.train and agent.tasks both give the rows to train on: leave one of them out")
        if self.data.train is None and (self.agent is None or self.agent.tasks is None):
            raise ValueError(
                "data.train is missing: reinforcement learning needs prompts (an environment that makes its tasks by "
                "itself has agent.tasks)"
            )
        if self.rollout.engine == "sglang" and self.model.lora is not None and self.rollout.lora != "merged":
            raise ValueError(
                "rollout.engine sglang takes no adapters alone (model.lora): set rollout.lora=merged, which adds them "
                "into full weights"
            )
        if self.eval.every and not self.has_evaluation:
            raise ValueError("eval.every is set, but data.eval names no evaluation rows")
        if self.checkpoint.best is not None:
            check_best(self.checkpoint.best, self.eval, has_rows=self.has_evaluation)
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the run can meet."""
        behind = self.rollout.max_response_tokens
        return self.data.max_prompt_tokens + (behind if self.agent is None else self.agent.longest(behind))

    @property
    def has_evaluation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.data.eval is not None or (self.agent is not None and self.agent.eval_tasks is not None)

    @property
    def _behind_prompts(self) -> str:
        """The limit of a sequence behind its prompt, in words."""
        response = self.rollout.max_response_tokens
        if self.agent is None:
            return f"rollout.max_response_tokens {response}"
        if self.agent.max_tokens is not None:
            return f"agent.max_tokens {self.agent.max_tokens}"
        turns, observation = self.agent.max_turns, self.agent.max_observation_tokens
        return (
            f"rollout.max_response_tokens {response} + agent.max_turns {turns} x agent.max_observation_tokens "
            f"{observation}; or set agent.max_tokens"
        )

    def roles(self) -> RolesOfRun:
        """Returns the actor, and the models beside it: critic, reference, reward model, generation."""
        critic, reward, own = self.critic, self.reward.model, self.model.reference_engine
        models, of_actor = [PlacedModel("actor", self.engine)], {}
        if critic is not None and critic.shared_trunk:
            of_actor["critic"] = (
                "critic.shared_trunk: the critic is the actor's own model, so placement.roles puts both in one pool"
            )
        elif critic is not None:
            models.append(self._placed("critic", critic.engine, "critic.engine"))
        if self.algorithm.needs_reference and self.model.lora is not None and self.model.reference is None:
            of_actor["reference"] = (
                "model.lora: the reference is the actor with its adapters switched off, so placement.roles puts both "
                "in one pool; or name model.reference"
            )
        elif self.algorithm.needs_reference:
            models.append(self._placed("reference", own, "model.reference_engine"))
        if reward is not None:
            models.append(self._placed("reward", reward.engine, "reward.model.engine"))
        return RolesOfRun(tuple(models), of_actor, self.rollout)

    def _placed(self, role: str, own: EngineSection | None, key: str) -> PlacedModel:
        """Returns a model beside the actor, sharded as its own section says, or as the actor is."""
        return PlacedModel(role, self.engine) if own is None else PlacedModel(role, own, key)
