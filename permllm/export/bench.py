"""Command `permllm bench`: speed of a checkpoint in several variants.

The variants are the dense model, the checkpoint as it is stored, the checkpoint without its
gathers, and the checkpoint with its 2:4 weights on a GPU's sparse tensor cores, by each of torch's
two libraries. A 6:8 weight is multiplied as three 2:4 windows.
"""

import argparse
import copy
import inspect
import statistics
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from torch.utils.benchmark import Timer
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.command import Answer, terminal
from permllm.errors import ConfigError, first_line
from permllm.export.gathered import gathered_modules, leave_out_gathers
from permllm.export.verify import expected_patterns
from permllm.export.write import read_summary
from permllm.models.checkpoint import (
    check_checkpoint,
    check_runs,
    read_weights,
    vocabulary_of,
)
from permllm.models.families import linear_at
from permllm.models.load import check_windows
from permllm.runtime.devices import resolve_device
from permllm.settings.checkpoints import weight_files
from permllm.settings.config import NMPattern
from permllm.settings.values import SETTINGS, Count, Positive, validated
from permllm.sparsity.nm import violations
from permllm.sparsity.two_of_four import as_two_of_four, window_count
from permllm.store.environment import hardware, versions

BACKENDS = ("cuSPARSELt", "CUTLASS")
_TWO_OF_FOUR = NMPattern(2, 4)


def sparse_tensor_cores(device: torch.device) -> bool:
    """Tell if a device has sparse tensor cores: an NVIDIA GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def what_is_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why sparse tensor cores cannot multiply weights of a dtype; None: they can."""
    if not sparse_tensor_cores(device):
        return "2:4 products need an NVIDIA GPU of compute capability 8.0 or more"
    if dtype.itemsize != 2:
        return "2:4 products need half precision: --dtype bfloat16"
    return None


