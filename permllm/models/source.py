"""Dense model from which a pruned model is written, one tensor at a time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from permllm.models.checkpoint import ReadTensor, check_checkpoint, skeleton_like, tensor_reader
from permllm.models.load import dense_folder, folder_identity, generation_of, load_model
from permllm.settings.checkpoints import TOKENIZER_FILES
from permllm.settings.config import ModelConfig


@dataclass(frozen=True)
class DenseSource:
    """Dense model from which a pruned model is made.

    Attributes:
        skeleton: the model on the meta device.
        save_tokenizer: function that writes the tokenizer's files into a folder.
        generation: generation settings of the model.
        identity: as in `LoadedModel`.
        read: function that returns a tensor by its name, on the host, in the model's dtype.
    """

    skeleton: PreTrainedModel
    save_tokenizer: Callable[[Path], Any]
    generation: GenerationConfig
    identity: str
    read: ReadTensor


def dense_source(config: ModelConfig, seed: int) -> DenseSource:
    """Open the dense model that the settings name.

    A checkpoint is read tensor by tensor if its safetensors files have the names of the model's
    state dict. Any other model, such as a random one, is loaded as a whole.

    Raises:
        DataError: the model cannot be downloaded, or its files and its config do not agree.
    """
    folder = dense_folder(config)
    if folder is not None:
        skeleton = check_checkpoint(folder)
        reader = tensor_reader(folder, skeleton)
        if reader is not None:
            dtype = getattr(torch, config.dtype)

            def read(name: str) -> Tensor:
                tensor = reader(name)
                # Copied, because the tensor would keep the file in memory.
                return tensor.to(dtype if tensor.is_floating_point() else None, copy=True)

            save_tokenizer = partial(_copy_tokenizer, folder)
            generation = generation_of(folder)
            identity = folder_identity(config, folder)
            return DenseSource(skeleton, save_tokenizer, generation, identity, read)
    loaded = load_model(replace(config, placement="device", device="cpu"), seed)
    state = loaded.model.state_dict()
    return DenseSource(
        skeleton_like(loaded.model),
        loaded.tokenizer.save_pretrained,
        loaded.model.generation_config or GenerationConfig.from_model_config(loaded.model.config),
        loaded.identity,
        lambda name: state[name].cpu(),
    )


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
