"""A checkpoint as transformers loads it, refused where weights would be anything but what its files hold.

transformers gives a tensor that is missing, or has another shape, random values, casts whole
numbers and 8-bit formats to what was asked for without their scales, and says so in a report alone:
a pruned model of it looks like any other.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from permllm.errors import ConfigError, DataError, PermLLMError, printable
from permllm.models.schema import ModelSettings, Object, TensorIndex, read_json, validated
from permllm.runs.tensors import check_order, tensor_formats

# Kinds of weights, an index of several files and the single file, in the order in which
# transformers looks for them.
WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Where a gathered model keeps the order of a module's input.
ORDER = ".input_order"
# What every transformers config checks to be a number, under the name that it has in most families
# and in OPT's feed-forward; a gathered model has a text there.
TRIPWIRES = ("hidden_size", "vocab_size", "num_hidden_layers")
# For `device_map`: the model without values.
META = {"": "meta"}
# Names in safetensors of formats that other files hold.
_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What safetensors calls the formats whose numbers are the weights themselves, and those of an
# order.
_FLOATING = ("F64", "F32", "F16", "BF16")
_WHOLE = ("I64", "I32")
_BYTES = ("U8", "BOOL")
_NAMED = 3
# Characters of what transformers says.
_SAID = 300


@dataclass(frozen=True)
class Differences:
    """What transformers reports of a checkpoint whose files hold other tensors than its config asks for.

    Attributes:
        missing: names that the files lack.
        mismatched: names that they hold in another shape.
        unexpected: names that they hold and the model has no place for.
    """

    missing: list[str]
    mismatched: list[str]
    unexpected: list[str]

    def each(self) -> Iterator[tuple[str, list[str]]]:
        """What is wrong, to be followed by names, and the names; only what there is."""
        for what, names in (
            ("lacks", self.missing),
            ("has in another shape than its config asks for", self.mismatched),
            ("has, although its config asks for none,", self.unexpected),
        ):
            if names:
                yield what, names


@contextmanager
def transformers_reads(what: object) -> Iterator[None]:
    """What transformers raises on a model becomes one line; memory that is not enough is no fault of the model's.

    Args:
        what: is read, such as a folder.

    Raises:
        DataError: with the line.
    """
    try:
        yield
    except (PermLLMError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, _SAID, placeholder=" ...")
        raise DataError(f"transformers cannot load {what}: {reason}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder.

    Raises:
        DataError: it has none, or one of which transformers can make nothing.
    """
    _settings(folder)
    with transformers_reads(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a folder from.

    Raises:
        DataError: there are none, the index is none, or it names files that are not there.
    """
    for index, single in WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = indexed_files(folder / index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise DataError(f"{folder} lacks {_listed(missing)}, which its index names")
            return [folder / name for name in names]
    raise DataError(
        f"{folder} holds no safetensors files that transformers would read, and no pytorch_model.bin either"
    )


def indexed_files(index: Path) -> list[str]:
    """Names of the files of weights that an index names, all of its own folder."""
    return sorted(set(read_json(index, TensorIndex)["weight_map"].values()))


def tensor_places(files: Iterable[Path]) -> dict[str, tuple[Path, str]]:
    """The file of each tensor in safetensors files, and its format there.

    Raises:
        DataError: a file is none, or two hold the same tensor.
    """
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, found in tensor_formats(file).items():
            if name in places:
                raise DataError(f"{file} and {places[name][0].name} both hold {printable(name)}")
            places[name] = (file, found)
    return places


def skeleton_of(folder: Path) -> tuple[PreTrainedModel, Differences]:
    """The model of a folder on the meta device, and in what its files differ from it; no weights are read.

    Raises:
        DataError: its config or its files cannot be read, or it is quantised in a way that is not
            known.
    """
    settings = _settings(folder)
    weight_files(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        read_json(generation, Object)
    with transformers_reads(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            device_map=META,
        )
    model: PreTrainedModel = loaded[0]
    # One that transformers does not know it leaves aside, and takes the numbers as they are.
    if settings.get("quantization_config") and getattr(model, "hf_quantizer", None) is None:
        raise DataError(f"{folder}/config.json: quantization_config: its quant_method is not known")
    return model, _differences(loaded[1])


def check_checkpoint(folder: Path) -> PreTrainedModel:
    """Compare a folder's files with its config; no weights are read.

    Returns:
        The model on the meta device.

    Raises:
        DataError: a tensor is missing, in the way, of another shape, or no floating-point number,
            or a file is corrupt.
    """
    model, differences = skeleton_of(folder)
    for what, names in differences.each():
        raise DataError(
            f"{folder} {what} {_listed(names)}: it is another model than its config says, or a part of one"
        )
    odd = odd_formats(_formats(folder), model)
    if odd:
        first = next(iter(odd.values()))
        what = "weights must be floating-point numbers (quantised models cannot be pruned), orders whole ones"
        raise DataError(f"{folder} holds {_listed(list(odd))} as {first}: {what}")
    return model


def odd_formats(formats: dict[str, str], model: nn.Module) -> dict[str, str]:
    """The tensors that are not numbers of the kind that they must be, and what they are.

    Args:
        formats: of the tensors of a checkpoint, such as `F32`, by their names in its files.
        model: that it is of; a parameter may have a longer name there than in the files.
    """
    parameters = {name for name, _ in model.named_parameters()}
    odd = {}
    for name, found in sorted(formats.items()):
        if name.endswith(ORDER):
            valid = found in _WHOLE
        elif name in parameters or name.endswith((".weight", ".bias")):
            valid = found in _FLOATING
        else:  # the masks that old versions kept
            valid = found in _FLOATING + _WHOLE + _BYTES
        if not valid:
            odd[name] = found
    return odd


@torch.no_grad()
def check_values(what: object, model: nn.Module) -> None:
    """Refuse a model with values that are not finite, or an order that is no permutation; what is on meta has none.

    Raises:
        DataError: with the tensor's name.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.numel():
            continue
        if name.endswith(ORDER):
            check_order(f"{what}: {name}", tensor)
        elif tensor.is_floating_point() and not all_finite(tensor):
            raise DataError(f"{what}: {name} holds values that are not finite")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor, not empty, holds neither NaN nor infinities; without the temporaries of `isfinite`."""
    return all(
        bool(bound.isfinite()) for bound in tensor.aminmax()
    )  # the bounds of what holds a NaN are NaN


def parameter_names(model: PreTrainedModel) -> list[str]:
    """Names of all tensors that a checkpoint must hold: the state dict's, without those tied to another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return [name for name in model.state_dict() if name not in tied]


def untied(
    model: PreTrainedModel, names: Container[str], read: Callable[[str], Tensor]
) -> tuple[str, str] | None:
    """A tensor that is another than the one that the config ties it to, such as a head, and that one; None where all are tied.

    Args:
        model: may be on the meta device.
        names: of the tensors that there are.
        read: gives one by its name.
    """
    for name, source in (model.all_tied_weights_keys or {}).items():
        if name in names and source in names:
            one, other = read(name), read(source)
            if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
                return name, source
    return None


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a model knows: the rows of its embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


@torch.no_grad()
def check_runs(what: object, model: PreTrainedModel) -> None:
    """Run two tokens, the first and the last: settings of which no tensor depends fail there or nowhere.

    Raises:
        DataError: the model cannot, or its logits are not finite.
    """
    with transformers_reads(what):
        tokens = torch.tensor([[0, vocabulary_of(model) - 1]], device=model.device)
        logits = model(input_ids=tokens).logits
    if not all_finite(logits):
        raise DataError(f"{what}: its logits are not finite")


def check_dense(what: str, config: PreTrainedConfig) -> None:
    """Raise ConfigError where a config is that of a gathered checkpoint, which has been pruned already."""
    if hasattr(config, "dense_type"):
        raise ConfigError(f"{what} is a gathered checkpoint of a pruned model: give the dense one")


def read_weights(
    folder: Path, dtype: torch.dtype | None, device: torch.device, **options: Any
) -> PreTrainedModel:
    """The model of a folder.

    Args:
        folder: with a config.json and weights.
        dtype: of the weights; None is that of the files.
        device: where they are read to.
        options: for transformers.

    Raises:
        DataError: `check_checkpoint` or `check_values` refuses it; the tensor is named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    check_checkpoint(folder)
    # With a map each tensor goes from the file to the GPU, without the whole model in host memory,
    # once for each process.
    onto: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    with transformers_reads(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            **onto | options | {"local_files_only": True, "trust_remote_code": False},
        )
    check_values(folder, model)
    return model


def _settings(folder: Path) -> ModelSettings:
    file = folder / "config.json"
    written = read_json(file, Object)
    # A gathered model has the dense one's config inside of its own, and its widths there alone.
    inner = validated(f"{file}: dense_config", written.get("dense_config", {}), Object)
    outer = {key: value for key, value in written.items() if not inner or key not in TRIPWIRES}
    return validated(str(file), outer | inner, ModelSettings)


def _differences(report: dict[str, Any]) -> Differences:
    names = {
        key: sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        for key in ("missing_keys", "mismatched_keys", "unexpected_keys")
    }
    return Differences(names["missing_keys"], names["mismatched_keys"], names["unexpected_keys"])


def _formats(folder: Path) -> dict[str, str]:
    files = weight_files(folder)
    if files[0].suffix == ".safetensors":
        return {name: found for name, (_, found) in tensor_places(files).items()}
    formats: dict[str, str] = {}
    for file in files:
        with transformers_reads(folder):
            # Nothing but tensors is unpickled, and of these no values.
            tensors = torch.load(file, map_location="meta", weights_only=True)
            formats |= {
                name: _FORMATS.get(tensor.dtype, str(tensor.dtype))
                for name, tensor in tensors.items()
            }
    return formats


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(printable, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")
