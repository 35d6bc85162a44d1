"""A checkpoint's weights in safetensors files of a bounded size, with the index that transformers reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from permllm.runs.files import write_json
from permllm.runs.tensor_file import write_file


def write_shards(folder: Path, planned: Mapping[str, Tensor], make: Callable[[str], Tensor], largest: int) -> None:
    """Write tensors as `model.safetensors`, or as several files and `model.safetensors.index.json`.

    Args:
        folder: that is there.
        planned: shape and dtype of each tensor, by name; may be on the meta device.
        make: as in `write_file`.
        largest: size of a file in bytes, at most, where no tensor is larger.
    """
    split = split_torch_state_dict_into_shards(
        dict(planned), filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: planned[name] for name in names}, make)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
