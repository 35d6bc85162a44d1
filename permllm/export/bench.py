"""What a checkpoint costs: prefill and decoding, its gathers, loading, sizes.

With `--against DENSE` the dense model is measured beside it, interleaved. On a GPU with sparse
tensor cores every pruned linear of a 2:4 model in half precision runs on them; elsewhere a sparse
matrix product has no faster kernel than a dense one, which the output says.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from permllm.config import NMPattern
from permllm.errors import ConfigError, DataError
from permllm.export.gathered import gathered_modules
from permllm.export.verify import Stated, stated_patterns
from permllm.models.checkpoint import (
    check_checkpoint,
    check_runs,
    check_values,
    transformers_reads,
    vocabulary_of,
    weight_files,
)
from permllm.models.families import channel_groups, decoder_layers, linear_at
from permllm.runs.environment import hardware, versions
from permllm.runs.tensors import violations
from permllm.runtime.devices import resolve_device
from permllm.runtime.memory import (
    keep_freed_memory,
    peak_memory,
    reset_peak_memory,
    return_freed_memory,
)
from permllm.runtime.speed import interleaved

_TWO_OF_FOUR = NMPattern(2, 4)
# Of a row of the first layer: seconds.
LAYER_COLUMNS = ("dense_s", "sparse_s", "gather_s")


def sparse_tensor_cores(device: torch.device) -> bool:
    """Whether the device multiplies 2:4 sparse matrices natively: an NVIDIA GPU from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use_sparse_tensor_cores(model: nn.Module, stated: Stated) -> int:
    """Give every 2:4 linear that can take it a semi-structured weight; the number of them.

    Args:
        model: with its weights in stored order.
        stated: which linears are 2:4.

    Raises:
        DataError: a weight is not 2:4 in stored order.
    """
    from torch.sparse import to_sparse_semi_structured

    converted = 0
    for group in channel_groups(model):
        for path in (path for path in group.members if stated.of(path) == _TWO_OF_FOUR):
            linear = linear_at(model, path)
            if violations(linear.weight, None, _TWO_OF_FOUR):
                raise DataError(f"{path}.weight is not 2:4 in stored order")
            rows, channels = linear.weight.shape
            if rows % 32 == 0 and channels % 64 == 0:
                linear.weight = nn.Parameter(
                    to_sparse_semi_structured(linear.weight.detach()), requires_grad=False
                )
                converted += 1
    return converted


@contextmanager
def without_gathers(model: nn.Module) -> Iterator[None]:
    """The model as if its orders were free of cost; it computes something else then, in the same shapes."""
    hooks = {module: dict(module._forward_pre_hooks) for module in gathered_modules(model).values()}
    for module in hooks:
        module._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for module, kept in hooks.items():
            module._forward_pre_hooks.update(kept)


