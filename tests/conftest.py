"""Shared pieces: random tiny models of every family, with a byte tokenizer, and a private cache."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import commands
from tests.commands import ROOT, SECONDS

# The command `permllm` of this environment.
COMMAND = Path(sys.executable).with_name("permllm")

if TYPE_CHECKING:  # the process that hands tests out reads this file too, and needs neither
    import torch
    from transformers import PreTrainedModel

WORKER = "PYTEST_XDIST_WORKER" in os.environ
# Before anything is imported that reads them; what a test starts has them too.
os.environ["TQDM_DISABLE"] = "1"  # progress bars would drown the report of a failure
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # there is a worker for each core

_GEMMA: dict[str, object] = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "tie_word_embeddings": True,
}
_TOKENS: dict[str, object] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": {
        "num_key_value_heads": 2,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    "phi3": _TOKENS | {"num_key_value_heads": 2},
    "smollm3": _TOKENS
    | {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "tie_word_embeddings": True},
}


def tiny_config(family: str) -> dict[str, object]:
    """Architecture of a two-layer model with 32 and 64 channels."""
    settings: dict[str, object] = {"model_type": family, "hidden_size": 32, "vocab_size": 259}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    if family != "opt":
        settings["intermediate_size"] = 64
    return settings | FAMILY_SETTINGS[family]


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype | None = None, **architecture: Any
) -> PreTrainedModel:
    """A random model of `tiny_config`, float32 unless said, with biases that are not zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = dtype or torch.float32
    settings = tiny_config(family) | architecture
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Give whole folders as many workers as cores, at most 8; files and what talks none."""
    options = config.option
    quiet = not options.usepdb and options.capture != "no"
    undecided = getattr(options, "numprocesses", 0) is None and not WORKER
    if undecided and quiet and all(map(os.path.isdir, config.args)):
        options.numprocesses, options.dist = min(8, len(os.sched_getaffinity(0))), "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Hand out a file at a time where its tests share something, else a test at a time."""
    if config.option.dist != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid.partition("::")[0]) or nodeid

    return Scheduling(config, log)


@functools.cache
def together(file: str) -> str | None:
    """Return what the tests of a file share a worker for; None where they share nothing."""
    path = ROOT / file
    folder, text = path.with_name("conftest.py"), path.read_text(encoding="utf-8")
    if 'usefixtures("downloads")' in text:
        return "downloads"
    if folder != Path(__file__) and folder.is_file():
        return str(folder)
    return file if re.search(r'scope="(module|session)"', text) else None


@pytest.fixture(autouse=True, scope="session")
def _resolvers() -> None:
    from permllm.settings.composition import register_resolvers

    register_resolvers()


@pytest.fixture(autouse=True, scope="session")
def _fresh_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session alone, but for downloads: kept results would hide a change."""
    from permllm.runtime.files import cache_directory

    downloads, private = cache_directory(), tmp_path_factory.mktemp("cache")
    for name in ("wheels", "models"):
        (downloads / name).mkdir(exist_ok=True)
        (private / name).symlink_to((downloads / name).resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(private))
        yield


@pytest.fixture(autouse=True, scope="session")
def _clean_checkout() -> Iterator[None]:
    """Cache results although the checkout has changes, since it is being worked on."""
    from permllm.store import cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "git_commit", lambda: {"commit": "of a test", "dirty": False})
        yield


@pytest.fixture(autouse=True)
def _broken_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the error of a kernel, instead of a warning and plain code."""
    monkeypatch.setattr("permllm.runtime.compiling.tracebacks_wanted", lambda: True)


@pytest.fixture
def kernels_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warn of a broken kernel and use plain code, as a run does."""
    monkeypatch.setattr("permllm.runtime.compiling.tracebacks_wanted", lambda: False)


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def downloads(_fresh_results: None) -> None:
    """For tests that use what is downloaded: one worker alone may do that."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache directory for this test."""
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_command(
    *overrides: str,
    cwd: Path,
    fresh: bool = False,
    program: Path = ROOT / "run.py",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`python run.py OVERRIDES` as a person would type it, with `cwd` as the working directory.

    Args:
        fresh: in an interpreter of its own, for what is read where something is imported; else in a
            fork (`tests.commands`).
        program: another script than `run.py`.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    variables |= {"PERMLLM_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"} | environment
    return run_python(str(program), *overrides, cwd=cwd, environment=variables, fresh=fresh)


def run_python(
    *words: str,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`python WORDS`: a script, a module after `-m`, or `permllm` after `-m permllm`."""
    if words[:2] == ("-m", "permllm"):
        words = (str(COMMAND), *words[2:])
    cwd, environment = cwd or Path.cwd(), environment or dict(os.environ)
    if not fresh:
        return commands.command(list(words), cwd, environment)
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
