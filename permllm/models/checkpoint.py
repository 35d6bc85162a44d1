"""Reader of third-party checkpoints, which are checked by transformers' loading report.

transformers fills a tensor that is missing or has another shape with random values. It casts
integers to floats without their scales. It says so only in its loading report.
"""

import copy
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from permllm.errors import ConfigError, DataError, PermLLMError, printable
from permllm.models.offload import ReadTensor
from permllm.settings.checkpoints import weight_files
from permllm.store.files import MASKS, read_json
from permllm.store.tensors import load_tensor, tensor_formats

# Keys of config.json that no checkpoint may have, and why.
_REFUSALS = {
    "quantization_config": "quantised models cannot be pruned",
    "transformers_weights": "its weights must lie in the files that transformers looks for",
}
# Dtypes of weights, as safetensors calls them.
_FLOATING = ("F64", "F32", "F16", "BF16")
# Parts of transformers' loading report, and the verb of an error about them.
_REPORT = {
    "missing_keys": "lacks",
    "mismatched_keys": "has in another shape than its config asks for",
    "unexpected_keys": "has, although its config asks for none,",
}
# Largest difference of logits that counts as rounding, as a share of the largest logit.
_ROUNDING = 0.02
# Length of the shown part of transformers' messages, in characters.
_SHOWN = 300


@contextmanager
def transformers_reads(what: object) -> Iterator[None]:
    """Turn an error of transformers into a DataError of one line, except for lack of memory.

    Args:
        what: the thing that is read, such as a folder; the line names it.
    """
    try:
        yield
    except (PermLLMError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, _SHOWN, placeholder=" ...")
        raise DataError(f"transformers cannot load {what}: {reason}") from error


