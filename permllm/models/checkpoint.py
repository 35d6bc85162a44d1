"""A checkpoint as transformers loads it, refused where weights would be anything but what its files hold.

transformers gives a tensor that is missing, or has another shape, random values, casts whole numbers and 8-bit formats to what
was asked for without their scales, and says so in a report alone: a pruned model of it looks like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from permllm.errors import DataError

# What safetensors calls the formats whose numbers are the weights themselves.
_FLOATING = ("F64", "F32", "F16", "BF16")
_NAMED = 3


@contextmanager
def transformers_reads(folder: Path) -> Iterator[None]:
    """What transformers raises on a folder becomes one line; memory that is not enough is no fault of the folder's.

    Raises:
        DataError: with the line.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        raise DataError(f"transformers cannot load {folder}: {reason}") from error


def read_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a folder.

    Args:
        folder: with a config.json and weights.
        dtype: of the weights.
        device: where they are read to.

    Raises:
        DataError: a tensor is missing, in the way, of another shape, no floating-point number, or not finite; it is named.
    """
    # With a map each tensor goes from the file to the GPU, without the whole model in host memory, once for each process.
    onto: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    with transformers_reads(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **onto,
        )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape than its config asks for"),
        ("unexpected_keys", "has, although its config asks for none,"),
    ):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            raise DataError(f"{folder} {what} {_listed(names)}: it is another model than its config says, or a part of one")
    _check_formats(folder, {name for name, _ in model.named_parameters()})
    _check_finite(folder, model)
    return model


def _check_formats(folder: Path, parameters: set[str]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with transformers_reads(folder), safe_open(file, framework="pt") as opened:
            formats = {name: opened.get_slice(name).get_dtype() for name in opened.keys() if name in parameters}  # noqa: SIM118
        odd = sorted(name for name, found in formats.items() if found not in _FLOATING)
        if odd:
            raise DataError(f"{folder} holds {_listed(odd)} as {formats[odd[0]]}: quantised models cannot be pruned")


@torch.no_grad()
def _check_finite(folder: Path, model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        # The bounds of what holds a NaN are NaN.
        if weight.numel() and not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise DataError(f"{folder}: {name} holds values that are not finite")


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
