"""The Python API: a model in memory is pruned, measured and written as the command does it."""

from __future__ import annotations

import copy
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch.nn.utils import parametrizations
from transformers import ByT5Tokenizer, PreTrainedModel

import permllm
from permllm.data.texts import TEXTS
from permllm.errors import ConfigError, DataError
from permllm.export.verify import verify
from permllm.job import run
from permllm.models.families import linear_at
from permllm.store.files import read_lines
from permllm.store.tensors import load_masks, load_permutations
from tests.conftest import ROOT, tiny_model
from tests.settings.test_config import config

TEXT = (ROOT / "permllm" / "data" / "builtin.txt").read_text(encoding="utf-8")
FEW = {"calibration__samples": 8, "calibration__seqlen": 16}
SMALL = FEW | {"permutation__epochs": 1, "block_size": 16}
WINDOWS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
FOLDABLE = {"permutation": "heuristic", "permutation__constraint": "foldable"}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, bos_token="<unk>")


def test_the_files_of_a_model_in_memory_are_not_read(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    loaded = permllm.load(tmp_path)
    monkeypatch.setattr("permllm.settings.identity.input_sha256", pytest.fail)
    words = {"permutation__block_size": 16, "budget__steps": 2}
    permllm.prune(loaded, None, texts=WINDOWS, **words)


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        FEW | FOLDABLE | {"pruner": "ria"},
        FEW | FOLDABLE | {"keep_dense": [0]},
        FEW | {"pruner": "sparsegpt", "permutation": "none", "sparsity": "4:8", "model__bos": True},
        FEW | {"method": "masks", "mask__learning_rate": 0.1, "seed": 3},
    ],
    ids=["lcp", "foldable", "parts", "sparsegpt", "method"],
)
def test_it_finds_what_the_command_finds(
    settings: dict[str, Any], model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    pairs = [f"{key}={value}" for key, value in settings.items()]
    words = [pair.replace("__", ".").replace("'", "") for pair in pairs]
    words += ["model=local", f"model.path={tmp_path / 'dense'}", "model.dtype=float32"]
    words += ["calibration=text", f"calibration.data_files={tmp_path / 'text.txt'}", "logger=none"]
    words += ["evaluation=builtin", f"run_dir={tmp_path / 'run'}"]
    result = run(config(*words))
    assert result is not None
    metrics = result.metrics

    found = permllm.prune(model, tokenizer, texts=[TEXT], **settings)

    orders = load_permutations(tmp_path / "run" / "permutations.safetensors")
    assert orders.keys() == found.permutations.keys()
    assert all(torch.equal(order, found.permutations[name]) for name, order in orders.items())
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    assert all(torch.equal(masks[path], mask) for path, mask in found.masks.items())
    for key in ("sparsity", "retained_saliency", "output_error", "moved_channels", "compute_dtype"):
        assert found.report[key] == metrics[key]
    if "keep_dense" in settings:
        assert found.report["sparsity"]["patterns"][DOWN] == "dense"
    assert len(found.report["history"]) == len(read_lines(tmp_path / "run" / "history.jsonl"))
    for path, mask in found.masks.items():
        assert not linear_at(model, path).weight[~mask].any()
    (row,) = permllm.results(tmp_path / "run").to_dict("records")
    assert row["seed"] == settings.get("seed", 0)
    assert row["directory"] == str(tmp_path / "run")


def test_texts_may_be_tokens_or_a_name(model: PreTrainedModel, tokenizer: ByT5Tokenizer) -> None:
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    first = permllm.prune(one, None, texts=WINDOWS, permutation="none")
    second = permllm.prune(other, tokenizer, texts=WINDOWS, permutation="none")
    assert all(torch.equal(mask, second.masks[path]) for path, mask in first.masks.items())
    alone = permllm.prune(tiny_model("llama"), None, texts=WINDOWS[:1], permutation="heuristic")
    first_of_both = permllm.prune(
        tiny_model("llama"), None, texts=WINDOWS, permutation="heuristic", calibration__samples=1
    )
    assert first_of_both.report["retained_saliency"] == alone.report["retained_saliency"]
    samples = {"permutation": "none", "calibration__samples": 2}
    named = permllm.prune(model, tokenizer, texts="builtin", **samples)
    assert named.report["sparsity"]["fraction"] == 0.5


def test_all_else_is_left_as_it_was(model: PreTrainedModel, tokenizer: ByT5Tokenizer) -> None:
    model.train().requires_grad_(True)
    model.model.layers[0].eval()
    left = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = left[name]
    own = model.model.layers[1].forward
    model.model.layers[1].forward = patched = partial(own)

    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(1))

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = drawn()
    seeded()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        with pytest.raises(DataError, match="calibration"):
            permllm.prune(model, tokenizer, texts=["short"])
        permllm.prune(model, tokenizer, texts=[TEXT], **SMALL)
        assert GlobalHydra.instance().hydra is theirs
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    assert drawn() == expected
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is left[name]
        assert bool((left[name] == 1).all())
    assert model.model.layers[1].forward is patched


