"""Chooses the built-in reward for a row by the name of its data set (its column ``data_source``).

The names and their meaning are those that verl's data scripts write. Two lead to other rewards than in verl, see
docs/rewards.md: sets of competition problems whose answers are expressions go to `math`, not to a grader of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from hybridflow.errors import UserError, nearest

SOURCES: dict[str, str] = {
    "openai/gsm8k": "gsm8k",
    "gsm8k": "gsm8k",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "EleutherAI/hendrycks_math": "math",
    "math": "math_dapo",
    "math_dapo": "math_dapo",
    "math_dapo_reasoning": "math_dapo",
    "numina_aops_forum": "math",
    "numina_synthetic_math": "math",
    "numina_amc_aime": "math",
    "numina_synthetic_amc": "math",
    "numina_cn_k12": "math",
    "numina_olympiads": "math",
    "hiyouga/geometry3k": "geo3k",
    "countdown": "countdown",
    "searchR1_nq": "qa_em",
    "searchR1_triviaqa": "qa_em",
    "searchR1_popqa": "qa_em",
    "searchR1_hotpotqa": "qa_em",
    "searchR1_2wikimultihopqa": "qa_em",
    "searchR1_musique": "qa_em",
    "searchR1_bamboogle": "qa_em",
    "gpqa": "multiple_choice",
    "Idavidrein/gpqa": "multiple_choice",
    "mmlu": "multiple_choice",
    "cais/mmlu": "multiple_choice",
    "allenai/ai2_arc": "multiple_choice",
    "apps": "code",
    "codecontests": "code",
    "codeforces": "code",
    "taco": "code",
}

# Sources by how their names begin: AIME comes by year (aime2024, aime25, ...).
PREFIXES: dict[str, str] = {"aime": "math_dapo"}


def route(data_source: str | None, extra: Mapping[str, str]) -> str:
    """Returns the name of the reward for rows of a source; names in `extra` (``reward.sources``) take precedence.

    >>> route("openai/gsm8k", {}), route("aime2025", {}), route("mine", {"mine": "score.py:score"})
    ('gsm8k', 'math_dapo', 'score.py:score')

    Raises:
        UserError: the rows have no source, or one that is not known.
    """
    if data_source is None:
        raise UserError(
            "rows have no data_source, and reward.function is by_source",
            why="nothing says how their responses are scored",
            fix="name the reward (reward.function=gsm8k, or file.py:function), or give the rows a column data_source",
        )
    if data_source in extra:
        return extra[data_source]
    if data_source in SOURCES:
        return SOURCES[data_source]
    for prefix, name in PREFIXES.items():
        if data_source.startswith(prefix):
            return name
    raise UserError(
        f"no reward is known for data_source {data_source!r}; {nearest(data_source, [*SOURCES, *extra])}",
        why="a row that cannot be scored cannot be trained on",
        fix=f"say which one: reward.sources='{{{data_source}: NAME}}', a built-in reward or file.py:function; or "
        "score all rows with one, as reward.function",
    )
