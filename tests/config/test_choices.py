"""A section has the keys of what was chosen, and no others: engines, strategies, judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridflow.checkpoint.run_folder import changed_settings
from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import load_config, validate
from hybridflow.config.pages.explain import explain, explanation_lines
from hybridflow.errors import UserError

BEFORE = Path(__file__).parent / "every_key.yaml"
RL: dict[str, Any] = {
    "run": {"folder": "x"},
    "model": {"path": "m"},
    "data": {"train": "t.jsonl", "max_prompt_tokens": 100},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 6},
}
VLLM_SERVER = {"engine": "vllm", "mode": "server"}


def configured(section: str, keys: Any) -> RlConfig:
    reward = {"function": "judge", "judge": keys} if section == "judge" else {"function": "gsm8k"}
    return validate(RlConfig, RL | {"reward": reward} | ({section: keys} if section != "judge" else {}))


@pytest.mark.parametrize(
    ("section", "keys", "told"),
    [
        ("rollout", {"mode": "server"}, "rollout.mode is for vllm or sglang, and this is inline (rollout.engine): "),
        (
            "rollout",
            {"engine": "vllm", "tensor_parallel": 2},
            "rollout.tensor_parallel is for vllm workers, vllm server or sglang, and this is vllm in_process",
        ),
        ("rollout", {"engine": "sglang", "mode": "workers"}, "is 'workers', it should be 'in_process' or 'server'"),
        ("rollout", {"engine": "vlm"}, "rollout.engine is 'vlm', it should be 'inline', 'vllm' or 'sglang'"),
        ("rollout", {"engine": None}, "rollout.engine is None, it should be 'inline', 'vllm' or 'sglang'"),
        ("rollout", {"engine": "vllm", "replicas": 2}, "rollout.replicas is for vllm server or sglang server"),
        ("rollout", {"engine": "vllm", "top_p": 0.9}, "rollout.top_p is for inline or sglang, and this is vllm"),
        ("rollout", VLLM_SERVER | {"servers": ["node7:8000"]}, "no address of a server, such as http://node7:8000"),
        (
            "rollout",
            VLLM_SERVER | {"servers": ["http://a:1"], "python": "/usr/bin/python3"},
            "rollout.servers names servers that run already",
        ),
        ("rollout", VLLM_SERVER | {"tensor_paralel": 2}, "unknown key; did you mean 'tensor_parallel'?"),
        ("engine", {"strategy": "fsdp1", "compile": True}, "engine.compile is for fsdp2, and this is fsdp1"),
        ("engine", {"strategy": "fsdp1", "cpu_offload": True, "sync_every_microbatch": True}, "FSDP1 loses gradients"),
        ("engine", {"strategy": "ddp"}, "engine.strategy is 'ddp', it should be 'local', 'fsdp2' or 'fsdp1'"),
        ("placement", {"pools": 2}, "placement.pools: it must be a mapping, such as {key: value} (it is 2)"),
        ("filter", True, "filter: it must be a section, such as {key: value} (it is True)"),
        ("judge", {}, "reward.judge.path: missing; or give reward.judge.url instead"),
        ("judge", {"path": "m", "url": "http://h/v1"}, "path is for inline or vllm/sglang, and this is url"),
        ("judge", {"url": "http://h/v1", "engine": "vllm"}, "reward.judge.engine is for inline or vllm/sglang"),
        ("judge", {"path": "m", "model": "x"}, "reward.judge.model is for url, and this is inline"),
        ("judge", {"path": "m", "engine_args": {"a": 1}}, "reward.judge.engine_args is for vllm/sglang"),
        ("judge", {"path": "m", "samples": 2}, "set a temperature"),
    ],
)  # fmt: skip
def test_a_key_of_another_choice_is_refused_with_the_choice_that_has_it(section: str, keys: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(section, keys)
    assert told in caught.value.what and "has 1 mistake" in caught.value.what


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"strategy": ["fsdp2"]}, "critic.engine.strategy is ['fsdp2'], it should be 'local', 'fsdp2' or 'fsdp1'"),
        ({"strategy": {}}, "critic.engine.strategy is {}, it should be"),
        ({"offload": 5}, "critic.engine.offload: input should be a valid list (it is 5)"),
    ],
)
def test_what_no_engine_has_is_told_where_the_rest_is_inherited(own: dict[str, Any], told: str) -> None:
    over = {"engine": {"strategy": "fsdp2"}, "placement": {"pools": {"all": 2}}, "critic": {"engine": own}}
    with pytest.raises(UserError) as caught:
        validate(RlConfig, RL | {"reward": {"function": "gsm8k"}, "algorithm": {"preset": "ppo"}} | over)
    assert told in caught.value.what


def test_all_mistakes_of_a_chosen_section_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        configured("rollout", VLLM_SERVER | {"restarts": -1, "compile": True, "n": 4})
    for told in ("rollout.restarts: ", "rollout.compile is for inline", "rollout.n: unknown key; here it is train."):
        assert told in caught.value.what


def test_a_run_folder_in_which_every_key_was_written_down_goes_on_unchanged(tmp_path: Path) -> None:
    again = load_config(BEFORE)
    written = again.model_dump(mode="json")
    assert again.rollout.engine == "inline" and not {"mode", "replicas", "restarts"} & written["rollout"].keys()
    assert validate(RlConfig, written) == again
    (tmp_path / "config.yaml").write_text(BEFORE.read_text())
    (tmp_path / "metrics.jsonl").write_text("")
    assert changed_settings(tmp_path, written, kind=RlConfig) == {}


def test_what_another_choice_gave_is_refused_by_name_when_the_choice_changes() -> None:
    """One key turns a written configuration to another engine; what was set for the first is not lost in silence."""
    assert load_config(BEFORE, ["rollout.engine=sglang"]).rollout.engine == "sglang"
    with pytest.raises(UserError, match=r"rollout\.compile is for inline, and this is vllm workers"):
        load_config(BEFORE, ["rollout.engine=vllm", "rollout.mode=workers", "rollout.compile=true"])


def test_the_page_and_the_help_say_which_choice_has_a_key(tmp_path: Path) -> None:
    keys = {key.name: key for key in keys_of(RlConfig)}
    assert keys["rollout.replicas"].where == "vllm server or sglang server"
    assert (keys["rollout.temperature"].where, keys["rollout.engine"].where) == ("", "")
    assert keys["rollout.engine"].type == "`inline` or `vllm` or `sglang`"
    assert keys["reward.judge.url"].default == "unset"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RL | {"reward": {"function": "gsm8k"}}))
    inherits = list(explanation_lines(explain("critic.engine.compile"), None))
    assert inherits[1] == "  true or false; default: as engine.compile"
    for key, where in [("rollout.replicas", "vllm server or sglang server"), ("algorithm.tau_positive", "sapo")]:
        lines = list(explanation_lines(explain(key, file), file))
        assert lines[-2:] == [f"  it is for {where} alone", f"  {file} has no use for it"]


def test_a_configuration_is_written_down_with_the_values_of_its_pieces_alone() -> None:
    given = RL | {"reward": {"function": "gsm8k"}, "algorithm": {"preset": "gspo", "policy_loss": "reinforce"}}
    config = validate(RlConfig, given)  # the preset's clips are of no use to this loss
    written = config.model_dump(mode="json")
    assert written["algorithm"]["normalize_by_std"] is True and not {"clip_low", "gamma"} & written["algorithm"].keys()
    assert validate(RlConfig, written) == config
