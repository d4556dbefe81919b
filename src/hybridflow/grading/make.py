"""Makes the grader that the section ``reward`` describes: its parts, and where each runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from inspect import signature

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.rewards import RewardSection, RewardTermSection
from hybridflow.data.prompts import Prompt, PromptSet, truth_key
from hybridflow.data.rows import column
from hybridflow.errors import UserError
from hybridflow.grading.engine_judge import make_judge
from hybridflow.grading.model_grader import check_reward_model, make_reward_model
from hybridflow.groups.failures import FailurePolicy
from hybridflow.placing.places import Places
from hybridflow.protocols.rewards import Answers, Grader, Score
from hybridflow.rewards.graders.composed import ComposedGrader, FunctionGrader, Part
from hybridflow.rewards.graders.function import FIXES, FunctionSpec, name_of
from hybridflow.rewards.graders.given import GivenReward, named
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.graders.remote import RemoteGrader
from hybridflow.rewards.graders.routing import route
from hybridflow.rewards.pool.grader import ProcessGrader
from hybridflow.rewards.verifiable.registry import REWARDS, ROW_CHECKS, builtin, check_row

BY_SOURCE, MODEL, JUDGE = "by_source", "model", "judge"


def data_sources(*sets: PromptSet | None) -> set[str | None]:
    """Returns the ``data_source`` of all rows; None stands for rows without one."""
    return {row.get("data_source") for found in sets if found is not None for row in found.data.rows}


def failure_policy(section: RewardSection) -> FailurePolicy:
    """Returns what happens to responses that the reward fails on."""
    return FailurePolicy(section.on_failure, section.failure_value, FIXES)


def make_grader(
    config: RlConfig | EvalConfig,
    places: Places | None,
    sources: Collection[str | None],
    *,
    function: GivenReward | None = None,
    scoring: bool = True,
) -> Grader:
    """Makes the grader that scores responses, by the configuration.

    Args:
        config: its ``reward`` section, and what models and judges need.
        places: where models are built.
        sources: the data sources that rows have, for ``by_source``.
        function: a function instead of the configured ones, or several that are added up.
        scoring: False reads a reward model's configuration without its weights; the grader can then be checked, but
            cannot score.

    Raises:
        UserError: rows are of an unknown source; a function, model or judge cannot be used.
    """
    if function is not None:
        return _given_grader(function)
    parts = _Parts(config, places, scoring)
    if config.reward.terms is None:
        only = RewardTermSection(function=config.reward.function, kwargs=config.reward.kwargs)
        return parts.grader({None: only}, sources)
    return parts.grader(dict(config.reward.terms), sources)


def _given_grader(given: GivenReward) -> Grader:
    """Returns the grader of a function that a program gives, or of the sum of several, each a component by its name."""
    if not isinstance(given, Sequence):
        whole = InProcessGrader({name_of(given): given})
        return ComposedGrader(lambda answers: [Part(None, whole)], [whole])
    names = named(given)
    grader = InProcessGrader(names)
    parts = [Part(name, grader, name) for name in names]
    return ComposedGrader(lambda answers: parts, [grader])


class _Parts:
    """Collects what the parts of a reward need before any of it is started."""

    def __init__(self, config: RlConfig | EvalConfig, places: Places | None, scoring: bool) -> None:
        self.config, self.places, self.scoring = config, places, scoring
        self.functions: dict[str, FunctionSpec] = {}
        self.others: dict[str, FunctionGrader] = {}

    def grader(
        self, terms: Mapping[None, RewardTermSection] | Mapping[str, RewardTermSection], sources: Collection[str | None]
    ) -> Grader:
        """Makes the grader of these terms."""
        places = {
            (name, source): self._place(term, source)
            for name, term in terms.items()
            for source in (sources if term.function == BY_SOURCE else [None])
        }
        section = self.config.reward.pool
        for place, spec in list(self.functions.items()):
            if "://" in spec.reference:
                self.others[place] = RemoteGrader(spec.reference, section, spec.kwargs)
                del self.functions[place]
        pool: FunctionGrader | None = None
        if self.functions:
            pool = ProcessGrader(self.functions, section) if section.processes else InProcessGrader(self.functions)

        def parts(answers: Answers) -> Iterator[Part]:
            for name, term in terms.items():
                source = answers.row.get("data_source") if term.function == BY_SOURCE else None
                place = places[name, source]
                other = self.others.get(place)
                backend = pool if other is None else other
                assert backend is not None
                function = place if other is None else None
                yield Part(name, backend, function, term.weight, term.normalize == "group", term.clip)

        return ComposedGrader(lambda answers: list(parts(answers)), [*([pool] if pool else []), *self.others.values()])

    def _judge(self) -> FunctionGrader:
        c, note = self.config, None if self.places is None else self.places.events
        assert c.reward.judge is not None, "the section was checked"
        return make_judge(c.reward.judge, c.reward.pool, c.run, c.rollout, note)

    def _place(self, term: RewardTermSection, source: str | None) -> str:
        """Returns the name of the function, or of the other backend, that scores rows of a source for a term."""
        reference = term.function
        if reference == BY_SOURCE:
            reference = route(source, self.config.reward.sources)
        if reference == MODEL and not self.scoring:
            check_reward_model(self.config)
            return reference
        if reference in (MODEL, JUDGE):
            if reference not in self.others:
                model = reference == MODEL
                self.others[reference] = make_reward_model(self.config, self.places) if model else self._judge()
            return reference
        kwargs = dict(term.kwargs)
        if reference == "code":
            kwargs.setdefault("sandbox", self.config.reward.sandbox.model_dump())
        spec, place = FunctionSpec(reference, kwargs), reference
        while self.functions.get(place, spec) != spec:
            place += "'"  # the same function with other arguments
        self.functions[place] = spec
        return place


def check_rows(config: RlConfig | EvalConfig, *sets: PromptSet | None, function: GivenReward | None = None) -> None:
    """Checks that the built-in rewards can score responses to every row.

    Args:
        config: its ``reward`` section.
        sets: the rows.
        function: a function instead of the configured ones, which is not checked.

    Raises:
        UserError: rows have ground truths that the rewards cannot read; names the first row, and how many there are.
    """
    section, terms = config.reward, config.reward.terms
    functions = {section.function} if terms is None else {term.function for term in terms.values()}
    if function is not None:
        return
    for prompts in filter(None, sets):
        _require_truth(prompts, functions, section)
        if not functions & {BY_SOURCE, *ROW_CHECKS}:
            continue
        bad: list[tuple[int, UserError]] = []
        for index, row in enumerate(prompts.data.rows):
            routed = {route(row.get("data_source"), section.sources) if f == BY_SOURCE else f for f in functions}
            for name in routed & ROW_CHECKS.keys():
                key, (source, number) = truth_key(row, prompts.config), prompts.data.place(index)
                assert key is not None, "asked above"
                truth = column(row, key, source=source, index=number)
                try:
                    check_row(name, truth, row)
                except UserError as error:
                    bad.append((index, error))
        if bad:
            (index, first), more = bad[0], f"; of {len(bad)} such rows it is the first" if len(bad) > 1 else ""
            source, number = prompts.data.place(index)
            raise UserError(f"row {number} of {source}: {first.what}{more}", why=first.why, fix=first.fix) from first


def _require_truth(prompts: PromptSet, functions: Collection[str], section: RewardSection) -> None:
    """Refuses built-in rewards that compare with a ground truth where the rows have none."""
    if prompts.config.ground_truth_key is not None:
        return
    sources = {row.get("data_source") for row in prompts.data.rows} if BY_SOURCE in functions else ()
    routed = {*functions, *(route(source, section.sources) for source in sources)}
    truths = {name: signature(builtin(name)).parameters.get("ground_truth") for name in sorted(routed & set(REWARDS))}
    wants = next((name for name, truth in truths.items() if truth is not None and truth.default is truth.empty), None)
    if wants is not None:
        raise UserError(
            f"the reward {wants} compares with a ground truth, and data.ground_truth_key is null",
            fix="name the column that has it, or use a reward of your own (reward.function=file.py:function)",
        )


def first_of_each(prompts: PromptSet, count: int) -> Iterable[Prompt]:
    """Yields the first prompt of every data source, among the first `count` rows."""
    seen = set()
    for i in range(min(count, len(prompts))):
        source = prompts.data.rows[i].get("data_source")
        if source not in seen:
            seen.add(source)
            yield prompts[i]


def require_score(score: Score, section: RewardSection, where: str) -> Score:
    """Returns a score that is not a failure.

    Raises:
        UserError: the reward failed.
    """
    if score.failure is not None:
        raise failure_policy(section).refuse(score.failure, where)
    return score
