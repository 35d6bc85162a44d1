"""The tensors of a dense model, one at a time, without building the model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from permllm.config import ModelConfig
from permllm.errors import ConfigError
from permllm.models.checkpoint import (
    check_checkpoint,
    parameter_names,
    tensor_places,
    untied,
    weight_files,
)
from permllm.models.load import dense_folder, folder_identity, generation_of, load_model, meta_model
from permllm.runs.tensors import load_tensor

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


class TensorReader(Protocol):
    """Reads one tensor of the model's state dict by its name."""

    def __call__(self, name: str) -> Tensor:
        """The tensor, on the host, in the dtype of the file."""


@dataclass(frozen=True)
class DenseSource:
    """A dense model from which a pruned one is made.

    Attributes:
        skeleton: the model on the meta device.
        save_tokenizer: writes what belongs to the tokenizer into a folder, as it is.
        generation: its generation settings.
        identity: as in `LoadedModel`.
        read: one tensor at a time.
    """

    skeleton: PreTrainedModel
    save_tokenizer: Callable[[Path], Any]
    generation: GenerationConfig
    identity: str
    read: TensorReader


def dense_source(config: ModelConfig, seed: int) -> DenseSource:
    """Open the dense model that the settings name.

    A checkpoint whose safetensors files hold the tensors under the names of the model's own state
    dict is read tensor by tensor; any other (and a random model) is loaded as a whole.

    Raises:
        DataError: it cannot be had, or its files hold another model than its config says.
    """
    folder = dense_folder(config)
    if folder is not None:
        skeleton = meta_model(config, folder)
        read = _files(folder, skeleton)
        if read is not None:
            copied = partial(_copy_tokenizer, folder)
            return DenseSource(
                skeleton,
                copied,
                generation_of(skeleton, folder),
                folder_identity(config, folder),
                read,
            )
    loaded = load_model(
        replace(config, placement="device", device="cpu"), seed
    )  # whose weights are all there to be read
    skeleton, state = skeleton_like(loaded.model), loaded.model.state_dict()
    generation = loaded.model.generation_config
    assert generation is not None
    save = loaded.tokenizer.save_pretrained
    return DenseSource(skeleton, save, generation, loaded.identity, lambda name: state[name].cpu())


def skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the meta device, as its config makes it but for a head of its own where it has one.

    Raises:
        ConfigError: it has a tensor that its config does not make, or lacks one.
    """
    config, state = copy.deepcopy(model.config), model.state_dict()
    # Weights that `from_pretrained(gguf_file=...)` has unpacked keep what they were packed by.
    vars(config).pop("quantization_config", None)
    skeleton = _from_config(config, model.dtype)
    if untied(skeleton, state, state.__getitem__):
        # The config says that the head is the embedding, and transformers took the files' word, or
        # somebody changed one.
        config.tie_word_embeddings = False
        skeleton = _from_config(config, model.dtype)
    if strange := next(
        (name for name, value in state.items() if not isinstance(value, Tensor)), None
    ):
        raise ConfigError(
            f"the model is not what its config makes: {strange} is no tensor, so that no checkpoint can hold it"
        )
    made = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    there = {name: tensor.shape for name, tensor in state.items()}
    other = next(
        (name for name in sorted(made.keys() | there.keys()) if made.get(name) != there.get(name)),
        None,
    )
    if other is not None:
        sizes = " and ".join(
            str(tuple(found[other])) if other in found else "none" for found in (there, made)
        )
        raise ConfigError(
            f"the model is not what its config makes: {other} is {sizes}, so that no checkpoint can hold it"
        )
    return skeleton


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return skeleton


def _files(folder: Path, skeleton: PreTrainedModel) -> TensorReader | None:
    """None where the files do not hold the tensors of the model under its names."""
    check_checkpoint(folder)
    files = weight_files(folder)
    where = tensor_places(files) if files[0].suffix == ".safetensors" else {}
    if not set(parameter_names(skeleton)) <= where.keys():
        return None

    def read(name: str) -> Tensor:
        return load_tensor(where[name][0], name)

    return None if untied(skeleton, where, read) else read


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in (
        file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()
    ):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
