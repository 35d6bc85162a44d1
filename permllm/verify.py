"""`python -m permllm.verify DIR` proves that a checkpoint is N:M sparse as it is stored.

Any folder of safetensors files, ours or not, dense or packed, one tensor at a time. With `--against DENSE` also the difference
of the logits from another model's: of a folded model from its `simulate` form none, from the dense model what pruning costs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from permllm.errors import ConfigError, DataError, PermLLMError
from permllm.export.checkpoint import SUMMARY
from permllm.export.packed import unpack
from permllm.models.checkpoint import transformers_reads
from permllm.models.families import FAMILIES
from permllm.record.files import write_json
from permllm.record.tensor_file import check_file
from permllm.results.table import terminal
from permllm.sparsity import NMPattern, violations

# Without a family that we know: two-dimensional weights that are never pruned.
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "project_in", "project_out")
_SEQUENCES, _LENGTH = 4, 64


@dataclass
class LayerReport:
    """What one weight is.

    Attributes:
        name: of the tensor.
        shape: `(C_out, C_in)`.
        zeros: share of zeros.
        violations: groups of M with more than N nonzeros, in stored order; None where M does not divide C_in.
        negative_zeros: entries that are -0.0.
        nan: entries that are not finite.
        packed: stored as values and places.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    violations: int | None
    negative_zeros: int
    nan: int
    packed: bool


@dataclass
class Report:
    """What a checkpoint is.

    Attributes:
        pattern: N:M that was asked for.
        layers: every weight that should be sparse.
        bytes: of all safetensors files.
        difference: of the logits from another model's; None where none was asked for.
    """

    pattern: str
    layers: list[LayerReport]
    bytes: int
    difference: dict[str, float] | None = None

    @property
    def passed(self) -> bool:
        """N:M everywhere, no -0.0, everything finite."""
        return bool(self.layers) and not any(
            layer.violations is None or layer.violations or layer.negative_zeros or layer.nan for layer in self.layers
        )


def verify(folder: Path, pattern: NMPattern | None = None, against: Path | None = None) -> Report:
    """Examine a checkpoint.

    Args:
        folder: of safetensors files with a config.json.
        pattern: N:M; None takes the one that our exports state, else 2:4.
        against: another checkpoint, whose logits are compared.

    Raises:
        DataError: the files are missing, truncated, corrupt, or not safetensors.
    """
    files = _files(folder)
    for file in files:
        check_file(file)
    pattern = pattern or stated_pattern(folder)
    layers = [_examine(name, weight, packed, pattern) for name, weight, packed in _weights(folder, files, pattern)]
    if not layers:
        raise DataError(f"{folder} holds no weight of a linear")
    report = Report(str(pattern), layers, sum(file.stat().st_size for file in files))
    if against is not None:
        report.difference = logits_difference(folder, against)
    return report