def test_how_the_caller_has_left_gradients_changes_nothing(tokenizer: ByT5Tokenizer) -> None:
    """Switched off, left from training, or with checkpointing, which asks for those of inputs."""
    found = []
    for kind in ("plain", "left", "checkpointing"):
        model = tiny_model("llama")
        if kind == "left":
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 3.0)
        if kind == "checkpointing":
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.config.return_dict = False
        with torch.inference_mode(kind == "left"):
            learned = {"reconstruction": "distill"} | SMALL
            orders = permllm.prune(model, tokenizer, texts=[TEXT], **learned).permutations
        found.append(dict(model.state_dict()) | orders)
        assert model.is_gradient_checkpointing == (kind == "checkpointing")
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("form", ["folded", "gathered", None])
def test_what_is_saved_computes_what_the_model_computes(
    form: str | None, model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    constraint = FOLDABLE if form == "folded" else {"permutation": "heuristic"}
    permllm.prune(model, tokenizer, texts=[TEXT], **FEW, **constraint)
    summary = permllm.save(model, tmp_path / "out", form=form)
    assert summary["form"] == (form or "gathered")
    assert verify(tmp_path / "out")["passed"]
    opened = permllm.load(tmp_path / "out", attn_implementation="eager")
    assert opened.config._attn_implementation == "eager"
    with torch.no_grad():
        ours, theirs = opened(WINDOWS).logits, model(WINDOWS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if form != "folded":
        with pytest.raises(ConfigError, match="foldable"):
            permllm.save(model, tmp_path / "never", form="folded")
        with pytest.raises(ConfigError, match="gathered"):
            permllm.prune(opened, tokenizer, texts=[TEXT], **FEW)
    assert not (tmp_path / "never").exists()


def test_a_checkpoint_holds_what_the_model_is_now(tokenizer: ByT5Tokenizer, tmp_path: Path) -> None:
    """Trained afterwards, under the masks and in its dtype; its own head although the config ties
    it; neither GGUF nor code of others, of which it was made."""
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(2 * model.model.embed_tokens.weight.flip(0))
    _, masks, _ = permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    model.float()
    path = next(iter(masks))
    weight = linear_at(model, path).weight
    weight.data += 2**-12
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config.auto_map = {"AutoConfig": "configuration_x.XConfig"}
    assert permllm.save(model, tmp_path / "out")["dtype"] == "float32"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & written.keys()
    assert model.config.auto_map
    saved = permllm.load(tmp_path / "out")
    half = permllm.load(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(linear_at(saved, path).weight, torch.where(masks[path], weight, 0.0))
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    model.model.embed_tokens.bfloat16()
    with pytest.raises(ConfigError, match=r"^dtype: "):
        permllm.save(model, tmp_path / "never")
    assert permllm.save(model, tmp_path / "float32", dtype="float32")["dtype"] == "float32"


def half_pruned(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise DataError("no second layer")

    model.load_state_dict(tiny_model("llama").state_dict())  # dense again
    monkeypatch.setattr("permllm.job.record_pruning", broken)
    with pytest.raises(DataError, match="no second layer"):
        permllm.prune(model, None, texts=WINDOWS, permutation="heuristic")


def with_another_bias(model: PreTrainedModel, _: object) -> None:
    model.get_submodule(DOWN).bias = torch.nn.Parameter(torch.ones(32))


def with_odd_generation(model: PreTrainedModel, _: object) -> None:
    assert model.generation_config is not None
    model.generation_config.temperature = 0.5


@pytest.mark.parametrize("change", [half_pruned, with_another_bias, with_odd_generation])
def test_what_no_checkpoint_can_hold_is_refused(
    change: Any, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"permllm\.prune has pruned"):
        permllm.save(model, tmp_path / "out")
    permllm.prune(model, None, texts=WINDOWS, permutation="none")
    with pytest.raises(ConfigError, match=r"export\.form='flat'"):
        permllm.save(model, tmp_path / "out", form="flat")
    change(model, monkeypatch)
    with pytest.raises(ConfigError):
        permllm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DISTILL = {"reconstruction": "distill", "reconstruction__samples": 3}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"pruner": "wandaa"}, "pruner/wandaa"),
        ({"permutation__epoch": 3}, "permutation.epoch: "),
        ({"sede": 1}, "sede is"),
        ({"model__dtype": "float16"}, "model.dtype: "),
        ({"export": "folded"}, "export: "),
        ({"permutation": "heuristic", "budget__steps": 3}, "budget.steps: "),
        ({"texts": torch.zeros(3)}, "texts: "),
        ({"texts": WINDOWS - 100}, "texts: "),
        ({"texts": WINDOWS} | DISTILL, "texts: got 2 windows of tokens, expected 3"),
        ({"texts": WINDOWS, "calibration__seqlen": 7}, "calibration.seqlen: "),
        ({"texts": "nowhere"}, "calibration/nowhere"),
        ({"calibration__data_files": "nowhere.txt"}, "calibration.data_files: "),
        ({"texts": [1, 2]}, "texts: "),
        ({"tokenizer": None}, "tokenizer: "),
    ],
)
def test_bad_settings_are_one_line(
    settings: dict[str, Any], key: str, model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"^[^\n]*{re.escape(key)}[^\n]*$"):
        permllm.prune(model, **({"tokenizer": tokenizer, "texts": [TEXT]} | settings))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tokens_outside_of_the_vocabulary_are_one_line(model: PreTrainedModel) -> None:
    with pytest.raises(DataError, match=r"^texts[^\n]*$"):
        permllm.prune(model, None, texts=WINDOWS + 300, permutation="none")