@torch.no_grad()
def speed(
    variants: dict[str, PreTrainedModel],
    batch_sizes: Sequence[int],
    prompt: int,
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Prefill and decoding of each variant at each batch size, interleaved.

    Args:
        variants: models by name; one with gathers is measured without them too.
        batch_sizes: sequences at a time.
        prompt: tokens of each sequence.
        new_tokens: tokens decoded one by one after the prompt.
        repeats: of each measurement; medians are given.

    Returns:
        A row a variant and batch size; `prefill_bytes` is what the first prefill takes beside the
        weights.
    """
    device = next(iter(variants.values())).device
    known = min(200, *map(vocabulary_of, variants.values()))
    rows = []
    for batch in batch_sizes:
        tokens = torch.randint(
            known, (batch, prompt), generator=torch.Generator().manual_seed(0)
        ).to(device)
        works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        peaks = {}
        for name, model in variants.items():
            prefill_ = _prefill(model, tokens)
            return_freed_memory()  # of the variants before
            reset_peak_memory(device)
            before = peak_memory(device)
            prefill_()
            peaks[name] = peak_memory(device) - before
            works[name] = (prefill_, _decode(model, tokens, new_tokens))
            if gathered_modules(model):
                works[f"{name}, gathers left out"] = tuple(
                    _bare(model, work) for work in works[name]
                )  # type: ignore[assignment]
        prefill = interleaved({name: pair[0] for name, pair in works.items()}, repeats, device)
        decode = interleaved({name: pair[1] for name, pair in works.items()}, repeats, device)
        for name in works:
            rows.append(
                {
                    "variant": name,
                    "batch": batch,
                    "prefill_tokens_a_second": batch * prompt / statistics.median(prefill[name]),
                    "prefill_spread": _spread(prefill[name]),
                    "decode_tokens_a_second": batch * new_tokens / statistics.median(decode[name]),
                    "decode_spread": _spread(decode[name]),
                    "prefill_bytes": peaks.get(name),
                }
            )
    return rows


@torch.no_grad()
def layers(
    model: PreTrainedModel, sparse: PreTrainedModel | None, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """The first decoder layer, group by group: products dense and sparse, and the gather before them (the paper's table 3).

    Args:
        model: whose linears are dense.
        sparse: the same with semi-structured weights; None where there are no sparse tensor cores.
        tokens: rows of the activations.
        repeats: of each measurement.
    """
    device, dtype = model.device, model.dtype
    rows = []
    for group in (group for group in channel_groups(model) if group.layer == 0):
        x = torch.randn(tokens, group.channels, device=device).to(dtype)
        order = torch.randperm(group.channels).to(device, torch.int32)
        works: dict[str, Callable[[], Any]] = {"dense_s": _products(model, group.members, x)}
        if sparse is not None:
            works["sparse_s"] = _products(sparse, group.members, x)
        works["gather_s"] = partial(x.index_select, -1, order)
        found = interleaved(works, repeats, device)
        row = {
            name: statistics.median(found[name]) if name in found else None
            for name in LAYER_COLUMNS
        }
        rows.append(
            {
                "group": group.table.name,
                "channels": group.channels,
                "rows": sum(group.rows),
                "tokens": tokens,
            }
            | row
        )
    return rows


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, float]:
    """A checkpoint on a device, and the seconds of loading.

    Raises:
        DataError: its files are not what its config says, or transformers cannot load or run it.
    """
    check_checkpoint(folder)
    started = time.perf_counter()
    with transformers_reads(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    nn.Module.to(model, device=device)
    seconds = time.perf_counter() - started
    check_values(folder, model)
    check_runs(folder, model)
    return model.eval().requires_grad_(False), seconds


def measure(
    folder: Path,
    against: Path | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 256,
    new_tokens: int = 16,
    layer_tokens: int = 2048,
    repeats: int = 5,
    device: str = "auto",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Everything that can be measured here, as plain values.

    Args:
        folder: of the checkpoint.
        against: folder of the dense model.
        batch_sizes: sequences at a time.
        prompt: tokens of each sequence.
        new_tokens: tokens decoded one by one after the prompt.
        layer_tokens: rows of the products that are timed one by one.
        repeats: of each measurement; medians are given.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the weights; None is that of the checkpoint.

    Raises:
        ConfigError: the two do not go together. DataError: one of them is no checkpoint.
    """
    place = resolve_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    asked = getattr(torch, dtype) if dtype else None
    model, seconds = load(folder, place, asked)
    variants = {"as stored": model}
    sizes = {"as stored": _size(folder)}
    loading = {"as stored": seconds}
    sparse = None
    stated = stated_patterns(folder)
    note = why_dense(place, stated.all(), model.dtype)
    if not note:
        sparse, _ = load(folder, place, asked)
        try:
            note = f"{use_sparse_tensor_cores(sparse, stated)} linears on sparse tensor cores"
            variants["sparse tensor cores"] = sparse
        except DataError as error:
            sparse, note = None, f"not on sparse tensor cores: {error}"
    if against:
        dense, seconds = load(against, place, asked or model.dtype)
        if len(decoder_layers(dense)) != len(decoder_layers(model)):
            raise ConfigError(f"{against} has another number of layers than {folder}")
        variants = {"dense": dense} | variants
        loading["dense"], sizes["dense"] = seconds, _size(against)
    return {
        "checkpoint": folder.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "note": note,
        "gathers": len(gathered_modules(model)),
        "file_bytes": sizes,
        "weight_bytes": {name: _weight_bytes(variant) for name, variant in variants.items()},
        "loading_s": loading,
        "speed": speed(variants, batch_sizes, prompt, new_tokens, repeats),
        "layers": layers(model, sparse, layer_tokens, repeats),
        "prompt": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "hardware": hardware(place),
        "versions": versions(),
    }


def why_dense(
    device: torch.device, patterns: Collection[NMPattern | None], dtype: torch.dtype
) -> str:
    """Why no sparse tensor cores multiply a checkpoint of such patterns and format; nothing where they do."""
    if not sparse_tensor_cores(device):
        return "no sparse tensor cores here: sparse products run as dense ones"
    if _TWO_OF_FOUR not in patterns:
        return "sparse tensor cores multiply 2:4 alone, and no linear has it: sparse products run as dense ones"
    if dtype.itemsize != 2:
        name = str(dtype).removeprefix("torch.")
        return f"sparse tensor cores are used in half precision, and this is {name} (--dtype bfloat16): no sparse products"
    return ""


def _prefill(model: PreTrainedModel, tokens: Tensor) -> Callable[[], Any]:
    # Logits of the last token alone, as generation asks for.
    return lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1)


def _decode(model: PreTrainedModel, tokens: Tensor, new_tokens: int) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    # What transformers calls it: cache since 5.24, past_key_values before.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{name: cache})

    slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)

    def work() -> None:
        token = tokens[:, -1:]
        used = copy.deepcopy(cache) if slides else cache  # what has slid out cannot be had back
        for _ in range(new_tokens):
            token = model(input_ids=token, use_cache=True, **{name: used}).logits[:, -1:].argmax(-1)
        if not slides:
            used.crop(-new_tokens)

    return work


def _bare(model: PreTrainedModel, work: Callable[[], Any]) -> Callable[[], Any]:
    def bare() -> None:
        with without_gathers(model):
            work()

    return bare


def _products(model: nn.Module, members: tuple[str, ...], x: Tensor) -> Callable[[], Any]:
    linears = [linear_at(model, path) for path in members]
    # Not by calling the modules: a gather that hangs on one is timed by itself.
    return lambda: [nn.functional.linear(x, linear.weight, linear.bias) for linear in linears]


def _spread(times: list[float]) -> float:
    """Largest less smallest, as a share of the median."""
    return (max(times) - min(times)) / statistics.median(times)


def _weight_bytes(model: nn.Module) -> int:
    # Tied parameters come once; a semi-structured one has no storage of its own to tell it by.
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _bytes(tensor: Tensor) -> int:
    parts = [
        part
        for part in (getattr(tensor, name, None) for name in ("packed", "meta"))
        if isinstance(part, Tensor)
    ]
    return sum(part.numel() * part.element_size() for part in parts or [tensor])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))
