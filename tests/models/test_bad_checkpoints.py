"""Checkpoints that are not what their config says are refused before anything is computed, in one line that names what."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from permllm.config import ModelConfig
from permllm.errors import ConfigError, DataError
from permllm.export import bench
from permllm.export.verify import logits_difference
from permllm.models.checkpoint import transformers_reads
from permllm.models.families import channel_groups
from permllm.models.load import load_model, meta_model
from tests.conftest import tiny_config, tiny_model

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
UP, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
# What other files than config.json and safetensors may hold instead of what they should.
GARBAGE = ["", "[]", "{", "[" * 9999]


def poisoned(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


BROKEN: dict[str, tuple[Change, str]] = {
    "a linear is missing": (lambda tensors, config: tensors.pop(UP), f"lacks {UP}"),
    "the head is missing": (lambda tensors, config: tensors.pop(HEAD), f"lacks {HEAD}"),
    "a stranger": (
        lambda tensors, config: tensors.update({"x.weight": torch.zeros(2, 2)}),
        "asks for none, x.weight",
    ),
    "another shape": (
        lambda tensors, config: tensors.update({UP: torch.zeros(60, 32)}),
        f"another shape .* {UP}",
    ),
    "fewer layers": (
        lambda tensors, config: config.update(num_hidden_layers=1),
        r"asks for none, model\.layers\.1\..* 6 more",
    ),
    "whole numbers": (
        lambda tensors, config: tensors.update({UP: tensors[UP].to(torch.int8)}),
        f"{UP} as I8: .*quantised",
    ),
    "quantised": (
        lambda tensors, config: config.update(quantization_config={"quant_method": "x"}),
        "quantization_config",
    ),
    "NaN in a norm": (poisoned(NORM, float("nan")), f"{NORM} holds values that are not finite"),
    "a size that is text": (lambda tensors, config: config.update(hidden_size="x"), "hidden_size"),
    "more layers than can be built": (
        lambda tensors, config: config.update(num_hidden_layers=10**9),
        "num_hidden_layers",
    ),
    "no dtype": (lambda tensors, config: config.update(dtype="nope"), "nope"),
    "a norm that is text": (
        lambda tensors, config: config.update(rms_norm_eps="x"),
        "transformers cannot load",
    ),
    "a norm that makes NaN": (
        lambda tensors, config: config.update(rms_norm_eps=-1e30),
        "logits are not finite",
    ),
    "a kernel of the hub": (
        lambda tensors, config: config.update(attn_implementation="a/b"),
        "attn_implementation",
    ),
    "another kernel of the hub": (
        lambda tensors, config: config.update(_attn_implementation="a/b"),
        "attn_implementation",
    ),
    "weights elsewhere": (
        lambda tensors, config: config.update(transformers_weights="../x.safetensors"),
        "transformers_weights",
    ),
    "no type": (lambda tensors, config: config.pop("model_type"), "model_type"),
    "fewer tokens than the tokenizer's": (
        lambda tensors, config: (
            config.update(vocab_size=200),
            tensors.update({name: tensors[name][:200].contiguous() for name in (HEAD, EMBEDDING)}),
        ),
        "its tokenizer has tokens up to 258, and the model knows 200",
    ),
    "no activation": (lambda tensors, config: config.update(hidden_act="nope"), "nope"),
}


def checkpoint(folder: Path, change: Change) -> ModelConfig:
    tiny_model("llama").save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return local(folder)


def local(folder: Path) -> ModelConfig:
    return ModelConfig(name="local", source="local", path=str(folder), device="cpu")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    config = checkpoint(tmp_path, change)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load_model(config, seed=0)
    assert "\n" not in str(caught.value)


def test_what_transformers_leaves_aside_is_no_stranger(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert (
        load_model(checkpoint(tmp_path, lambda tensors, config: tensors.update(old)), seed=0).model
        is not None
    )


def test_a_gpu_that_is_too_small_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), transformers_reads(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("known", [True, False], ids=["a known type", "a type of its own"])
def test_no_code_of_a_checkpoint_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    names = {
        "AutoConfig": "code.Mine",
        "AutoModelForCausalLM": "code.Mine",
        "AutoTokenizer": ["code.Mine", None],
    }
    more = {"auto_map": names} | ({} if known else {"model_type": "mine"})
    config = checkpoint(folder, lambda tensors, config: config.update(more))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": names}))
    monkeypatch.setattr(
        "builtins.input", lambda *_: "y"
    )  # what a person in a hurry answers, where they are asked
    for read in (
        lambda: load_model(config, seed=0),
        lambda: logits_difference(folder, folder),
        lambda: bench.load(folder, torch.device("cpu"), None),
    ):
        with nullcontext() if known else pytest.raises(DataError, match="transformers cannot load"):
            read()
    assert not marker.exists()


class Code:
    """What runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def pickled(folder: Path, state: object) -> ModelConfig:
    """A checkpoint with a pytorch_model.bin that is as given, and no safetensors file."""
    config = checkpoint(folder, lambda *_: None)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return config


