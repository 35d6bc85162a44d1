"""Layers that are pruned already, in files of their own until all are: a run that was stopped goes on after the last."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.runs.masks import PackedMasks
from permllm.runs.names import PRUNED_LAYERS
from permllm.runs.pruned import Group
from permllm.runs.run_tensors import check_mask, check_order
from permllm.runs.schema import Positive, Whole, validated
from permllm.runs.tensor_file import read_header, read_tensors
from permllm.runs.tensors import write_tensors

log = logging.getLogger(__name__)

_STATED = "layer"
_ORDER, _MASK, _WEIGHT = "order of ", "mask of ", "weight of "


@dataclass
class FoundLayer:
    """What pruning a decoder layer found.

    Attributes:
        orders: int64 `(C_in,)` by group.
        masks: bool `(C_out, C_in)` by linear, original channel order.
        weights: `(C_out, C_in)` by linear, where they are more than the dense ones under the masks; else empty.
        retained: share of the saliency retained, by group.
        moved: share of the channels that moved, by group.
        output_error: by group.
    """

    orders: dict[str, Tensor] = field(default_factory=dict)
    masks: PackedMasks = field(default_factory=PackedMasks)
    weights: dict[str, Tensor] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFile:
    """Where what was found of a layer is kept.

    Attributes:
        file: safetensors.
        masks: names of their bits in it, as `packed_mask` gives them, by linear.
        weights: names of the changed ones in it, by linear.
    """

    file: Path
    masks: dict[str, str]
    weights: dict[str, str]


class _Stated(TypedDict):
    run: str
    index: Whole
    shapes: dict[str, Annotated[list[Positive], Field(min_length=2, max_length=2)]]
    retained: dict[str, float]
    moved: dict[str, float]
    output_error: dict[str, float]


class PrunedLayers:
    """The layers of a run.

    Args:
        directory: of the run; None keeps nothing.
        run: digest of its settings.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self._folder = None if directory is None else directory / PRUNED_LAYERS
        self._run = run
        self._reads = self._folder is not None and self._folder.is_dir()
        self._writes = self._folder is not None
        self._kept: dict[int, LayerFile] = {}
        self._asked = False

    def read(self, index: int, groups: Sequence[Group], pattern: NMPattern, changed: bool) -> FoundLayer | None:
        """A layer that an earlier attempt has pruned, in the same run and after all layers before; None for none.

        Args:
            index: of the decoder layer.
            groups: of it that are pruned.
            pattern: N:M of those without one of their own.
            changed: the run changes the weights that it keeps.
        """
        if not self._reads or self._folder is None:
            return None
        file = self._file(self._folder, index)
        if file.is_file():
            try:
                found = self._read(file, index, groups, pattern, changed)
                self._kept[index] = _contents(file, found)
                return found
            except DataError as error:
                log.warning("%s: the layer is pruned anew", error)
        self._reads = False
        for later in self._folder.glob("*.safetensors"):
            if later.name >= file.name:  # may follow from another one than the one that takes its place
                later.unlink(missing_ok=True)
        return None

    def file_of(self, index: int) -> LayerFile | None:
        """The file that keeps a layer; None where none does.

        Whoever asks may read from the file for as long as the run goes on: it stays, even if a later layer cannot be written.
        """
        self._asked = self._asked or index in self._kept
        return self._kept.get(index)

    def write(self, index: int, layer: FoundLayer) -> None:
        """Keep a layer; where it cannot be written none is kept any more, and pruning goes on."""
        if not self._writes or self._folder is None:
            return
        tensors, shapes = {_ORDER + name: order for name, order in layer.orders.items()}, {}
        for path in layer.masks:
            tensors[_MASK + path], shape = layer.masks.packed(path)
            shapes[path] = list(shape)
        tensors |= {_WEIGHT + path: weight for path, weight in layer.weights.items()}
        stated = {"run": self._run, "index": index, "shapes": shapes, "retained": layer.retained}
        stated |= {"moved": layer.moved, "output_error": layer.output_error}
        try:
            self._folder.mkdir(exist_ok=True)
            file = self._file(self._folder, index)
            write_tensors(file, tensors, {_STATED: json.dumps(stated)})
            self._kept[index] = _contents(file, layer)
        except (DataError, OSError) as error:
            log.warning("%s: should the run be stopped, it prunes all layers again", error)
            self._writes = False
            if not self._asked:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, file: Path, index: int, groups: Sequence[Group], pattern: NMPattern, changed: bool) -> FoundLayer:
        _, metadata, _ = read_header(file)
        try:
            found = json.loads(metadata.get(_STATED, "null"))
        except ValueError as error:
            raise DataError(f"{file}: what it states of the layer cannot be read") from error
        stated = validated(f"{file}: what it states of the layer", found, _Stated)
        if stated["run"] != self._run or stated["index"] != index:
            raise DataError(f"{file} is of another run or layer")
        names = {group.name for group in groups}
        paths = {path for group in groups for path in group.members}
        tensors = read_tensors(file)
        wanted = {_ORDER + name for name in names} | {_MASK + path for path in paths}
        wanted |= {_WEIGHT + path for path in paths} if changed else set()
        of_groups = (stated["retained"], stated["moved"], stated["output_error"])
        if tensors.keys() != wanted or stated["shapes"].keys() != paths or any(part.keys() != names for part in of_groups):
            raise DataError(f"{file} is of another model, or a part of what was written")
        layer = FoundLayer(retained=stated["retained"], moved=stated["moved"], output_error=stated["output_error"])
        for group in groups:
            order = layer.orders[group.name] = tensors[_ORDER + group.name]
            check_order(f"{file}: the permutation of {group.name}", order)
            for path, rows in zip(group.members, group.rows, strict=True):
                if stated["shapes"][path] != [rows, group.channels] or len(order) != group.channels:
                    raise DataError(f"{file} is of another model: {path} is not {rows} x {group.channels}")
                layer.masks.set_packed(path, tensors[_MASK + path], stated["shapes"][path])
                check_mask(file, path, layer.masks[path], order, group.pattern or pattern)
                if changed:
                    weight = layer.weights[path] = tensors[_WEIGHT + path]
                    if list(weight.shape) != stated["shapes"][path]:
                        raise DataError(f"{file}: the weight of {path} is not {rows} x {group.channels}")
        return layer

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"{index:05d}.safetensors"


def _contents(file: Path, layer: FoundLayer) -> LayerFile:
    return LayerFile(file, {path: _MASK + path for path in layer.masks}, {path: _WEIGHT + path for path in layer.weights})