def use_backend(model: nn.Module, backend: str, patterns: dict[str, NMPattern], rows: int) -> str:
    """Put 2:4 and 6:8 linears of suitable sizes on sparse tensor cores.

    Args:
        model: the model, with its weights in stored order.
        backend: one of `BACKENDS`.
        patterns: N:M by linear.
        rows: rows of the activations for which cuSPARSELt searches its fastest algorithm.

    Returns:
        The number of linears, the backend and its algorithms, in words.

    Raises:
        ConfigError: a weight is not N:M in stored order, or no linear has a suitable size.
        RuntimeError: torch has no kernel for this device.
    """
    SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "CUTLASS"
    algorithms: dict[torch.Size, int] = {}
    used = 0
    for path, pattern in patterns.items():
        if not window_count(pattern):
            continue
        linear = linear_at(model, path)
        if violations(linear.weight, None, pattern):
            raise ConfigError(f"{path}.weight is not {pattern} in stored order")
        split, columns = as_two_of_four(linear.weight.detach(), pattern)
        if split.shape[0] % 32 or split.shape[1] % 64:
            continue
        weight: Any = to_sparse_semi_structured(split)
        if pattern != _TWO_OF_FOUR:
            linear.register_forward_pre_hook(partial(_columns, columns))
        if backend == "cuSPARSELt":
            if weight.shape not in algorithms:
                x = torch.ones(-(-rows // 8) * 8, split.shape[1]).to(split)
                algorithms[weight.shape] = torch._cslt_sparse_mm_search(weight.packed, x.t())
            weight.alg_id_cusparselt = algorithms[weight.shape]
        linear.weight = nn.Parameter(weight, requires_grad=False)
        used += 1
    if not used:
        raise ConfigError("no 2:4 or 6:8 linear has rows that 32, and channels that 64 divides")
    suffix = f", algorithms {sorted(set(algorithms.values()))}" if algorithms else ""
    return f"{used} linears by {backend}{suffix}"


def _columns(columns: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Return the inputs of a linear in the order of its windows' columns."""
    return inputs[0].index_select(-1, columns)


@dataclass(config=SETTINGS, frozen=True)
class Sizes:
    """Sizes of the measurements.

    Attributes:
        batch_sizes: numbers of sequences in a batch.
        prompt: tokens of each sequence.
        new_tokens: tokens that are decoded after the prompt, one by one.
        seconds: shortest time of a measurement, in seconds.
    """

    batch_sizes: list[Count]
    prompt: Count
    new_tokens: Count
    seconds: Positive


@torch.no_grad()
def _speed(model: PreTrainedModel, sizes: Sizes) -> list[dict[str, Any]]:
    """Measure the medians of prefill and decoding of a model, for each size of a batch."""
    model.eval().requires_grad_(False)
    # transformers renamed `past_key_values` to `cache` in 5.24.
    is_renamed = "cache" in inspect.signature(model.forward).parameters
    name_of_cache = "cache" if is_renamed else "past_key_values"
    speed = []
    for batch in sizes.batch_sizes:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary_of(model), (batch, sizes.prompt), generator=generator)
        tokens = tokens.to(model.device)
        # With the logits of the last token only, as in generation.
        prefill = partial(model, input_ids=tokens, use_cache=True, logits_to_keep=1)
        cache = {name_of_cache: DynamicCache(config=model.config)}
        prefill(**cache)
        decode = partial(_decode, model, tokens[:, -1:], sizes.new_tokens)
        prefilled = _measured(prefill, sizes.seconds)
        decoded = _measured(decode, sizes.seconds, partial(copy.deepcopy, cache))
        speed.append(
            {
                "batch": batch,
                "prefill_tokens_a_second": batch * sizes.prompt / prefilled,
                "decode_tokens_a_second": batch * sizes.new_tokens / decoded,
            }
        )
    return speed


def _measured(
    work: Callable[..., Any], seconds: float, fresh: Callable[[], dict[str, Any]] = dict
) -> float:
    """Return the median seconds of `work(**fresh())`, without those of `fresh`."""
    timer = Timer(
        "work(**state)",
        "state = fresh()",
        globals={"work": work, "fresh": fresh},
        num_threads=torch.get_num_threads(),
    )
    times = list[float]()
    while sum(times) < seconds:
        times.append(timer.timeit(1).median)
    return statistics.median(times)


def _decode(model: PreTrainedModel, token: Tensor, new_tokens: int, **cache: DynamicCache) -> None:
    """Decode tokens one by one after `token (batch, 1)`, and extend the cache."""
    for _ in range(new_tokens):
        token = model(input_ids=token, use_cache=True, **cache).logits[:, -1:].argmax(-1)


def measure(
    folder: Path, against: Path | None, sizes: Sizes, device: str = "auto", dtype: str | None = None
) -> dict[str, Any]:
    """Measure a checkpoint, with one variant in memory at a time.

    Args:
        folder: folder of the checkpoint.
        against: folder of the dense model; None: the dense model is not measured.
        sizes: sizes of the measurements.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: dtype of the weights; None: the dtype of each checkpoint.

    Returns:
        Plain values: `variants` with speeds, `missing` with a line for each variant not measured.

    Raises:
        ConfigError: the machine lacks the device.
        DataError: a folder does not have a complete checkpoint, or the model too few positions.
    """
    place = resolve_device(device)

    def variant(
        name: str, checkpoint: Path, prepare: Callable[[PreTrainedModel], str | None]
    ) -> dict[str, Any]:
        model = read_weights(checkpoint, weight_dtype, place)
        used = prepare(model)
        return {"variant": name, "used": used, "speed": _speed(model, sizes)}

    if against:
        check_checkpoint(against)  # before the measurements, which take minutes
    skeleton = check_checkpoint(folder)
    tokens = torch.zeros(1, sizes.prompt + sizes.new_tokens, dtype=torch.long)
    check_windows("--prompt and --new-tokens", tokens, skeleton)
    weight_dtype = getattr(torch, dtype) if dtype else skeleton.dtype
    patterns = expected_patterns(skeleton, read_summary(folder))
    gathers = len(gathered_modules(skeleton))
    reason = what_is_missing(place, weight_dtype)
    variants = [variant("as stored", folder, partial(check_runs, folder))]
    if against:
        variants.insert(0, variant("dense", against, lambda model: None))
    if gathers:
        variants.append(variant("as stored, gathers left out", folder, leave_out_gathers))
    missing = [reason] if reason else []
    for backend in () if reason else BACKENDS:
        name = f"2:4 by {backend}"
        rows = max(sizes.batch_sizes) * sizes.prompt
        use = partial(use_backend, backend=backend, patterns=patterns, rows=rows)
        try:
            variants.append(variant(name, folder, use))
        except (ConfigError, RuntimeError) as error:
            missing.append(f"{name}: {first_line(error)}")
    return {
        "checkpoint": folder.name,
        "dtype": str(weight_dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in weight_files(folder)),
        "prompt": sizes.prompt,
        "new_tokens": sizes.new_tokens,
        "gathers": gathers,
        "variants": variants,
        "missing": missing,
        "hardware": hardware(place),
        "versions": versions(),
    }


def work(options: argparse.Namespace) -> Answer:
    """Run the command `permllm bench`."""
    disable_progress_bar()
    set_verbosity_error()
    sizes = validated(Sizes, {field.name: getattr(options, field.name) for field in fields(Sizes)})
    report = measure(options.folder, options.against, sizes, options.device, options.dtype)
    return Answer(report, lambda: _show(report))


def _show(report: dict[str, Any]) -> None:
    console = terminal()
    what = f"{escape(report['checkpoint'])} in {report['dtype']}"
    title = f"{what}, prompt of {report['prompt']} tokens"
    table = Table("variant", "batch", title=title, title_justify="left")
    table.add_column("prefill, tokens/s", justify="right")
    table.add_column("decode, tokens/s", justify="right")
    for variant in report["variants"]:
        for row in variant["speed"]:
            name = variant["used"] or variant["variant"]
            prefill = f"{row['prefill_tokens_a_second']:.1f}"
            decode = f"{row['decode_tokens_a_second']:.1f}"
            table.add_row(name, str(row["batch"]), prefill, decode)
    console.print(table)
    console.print(f"{report['gathers']} gathers, {report['bytes'] / 1e6:.1f} MB on disk")
    for line in report["missing"]:
        console.print(f"missing: {escape(line)}")