def test_pickled_weights_are_read_and_examined_but_never_unpickled(tmp_path: Path) -> None:
    whole = dict(tiny_model("llama").state_dict())
    loaded = load_model(pickled(tmp_path / "whole", whole), seed=0).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    marker = tmp_path / "ran"
    broken: dict[str, tuple[object, str]] = {
        "code": (Code(marker), "transformers cannot load"),
        "more": (whole | {"x": Code(marker)}, "transformers cannot load"),
        "text": (whole | {UP: "x"}, "transformers cannot load"),
        "less": ({name: tensor for name, tensor in whole.items() if name != UP}, f"lacks {UP}"),
        "bytes": (whole | {UP: whole[UP].to(torch.int8)}, f"{UP} as torch.int8: .*quantised"),
        "nan": (
            whole | {NORM: torch.full((32,), float("nan"))},
            f"{NORM} holds values that are not finite",
        ),
    }
    for name, (state, message) in broken.items():
        with pytest.raises(DataError, match=message) as refused:
            load_model(pickled(tmp_path / name, state), seed=0)
        assert "\n" not in str(refused.value)
    for content in GARBAGE:
        (tmp_path / "whole" / "pytorch_model.bin").write_text(content)
        with pytest.raises(DataError, match="transformers cannot load"):
            load_model(local(tmp_path / "whole"), seed=0)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a" / "model"
    config = checkpoint(folder, lambda *_: None)
    (folder / "model.safetensors").rename(tmp_path / "a" / "outside")
    contents = [
        json.dumps({"weight_map": {UP: name}})
        for name in ("../outside", str(tmp_path / "a" / "outside"), "no")
    ]
    for content in [*contents, "{}", *GARBAGE]:
        (folder / f"{kind}.index.json").write_text(content)
        with pytest.raises(DataError, match="index") as refused:
            load_model(config, seed=0)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"]
)
def test_garbage_beside_the_weights_is_one_line(tmp_path: Path, name: str) -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    config = checkpoint(tmp_path, lambda *_: None)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert load_model(config, seed=0).tokenizer("a").input_ids == [0]
    for content in GARBAGE:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as refused:
            load_model(config, seed=0)
        assert "\n" not in str(refused.value)


def test_names_of_an_older_layout_are_no_way_around(tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    # As OPT's files on the hub have them.
    tensors = {
        name.removeprefix("model."): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(local(tmp_path), seed=0).model is not None
    name = "decoder.layers.0.fc1.weight"
    save_file(
        tensors | {name: tensors[name].to(torch.int8)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(DataError, match=f"{name} as I8"):
        load_model(local(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 3}, "transformers cannot load tiny"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "not finite|transformers cannot load"),
    ],
    ids=str,
)
def test_a_random_model_that_cannot_work_is_refused_too(
    sizes: dict[str, Any], message: str
) -> None:
    architecture = tiny_config("llama") | sizes
    with pytest.raises(DataError, match=message) as refused:
        load_model(
            ModelConfig(name="tiny", source="random", device="cpu", architecture=architecture),
            seed=0,
        )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["intermediate_size", "num_hidden_layers"])
def test_a_model_with_nothing_to_prune_is_refused(key: str) -> None:
    architecture = tiny_config("llama") | {key: 0}
    config = ModelConfig(name="tiny", source="random", device="cpu", architecture=architecture)
    with pytest.raises(ConfigError, match="nothing to prune"):
        channel_groups(meta_model(config))


_KEYS = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *(
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_theta",
        "hidden_act",
        "dtype",
    ),
    *(
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "pad_token_id",
        "eos_token_id",
        "use_cache",
        "model_type",
    ),
    *(
        "architectures",
        "initializer_range",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "num_labels",
    ),
    *(
        "is_decoder",
        "attn_implementation",
        "quantization_config",
        "layer_types",
        "sliding_window",
        "transformers_version",
    ),
    *(
        "auto_map",
        "gathers",
        "dense_config",
        "sub_configs",
        "chunk_size_feed_forward",
        "pretraining_tp",
    ),
)
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 4, 7, 8, 32, 64, 259, 2**31, 10**30]),
    st.floats(),
    st.sampled_from(["", "x", "../x", "32", "llama", "float16", "float64", "gelu"]),
    st.sampled_from(
        [
            [],
            [1],
            ["x"],
            {},
            {"type": "x"},
            {"rope_type": "linear", "factor": 0.0},
            {"rope_type": "yarn"},
        ]
    ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint(folder, lambda *_: None)
    return folder


def loads_as_it_is_or_not_at_all(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A model has the parameters that its file holds, or it is refused in one line; any other error fails the test."""
    try:
        model = load_model(local(folder), seed=0).model
    except (ConfigError, DataError) as error:
        lines = str(error).splitlines()
    else:
        lines = ["loaded"]
        parameters = dict(model.named_parameters())
        assert parameters.keys() == tensors.keys()
        assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())
    assert len(lines) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=2))
def test_whatever_a_config_says_a_model_is_what_its_file_holds(
    whole: Path, changes: dict[str, Any]
) -> None:
    file, tensors = whole / "config.json", dict(tiny_model("llama").named_parameters())
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    try:
        loads_as_it_is_or_not_at_all(whole, tensors)
    finally:
        file.write_text(before)


_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "I32", "I8", "F8_E4M3", "BOOL", "x", "", 1, None]
        ),
        "shape": st.one_of(st.lists(st.integers(-1, 64), max_size=3), st.just("x"), st.none()),
        "data_offsets": st.one_of(
            st.lists(st.integers(-1, 2**40), max_size=3), st.just("x"), st.none()
        ),
    },
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([UP, HEAD, NORM, EMBEDDING]),
    entry=st.one_of(_ENTRIES, st.none(), st.just([])),
    other=st.sampled_from([None, UP, "x", "__metadata__"]),
)
def test_whatever_a_header_says_a_model_is_what_its_file_holds(
    whole: Path, name: str, entry: Any, other: str | None
) -> None:
    file = whole / "model.safetensors"
    before, tensors = file.read_bytes(), dict(tiny_model("llama").named_parameters())
    length = int.from_bytes(before[:8], "little")
    header = json.loads(before[8 : 8 + length])
    changed = header.pop(name)
    header[name if other is None else other] = changed | entry if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + before[8 + length :])
    try:
        loads_as_it_is_or_not_at_all(whole, tensors)
    finally:
        file.write_bytes(before)