def checkpoint_config(folder: Path) -> PreTrainedConfig:
    """Read the config of a checkpoint's folder.

    Raises:
        DataError: the folder has no config, transformers cannot read it, or it belongs to a
            quantised model or names code or files from elsewhere.
    """
    file = folder / "config.json"
    if not file.is_file():
        reason = "it has no config.json"
        if (folder / MASKS).is_file():
            reason = f"permllm export {folder} --to CHECKPOINT makes one of its masks"
        raise DataError(f"{folder} is no checkpoint: {reason}")
    settings = read_json(file)
    # The config of a gathered checkpoint contains the dense model's config.
    if isinstance(settings.get("dense_config"), dict):
        settings |= settings["dense_config"]
    for key, reason in _REFUSALS.items():
        if settings.get(key):
            raise DataError(f"{file}: {key}: {reason}")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(settings.get(key)):
            raise DataError(f"{file}: {key}={settings[key]!r}: kernels from the hub are not loaded")
    with transformers_reads(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tensor_reader(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> ReadTensor | None:
    """Return a function that reads a tensor from a folder's files by its name in the model.

    Args:
        folder: the folder of the checkpoint.
        model: the model of the folder; may be on the meta device.
        dtype: dtype of the floating-point numbers that are read.

    Returns:
        The function; None: the files are not safetensors, have other names of tensors, or hold
        different values for tied tensors.
    """
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        return None
    places = {name: file for file in files for name in tensor_formats(file)}

    def read(name: str) -> Tensor:
        tensor = load_tensor(places[name], name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for name, source in model.all_tied_weights_keys.items():
        if {name, source} <= places.keys() and not torch.equal(read(name), read(source)):
            return None
    return read if places.keys() >= set(parameter_names(model)) else None


def check_checkpoint(folder: Path) -> PreTrainedModel:
    """Compare a folder's files with its config, without reading the weights.

    Returns:
        The model on the meta device.

    Raises:
        DataError: a file is corrupt, or a tensor is missing, unexpected, of another shape, or not
            of floating-point numbers.
    """
    return _loaded(folder, {"dtype": "auto", "device_map": {"": "meta"}})


def read_weights(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device, **options: Any
) -> PreTrainedModel:
    """Read the model of a folder.

    Args:
        folder: a folder with config.json and weights.
        dtype: dtype of the weights, or its name; None: that of the files.
        device: the device of the weights.
        options: further options for transformers.

    Raises:
        DataError: as `check_checkpoint`, or a tensor has values that are not finite.
    """
    # With a device map the tensors go to the GPU one by one, so host memory never holds them all.
    onto: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    model = _loaded(folder, {"dtype": dtype or "auto"} | onto | options)
    check_values(folder, model.named_parameters())
    return model


@torch.no_grad()
def check_values(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise DataError, which names the tensor, where a tensor of a folder is not finite."""
    for name, tensor in tensors:
        if not all_finite(tensor):
            raise DataError(f"{folder}: {name} holds values that are not finite")


def all_finite(tensor: Tensor) -> bool:
    """Tell if a tensor, not empty, holds neither NaN nor infinities, without copying it."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())  # a NaN makes both NaN


def parameter_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a checkpoint's tensors: those of the state dict that are not tied."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def head_of_its_own(model: PreTrainedModel) -> bool:
    """Tell if a model has a head that does not share its weight with the token embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model on the meta device from its config, with a separate head if it has one.

    It has the generation settings of the model.

    Raises:
        ConfigError: the model has other tensors than its config makes.
    """
    config = copy.deepcopy(model.config)
    # A model from a GGUF file keeps this entry, although its weights are floats.
    vars(config).pop("quantization_config", None)
    if head_of_its_own(model):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    skeleton.generation_config = model.generation_config or skeleton.generation_config
    own = {(name, tensor.shape) for name, tensor in model.state_dict().items()}
    other = {(name, tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if own != other:
        name, _ = min(own ^ other)
        raise ConfigError(f"the model has other tensors than its config makes: {name}")
    return skeleton


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of tokens in a model's vocabulary: the rows of its embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


@torch.no_grad()
def check_runs(what: object, model: PreTrainedModel) -> None:
    """Run a model on two windows of two tokens, which differ in their last token.

    Raises DataError if it cannot run, its logits are not finite, or those of the first token depend
    on the second one.
    """
    tokens = torch.tensor([[0, vocabulary_of(model) - 1], [0, 0]], device=model.device)
    with transformers_reads(what):
        logits = model(input_ids=tokens).logits
    if not all_finite(logits):
        raise DataError(f"{what}: its logits are not finite")
    if not close(logits[0, 0], logits[1, 0]):
        raise DataError(f"{what}: its logits depend on later tokens; a causal decoder is expected")


def check_dense(what: str, config: PreTrainedConfig) -> None:
    """Raise ConfigError where a config belongs to a gathered checkpoint, which is pruned."""
    if hasattr(config, "dense_config") or hasattr(config, "dense_type"):
        raise ConfigError(f"{what} is a gathered checkpoint of a pruned model; give the dense one")


def close(logits: Tensor, expected: Tensor) -> bool:
    """Tell if logits differ by no more than the rounding of half precision."""
    return float((logits - expected).abs().max()) <= _ROUNDING * float(expected.abs().max())


def _loaded(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load a folder with transformers; raise DataError where its report finds a difference."""
    checkpoint_config(folder)
    dtypes: dict[str, str] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            dtypes |= tensor_formats(file)
    with transformers_reads(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_kernels=False,  # they would replace modules, and refuse the meta device
            **options,
        )
    model, report = loaded
    for key, verb in _REPORT.items():
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            raise DataError(
                f"{folder} {verb} {printable(names[0])}: its files and its config do not agree"
            )
    for name, dtype in sorted(dtypes.items()):
        if name.endswith("weight") and dtype not in _FLOATING:
            raise DataError(
                f"{folder} has {name} as {dtype}: weights must be floating-point numbers "
                "(quantised models cannot be pruned)"
            )
    return model