def logits_difference(first: Path, second: Path) -> dict[str, float]:
    """How much the logits of two checkpoints differ on random tokens, in float32.

    Returns:
        `largest` and `relative`, the norm of the difference over that of the second's; `kl`, nats a token, from the second's
        distribution to the first's; `agreement`, share of tokens with the same most likely successor.
    """
    generator = torch.Generator().manual_seed(0)
    tokens: Tensor | None = None
    vocabulary = 0
    logits = []
    for folder in (first, second):
        with transformers_reads(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
        if tokens is None:
            vocabulary = model.config.vocab_size
            tokens = torch.randint(vocabulary, (_SEQUENCES, _LENGTH), generator=generator)
        elif model.config.vocab_size != vocabulary:
            raise ConfigError(f"{first} and {second} have vocabularies of {vocabulary} and {model.config.vocab_size} tokens")
        with torch.no_grad():
            logits.append(model(input_ids=tokens).logits.double())
    ours, theirs = logits
    return {
        "largest": float((ours - theirs).abs().max()),
        "relative": float((ours - theirs).norm() / theirs.norm()),
        "kl": float(
            torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
            .sum(-1)
            .mean()
        ),
        "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise DataError(f"{index} is not a readable index") from error
        missing = [name for name in sorted(names) if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {', '.join(missing)}, which its index names")
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no safetensors files")
    return files


def _config_of(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{file} is not readable JSON") from error
    return config


def stated_pattern(folder: Path) -> NMPattern:
    """N:M as an export of ours states it; 2:4 where nothing does."""
    file = folder / SUMMARY
    if not file.is_file():
        return NMPattern(2, 4)
    try:
        return NMPattern.parse(json.loads(file.read_text(encoding="utf-8"))["sparsity"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{file} does not say a pattern; give --pattern") from error


def _weights(folder: Path, files: list[Path], pattern: NMPattern) -> Iterator[tuple[str, Tensor, bool]]:
    """Each weight that should be sparse: its name, the tensor, and whether it was packed."""
    model_type = str(_config_of(folder).get("model_type", "")).split(",")[0]
    suffixes = None
    if model_type in FAMILIES:
        suffixes = tuple(f".{member}.weight" for group in FAMILIES[model_type].groups for member in group.members)
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        if name not in where:
            raise DataError(f"{folder} lacks {name}")
        with safe_open(where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    for name in sorted(where):
        base, is_packed = name.removesuffix("_values"), name.endswith(".weight_values")
        if suffixes is not None and not f".{base}".endswith(suffixes):
            continue
        if is_packed:
            try:
                yield base, unpack(read(name), read(f"{base}_places"), pattern), True
            except DataError as error:
                raise DataError(f"{base}: {error}") from error
        elif name.endswith(".weight") and (suffixes is not None or not any(word in name for word in _NOT_LINEAR)):
            weight = read(name)
            if weight.dim() == 2:
                yield name, weight, False


def _examine(name: str, weight: Tensor, packed: bool, pattern: NMPattern) -> LayerReport:
    zero = weight == 0
    stored = torch.arange(weight.shape[1])
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        zeros=float(zero.double().mean()),
        violations=violations(weight, stored, pattern) if weight.shape[1] % pattern.m == 0 else None,
        negative_zeros=int((zero & weight.signbit()).sum()),
        nan=int((~weight.isfinite()).sum()),
        packed=packed,
    )


def _print(folder: Path, report: Report) -> None:
    console = terminal()
    table = Table(title=f"{escape(str(folder))}: {report.pattern} in stored order", title_justify="left")
    for heading in ("weight", "shape", "zeros", "violations", "-0.0", "not finite"):
        table.add_column(heading, justify="left" if heading == "weight" else "right")
    for layer in report.layers:
        counted = f"M does not divide {layer.shape[1]}" if layer.violations is None else str(layer.violations)
        cells = [counted, str(layer.negative_zeros), str(layer.nan)]
        table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.zeros:.2%}", *cells)
    console.print(table)
    weights = sum(math.prod(layer.shape) for layer in report.layers)
    zeros = sum(layer.zeros * math.prod(layer.shape) for layer in report.layers) / weights
    bad = sum(layer.violations or 0 for layer in report.layers)
    console.print(f"{len(report.layers)} weights, {zeros:.2%} zeros, {bad} violations, {report.bytes / 1e6:.1f} MB on disk")
    if report.difference is not None:
        found = report.difference
        console.print(
            f"logits: relative difference {found['relative']:.2e}, largest {found['largest']:.2e}, KL {found['kl']:.2e} nats, "
            f"the same next token at {found['agreement']:.2%}"
        )
    console.print("passed" if report.passed else f"FAILED: this is not a {report.pattern} checkpoint")


def main() -> int:
    """The exit code: 0 where the checkpoint is N:M, 1 where it is not, 2 where it cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m permllm.verify", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint: config.json and safetensors files")
    parser.add_argument("--pattern", help="N:M (default: what an export of ours states, else 2:4)")
    parser.add_argument("--against", type=Path, metavar="DENSE", help="another checkpoint, whose logits are compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    options = parser.parse_args()
    disable_progress_bar()
    try:
        report = verify(options.folder, NMPattern.parse(options.pattern) if options.pattern else None, options.against)
        _print(options.folder, report)
        if options.json:
            write_json(options.json, asdict(report) | {"passed": report.passed})
    except PermLLMError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