def weight_norm(model: PreTrainedModel) -> PreTrainedModel:
    parametrizations.weight_norm(linear_at(model, DOWN))
    return model


def own_forward(model: PreTrainedModel) -> PreTrainedModel:
    linear = linear_at(model, DOWN)
    linear.forward = partial(torch.nn.functional.linear, weight=2 * linear.weight)  # type: ignore[method-assign]
    return model


def test_a_model_that_looks_pruned_gets_a_warning(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    permllm.prune(model, None, texts=WINDOWS, permutation="heuristic", sparsity="4:8")
    assert "zeros" not in caplog.text
    permllm.prune(model, None, texts=WINDOWS, permutation="none")
    assert "as many zeros as after pruning" in caplog.text


@pytest.mark.parametrize("change", [weight_norm, own_forward, lambda model: model.model])
def test_no_model_to_prune_is_refused(change: Any, model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"Linear|LlamaModel"):
        permllm.prune(change(model), None, texts=WINDOWS, permutation="none")


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_that_of_the_formula(bos: bool, tokenizer: ByT5Tokenizer) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    documents = [TEXT[:200], TEXT[200:500]]
    tokens = tokenizer("\n\n".join(documents), add_special_tokens=not bos)["input_ids"]
    piece = 32 - bos
    windows = torch.tensor(tokens)[: 5 * piece].view(5, piece)
    if bos:
        first = torch.full((5, 1), tokenizer.bos_token_id)
        windows = torch.cat([first, windows], dim=1)
    with torch.no_grad():
        logs = model(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
    expected = pytest.approx(float(logs.mean().neg().exp()), rel=1e-6)  # logarithms in float32
    how: dict[str, Any] = {"seqlen": 32, "limit": 5, "bos": bos, "batch_tokens": 64}
    assert permllm.perplexity(model, tokenizer, documents, **how) == expected
    assert permllm.perplexity(model, None, windows) == expected


def test_a_dtype_that_is_slow_here_gets_a_line(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    exact = permllm.perplexity(model, None, WINDOWS)
    assert not caplog.text
    assert permllm.perplexity(model.half(), None, WINDOWS) == pytest.approx(exact, rel=0.01)
    assert "this CPU is slow in float16; model.float() is faster" in caplog.text


def test_what_perplexity_cannot_be_measured_on_is_one_line(
    cache: Path, model: PreTrainedModel, tokenizer: ByT5Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert permllm.perplexity(model, tokenizer, "builtin", seqlen=64) > 1
    cases: list[Any] = [
        ([TEXT], {"seqlen": 1}, ConfigError, "seqlen=1"),
        ([], {}, ConfigError, "texts: "),
        (WINDOWS[:, :1], {}, ConfigError, "texts: "),
        ("poem", {}, ConfigError, "dataset='poem'"),
        (["short"], {}, DataError, "fewer than one"),
        (["<new>" * 400], {"seqlen": 16}, DataError, "token 259"),
    ]
    tokenizer.add_tokens(["<new>"])
    for texts, settings, kind, named in cases:
        with pytest.raises(kind, match=named):
            permllm.perplexity(model, tokenizer, texts, **settings)
    model.config.max_position_embeddings = 8
    permllm.perplexity(model, None, WINDOWS)
    assert "windows of 16 tokens, but the model has 8 positions" in caplog.text


@pytest.mark.parametrize("document", ["README.md", "docs/checkpoints.md"])
def test_the_lines_of_the_documents_work(
    document: str, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(import permllm\n.*?)```", text, re.DOTALL)
    monkeypatch.setattr(permllm, "prune", partial(permllm.prune, **FEW), raising=False)
    monkeypatch.chdir(tmp_path)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model.save_pretrained("smollm2-135m")  # a folder precedes an option of the same name
    tokenizer.save_pretrained("smollm2-135m")
    monkeypatch.setitem(TEXTS, "boolq-passages", TEXTS["builtin"])
    found: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "documents": [TEXT]}
    exec(lines, found)
    assert found["report"]["sparsity"]["violations"] == 0
    assert found["permutations"].keys() == found["report"]["retained_saliency"].keys()
    assert verify(tmp_path / "my-model")["passed"]
