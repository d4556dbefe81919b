"""A model is looked at before it is loaded: what is wrong with its folder every command says at once, and alike."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hybridflow.config.sections.model import LoraSection, ModelSection
from hybridflow.errors import UserError
from hybridflow.models.load import load_model, stop_ids
from hybridflow.models.lora import add_lora, load_trainable

from preferences import tokenizer, yaml_of
from runs import configuration, mistake
from tiny import KINDS, SIZES, plain_model

Output = pytest.CaptureFixture[str]
Break = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 thousand parameters, its tokenizer, and a configuration of each command for a copy of it."""
    folder = tmp_path_factory.mktemp("whole")
    config = Qwen3Config(**SIZES | {"vocab_size": 100}, head_dim=8, tie_word_embeddings=False, bos_token_id=None)
    config.eos_token_id, config.pad_token_id = 1, 0
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for command in ("train", "sft", "eval"):
        configuration(folder, command)
    yaml_of(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(whole / "model", tmp_path / "model")
    return tmp_path / "model"


def refusals(capsys: Output, whole: Path, model: Path) -> dict[str, str]:
    """What each command says of the model; none of them starts anything."""
    run = model.parent / "run"
    said = {"generate": mistake(capsys, "generate", model, "1+1=")}
    for kind in ("train", "sft", "reward-model", "eval"):
        for command in ("check", kind):
            config = whole / f"{kind}.yaml"
            said[f"{command} {kind}"] = mistake(capsys, command, config, f"model.path={model}", f"run.folder={run}")
    assert not run.exists()
    return said


def edit(name: str, **changes: object) -> Break:
    """Changes values of a JSON file."""

    def run(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return run


def without(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, part: float) -> Break:
    def run(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return run


def write(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def shards(folder: Path, *, leave_out: int | None = None) -> None:
    """The same weights in three files, one of which may be missing."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for i, file in enumerate(sorted(set(places.values()))):
        if i != leave_out:
            save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def reshape(name: str, *shape: int) -> Break:
    """Another shape of one tensor; without numbers, none of it."""

    def run(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[name]
        save_file(tensors | ({name: torch.zeros(shape)} if shape else {}), folder / WEIGHTS, {"format": "pt"})

    return run


LAYER = "model.layers.1.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (without("config.json"), "no model at"),
    "config cut short": (cut("config.json", 0.5), "config.json is not JSON"),
    "config of another kind": (write("config.json", "[1]"), "holds a JSON list, not an object"),
    "empty config": (write("config.json", "{}"), "cannot be loaded"),
    "unknown family": (edit("config.json", model_type="qwen9", architectures=None), "newer families need a newer"),
    "sizes that do not divide": (edit("config.json", num_key_value_heads=3), "cannot be loaded"),
    "sizes of no kind": (edit("config.json", hidden_size="many"), "cannot be loaded"),
    "no layers' worth": (edit("config.json", num_attention_heads=0), "cannot be loaded"),
    "no weights": (without(WEIGHTS), "it holds no weights (model.safetensors"),
    "empty weights": (cut(WEIGHTS, 0), "model.safetensors (0 bytes) is damaged or was cut short"),
    "weights cut in the header": (cut(WEIGHTS, 0.001), "is damaged or was cut short"),
    "weights cut in the middle": (cut(WEIGHTS, 0.5), "is damaged or was cut short"),
    "weights cut at the end": (cut(WEIGHTS, 0.999), "is damaged or was cut short"),
    "a pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "pointer of Git LFS"),
    "a web page": (write(WEIGHTS, "<html>not found</html>"), "is damaged or was cut short"),
    "an index of absent files": (lambda f: shards(f, leave_out=1), "names 3 files of weights, and 1 are not there"),
    "an index without places": (lambda f: (without(WEIGHTS)(f), write(INDEX, "{}")(f)), "has no weight_map"),
    "a missing tensor": (reshape(LAYER), f"(1): {LAYER}"),
    "a tensor of another shape": (reshape(LAYER, 32, 16), f"{LAYER} is (32, 16) in its weights, and (32, 32)"),
    "more layers than weights": (edit("config.json", num_hidden_layers=3, layer_types=None), "lack tensors of a"),
    "wider than its weights": (edit("config.json", intermediate_size=64), "in its weights, and ("),
    "adapters": (lambda f: (without("config.json")(f), write("adapter_config.json", "{}")(f)), "holds adapters"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer in"),
    "no tokenizer.json": (without("tokenizer.json"), "no tokenizer in"),
    "tokenizer cut short": (cut("tokenizer.json", 0.5), "no tokenizer in"),
    "tokenizer of another kind": (write("tokenizer.json", "{}"), "no tokenizer in"),
    "tokenizer without an end": (edit("tokenizer_config.json", eos_token=None), "has no end-of-sequence token"),
    "vocabulary without merges": (
        lambda f: (without("tokenizer.json", "tokenizer_config.json")(f), write("vocab.json", '{"a": 0, "b": 1}')(f)),
        "`vocab` and `merges`",
    ),
    "smaller than the tokenizer": (
        lambda f: (reshape("model.embed_tokens.weight", 90, 32)(f), reshape("lm_head.weight", 90, 32)(f),
                   edit("config.json", vocab_size=90)(f)),
        "has ids up to 99 ('~'), the model's vocabulary ends at 89",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_every_command_refuses_a_broken_model_in_the_same_words(
    kind: str, whole: Path, model: Path, capsys: Output
) -> None:
    change, expected = BROKEN[kind]
    change(model)
    said = refusals(capsys, whole, model)
    alike = {text.replace("ForSequenceClassification", "ForCausalLM") for text in said.values()}
    assert len(alike) == 1 and expected in alike.pop(), said
    assert all("\n  fix: " in text and "Traceback" not in text for text in said.values())


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_is_the_model_without_its_weights(kind: str, tmp_path: Path) -> None:
    plain_model(kind).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    whole, _ = load_model(str(tmp_path))
    outline, _ = load_model(str(tmp_path), outline=True)
    assert shapes_of(outline) == shapes_of(whole) and type(outline) is type(whole)
    assert {p.device.type for p in outline.parameters()} == {"meta"} and outline.config == whole.config
    tied = [id(m.get_output_embeddings().weight) == id(m.get_input_embeddings().weight) for m in (outline, whole)]
    assert tied[0] == tied[1]


def test_without_accelerate_the_outline_is_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shapes_of(load_model(str(model), outline=True)[0])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    outline, _ = load_model(str(model), outline=True)
    assert shapes_of(outline) == expected and outline.device.type == "meta"
    reshape(LAYER, 3, 3)(model)
    with pytest.raises(UserError, match=r"is \(3, 3\) in its weights"):
        load_model(str(model), outline=True)


def archive(folder: Path, *, new: bool) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    (folder / WEIGHTS).unlink()


def half(folder: Path) -> None:
    save_file({n: t.bfloat16() for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})


def extra(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"rotary.inv_freq": torch.ones(1)}, folder / WEIGHTS, {"format": "pt"})


def tied(folder: Path) -> None:
    edit("config.json", tie_word_embeddings=True)(folder)
    reshape("lm_head.weight")(folder)


RIGHT: dict[str, Break] = {
    "several files": shards,
    "torch's file": lambda folder: archive(folder, new=True),
    "torch's old file": lambda folder: archive(folder, new=False),
    "half precision": half,
    "tied weights, stored once": tied,
    "a tensor more": extra,
    "no generation config": without("generation_config.json"),
    "several ends": edit("generation_config.json", eos_token_id=[1, 7]),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_loads_has_an_outline(kind: str, model: Path) -> None:
    RIGHT[kind](model)
    (loaded, reads), (outline, _) = load_model(str(model)), load_model(str(model), outline=True)
    assert shapes_of(outline) == shapes_of(loaded)
    assert stop_ids(outline, reads) == stop_ids(loaded, reads) == ((1, 7) if kind == "several ends" else (1,))


def test_weights_that_a_hub_has_are_not_asked_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` fetches the small files alone; a part of the weights may be there from an earlier fetch."""
    shards(model, leave_out=1)
    snapshot = tmp_path / "models--somebody--tiny/snapshots/abc"
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outline, _ = load_model("somebody/tiny", outline=True)
    assert outline.device.type == "meta"
    with pytest.raises(UserError, match="names 3 files of weights, and 1 are not there"):
        load_model("somebody/tiny")


# --- adapters ---

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: list[tuple[str | list[str], list[str]]] = [  # what is given, the ends of the paths that are adapted
    ("q_proj", ["q_proj"]),
    (["q_proj"], ["q_proj"]),
    (["q_proj", "down_proj"], ["down_proj", "q_proj"]),
    ("self_attn.q_proj", ["q_proj"]),
    (["layers.1.mlp.up_proj"], ["up_proj"]),
    ("all-linear", sorted([*ATTENTION, "gate_proj", "up_proj", "down_proj"])),
    ("embed_tokens", ["embed_tokens"]),
]


@pytest.mark.parametrize(("given", "expected"), TARGETS)
def test_modules_are_meant_by_the_end_of_their_path(given: str | list[str], expected: list[str]) -> None:
    adapted = add_lora(plain_model("llama"), LoraSection(rank=2, target_modules=given), seed=0)
    paths = {name.rpartition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert sorted({path.rpartition(".")[2] for path in paths}) == expected
    assert len(paths) == (1 if "1" in str(given) or given == "embed_tokens" else 2 * len(expected))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_porj", ["no module of the LlamaForCausalLM is named 'q_porj'", "did you mean 'q_proj'?"]),
        ("q_proj|k_proj", ["is named 'q_proj|k_proj'", "patterns are not read"]),
        (".*q_proj", ["is named '.*q_proj'"]),
        ("proj", ["is named 'proj'"]),
        ("q_proj,v_proj", ["is named 'q_proj,v_proj'", "several are a list"]),
        ("all_linear", ["is named 'all_linear'", "all-linear is every linear layer"]),
        (["q_proj", "c_attn"], ["is named 'c_attn'"]),
        (["all-linear", "lm_head"], ["is named 'all-linear'"]),
        ([], ["does not fit the model"]),
        ("", ["does not fit the model"]),
        ("self_attn", ["does not fit the model", "name linear layers, such as down_proj"]),
        ("norm", ["does not fit the model"]),
    ],
)
def test_modules_that_are_not_there_are_refused(given: str | list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        add_lora(plain_model("llama"), LoraSection(rank=2, target_modules=given), seed=0)
    assert [e for e in expected if e not in str(caught.value)] == [], caught.value


def test_check_says_of_adapters_what_training_says(whole: Path, model: Path, capsys: Output) -> None:
    lora = [f"model.path={model}", "model.lora.target_modules=[q_proj,typo]", f"run.folder={model.parent / 'run'}"]
    said = {
        mistake(capsys, command, whole / f"{kind}.yaml", *lora)
        for kind in ("train", "sft")
        for command in ("check", kind)
    }
    assert len(said) == 1 and "is named 'typo'" in said.pop() and not (model.parent / "run").exists()


@pytest.mark.parametrize(
    ("section", "library", "expected"),
    [
        ({"lora": {"rank": 2}}, "peft", "pip install 'hybridflow[lora]'"),
        ({"liger": True}, "liger_kernel", "pip install 'hybridflow[liger]'"),
    ],
)
def test_an_outline_needs_the_libraries_that_loading_needs(
    section: dict[str, object], library: str, expected: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for outline in (True, False):
        with pytest.raises(UserError) as caught:
            load_trainable(ModelSection.model_validate({"path": str(model), **section}), seed=0, outline=outline)
        assert expected in caught.value.fix
