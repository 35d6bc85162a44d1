"""Pruning that was stopped goes on after the last layer that was done, to the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.errors import DataError
from permllm.models.families import channel_groups, decoder_layers
from permllm.models.load import load_model
from permllm.models.offload import placement_of
from permllm.permutation.base import LocalPermutation
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.sparsegpt import SparseGPT
from permllm.pruner.wanda import Wanda
from permllm.pruning.layerwise import PrunedModel
from permllm.pruning.phases import calibrate_dense
from permllm.reconstruction.obs import OBS
from permllm.settings.config import NMPattern
from permllm.store.directory import Record, RunDirectory
from permllm.store.files import PRUNED_LAYERS
from tests.conftest import tiny_model
from tests.models.test_bad_checkpoints import local
from tests.models.test_offload import saved
from tests.problems import Interrupt, pruned, same, tokens
from tests.settings.test_config import config

Attempt = tuple[torch.nn.Module, PrunedModel]


class Orders(LocalPermutation):
    """The heuristic order of each group; stops at a layer, and knows the groups so far."""

    def __init__(self, stop: int | None = None) -> None:
        self.asked: list[str] = []
        self._stop = None if stop is None else f".{stop}."

    def permutation(self, name: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        if self._stop is not None and self._stop in name:
            raise Interrupt
        self.asked.append(name)
        return Heuristic("free").permutation(name, saliency, pattern)


def attempt(
    directory: Path | None, method: str, orders: Orders, model: torch.nn.Module | None = None
) -> Attempt:
    model = model or tiny_model("llama", num_hidden_layers=3)
    pruner: Any = SparseGPT(0.01) if method == "sparsegpt" else Wanda()
    factors, record = None, Record()
    if method == "dense":
        factors = calibrate_dense(model, channel_groups(model), tokens(), pruner, 4).factors
    if directory is not None:
        record = RunDirectory(directory, config("model=tiny-random"))
    record.metrics["status"] = "running"
    reconstruction = OBS(0.01) if method == "obs" else None
    more = {"reconstruction": reconstruction, "record": record}
    return model, pruned(model, pruner, orders, factors=factors, **more)


def check_equal(left: Attempt, right: Attempt) -> None:
    layers = zip(decoder_layers(left[0]), decoder_layers(right[0]), strict=True)
    for index, (layer, expected) in enumerate(layers):
        with placement_of(left[0]).layer(index):
            assert same(layer.state_dict(), expected.state_dict())
    one, other = left[1], right[1]
    assert one.permutations.keys() == other.permutations.keys()
    assert same(one.permutations, other.permutations)
    assert same(other.masks, one.masks)
    for figure in ("retained", "moved", "output_error", "violations"):
        assert getattr(one, figure) == getattr(other, figure)


@pytest.mark.parametrize("method", ["dense", "sparsegpt", "obs"])
def test_a_layer_that_was_done_is_not_done_again(method: str, tmp_path: Path) -> None:
    whole = attempt(None, method, Orders())
    with pytest.raises(Interrupt):
        attempt(tmp_path, method, Orders(stop=2))
    done = {file.name for file in (tmp_path / PRUNED_LAYERS).iterdir()}
    assert done == {"00000.safetensors", "00001.safetensors"}
    second = Orders()
    check_equal(attempt(tmp_path, method, second), whole)
    assert second.asked
    assert not [name for name in second.asked if ".0." in name or ".1." in name]
    third = Orders()  # stopped after the last layer: nothing is left to do
    check_equal(attempt(tmp_path, method, third), whole)
    assert third.asked == []
    (tmp_path / PRUNED_LAYERS / "00001.safetensors").unlink()
    fourth = Orders()
    check_equal(attempt(tmp_path, method, fourth), whole)
    assert {name.split(".")[2] for name in fourth.asked} == {"1"}


@pytest.mark.parametrize("method", ["dense", "obs"])
def test_what_was_found_for_a_model_that_is_read_from_disk_is_read_from_there(
    method: str, tmp_path: Path
) -> None:
    folder = saved("llama", tmp_path / "checkpoint", num_hidden_layers=3)

    def on_disk() -> torch.nn.Module:
        return load_model(local(folder, placement="disk"), 0).model

    whole = attempt(None, method, Orders())
    with pytest.raises(Interrupt):
        attempt(tmp_path, method, Orders(stop=2), model=on_disk())
    model, result = attempt(tmp_path, method, Orders(), model=on_disk())
    check_equal((model, result), whole)
    for index in (1, 2):  # of the attempt before, and of this one
        (tmp_path / PRUNED_LAYERS / f"{index:05d}.safetensors").unlink()
        layer = placement_of(model).layer(index)
        with pytest.raises(DataError, match=rf"{index:05d}\.safetensors"), layer:
            pass
