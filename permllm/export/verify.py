"""Command `permllm verify`: reload a checkpoint, count N:M in stored order, compare logits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.config import NMPattern
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import SUMMARY, read_summary
from permllm.models.checkpoint import (
    check_runs,
    read_weights,
    transformers_reads,
    vocabulary_of,
    weight_files,
)
from permllm.models.families import channel_groups, linear_at
from permllm.models.selection import DENSE
from permllm.runs.files import file_sha256
from permllm.runs.tensors import violations
from permllm.runtime.terminal import Answer, terminal

_SEQUENCES, _LENGTH = 4, 64
_SHOWN = 20


@dataclass
class LayerReport:
    """Zeros of one weight that should be sparse.

    Attributes:
        name: of the tensor.
        shape: `(C_out, C_in)`.
        pattern: N:M that it should be.
        zeros: share of zeros.
        violations: groups of M with more than N nonzeros, in stored order.
        negative_zeros: entries that are -0.0, on which some sparse kernels break.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: float
    violations: int
    negative_zeros: int

    def problems(self) -> Iterator[str]:
        """Say what is wrong with it, a line each."""
        if self.violations:
            yield f"{self.name} has {self.violations} groups that are not {self.pattern}"
        if self.negative_zeros:
            yield f"{self.name} holds {self.negative_zeros} zeros as -0.0"


@dataclass
class Report:
    """Result of the check of a checkpoint.

    Attributes:
        passed: every linear is N:M as it should be, and the difference of the logits is finite.
        problems: everything that is wrong, a line each.
        pattern: N:M of the linears that have none of their own.
        layers: every weight that should be sparse.
        dense: weights of linears that the export says are not.
        bytes: of all files with weights.
        checksums: contents were compared with the sha256 that an export states.
        difference: of the logits from another model's; None where none was asked for.
    """

    passed: bool
    problems: list[str]
    pattern: str
    layers: list[LayerReport]
    dense: list[str]
    bytes: int
    checksums: bool
    difference: dict[str, float] | None = None


def verify(folder: Path, pattern: NMPattern | None = None, against: Path | None = None) -> Report:
    """Examine a checkpoint that transformers can load, ours or not.

    Args:
        folder: of the checkpoint.
        pattern: N:M of every linear; None is what an export of ours states of each, else 2:4.
        against: another checkpoint, whose logits are compared.

    Raises:
        ConfigError: nothing says which linears of the model are pruned, or M does not divide.
        DataError: the files are not those of a whole model, or not as they were written.
    """
    summary = read_summary(folder)
    for file in sorted(folder.glob("*.safetensors")) if summary else ():
        if summary and file_sha256(file) != summary["sha256"].get(file.name):
            raise DataError(f"{file} is not what was written (its sha256 differs)")
    model = read_weights(folder, None, torch.device("cpu"))
    check_runs(folder, model)
    stated = stated_patterns(folder, model, pattern)
    layers = [
        _examined(f"{path}.weight", linear_at(model, path).weight, its)
        for path, its in stated.items()
        if its
    ]
    report = Report(
        passed=True,
        problems=[problem for layer in layers for problem in layer.problems()],
        pattern=str(pattern or (summary["sparsity"] if summary else "2:4")),
        layers=layers,
        dense=sorted(f"{path}.weight" for path, its in stated.items() if not its),
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
        checksums=summary is not None,
    )
    del model
    if against is not None:
        report.difference = logits_difference(folder, against)
        if not all(math.isfinite(value) for value in report.difference.values()):
            report.problems.append(f"its logits differ from those of {against} beyond all numbers")
    report.passed = not report.problems
    return report


def stated_patterns(
    folder: Path, model: nn.Module, pattern: NMPattern | None = None
) -> dict[str, NMPattern | None]:
    """Return N:M of each linear of the decoder layers, by path; None of one that stays dense.

    Args:
        folder: of the checkpoint.
        model: of the checkpoint.
        pattern: of every linear; None is what an export of ours states of each, else 2:4.
    """
    groups = channel_groups(model)
    paths = [path for group in groups for path in group.members]
    summary = None if pattern else read_summary(folder)
    if summary is None:
        return dict.fromkeys(paths, pattern or NMPattern(2, 4))
    others = summary.get("patterns", {})
    if strange := sorted(others.keys() - set(paths)):
        raise DataError(f"{folder / SUMMARY}: patterns: the model has no linear {strange[0]}")
    texts = {path: others.get(path, summary["sparsity"]) for path in paths}
    key = f"{folder / SUMMARY}: sparsity"
    return {
        path: None if text == DENSE else NMPattern.parse(text, key) for path, text in texts.items()
    }


def _examined(name: str, weight: Tensor, pattern: NMPattern) -> LayerReport:
    rows, channels = weight.shape
    if channels % pattern.m:
        raise ConfigError(f"{pattern}: M does not divide the {channels} inputs of {name}")
    return LayerReport(
        name=name,
        shape=(rows, channels),
        pattern=str(pattern),
        zeros=1 - int(weight.count_nonzero()) / weight.numel(),
        violations=violations(weight, None, pattern),
        negative_zeros=int((weight.signbit() & (weight == 0)).sum()),
    )


@torch.no_grad()
def logits_difference(first: Path, second: Path) -> dict[str, float]:
    """Measure how much the logits of two checkpoints differ on random tokens, in float32.

    Returns:
        `largest` and `relative`, the norm of the difference over that of the second's; `kl`, nats a
        token, from the second's distribution to the first's; `agreement`, share of tokens with the
        same most likely successor.
    """
    logits, vocabularies = [], []
    for folder in (first, second):
        model = read_weights(folder, torch.float32, torch.device("cpu")).eval()
        vocabularies.append(vocabulary_of(model))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabularies[0], (_SEQUENCES, _LENGTH), generator=generator)
        if vocabularies[-1] != vocabularies[0]:
            raise ConfigError(f"{first} and {second} have vocabularies of {vocabularies} tokens")
        with transformers_reads(folder):
            logits.append(model(input_ids=tokens).logits.double())
    ours, theirs = logits
    nats = nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    )
    return {
        "largest": float((ours - theirs).abs().max()),
        "relative": float((ours - theirs).norm() / theirs.norm()),
        "kl": float(nats.sum(-1).mean()),
        "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


def work(options: argparse.Namespace) -> Answer:
    """Do the work of the command."""
    disable_progress_bar()
    set_verbosity_error()  # what its warnings are about is in the report
    pattern = NMPattern.parse(options.pattern, "--pattern") if options.pattern else None
    report = verify(options.folder, pattern, options.against)
    return Answer(asdict(report), lambda: _show(options.folder, report), 0 if report.passed else 1)


def _show(folder: Path, report: Report) -> None:
    sizes = [math.prod(layer.shape) for layer in report.layers]
    zeros = sum(layer.zeros * size for layer, size in zip(report.layers, sizes, strict=True))
    bad = sum(layer.violations for layer in report.layers)
    verdict = "passed" if report.passed else "FAILED"
    lines = [f"{verdict}: {folder}, {report.pattern} in stored order"]
    lines += [f"- {problem}" for problem in report.problems[:_SHOWN]]
    if len(report.problems) > _SHOWN:
        lines.append(f"- and {len(report.problems) - _SHOWN} more")
    lines.append(
        f"{len(report.layers)} weights, {zeros / max(sum(sizes), 1):.2%} zeros, {bad} violations, "
        f"{report.bytes / 1e6:.1f} MB on disk"
    )
    if report.dense:
        lines.append(f"dense, as {SUMMARY} says: {', '.join(report.dense)}")
    if found := report.difference:
        lines.append(
            f"logits: relative difference {found['relative']:.2e}, largest {found['largest']:.2e}, "
            f"KL {found['kl']:.2e} nats, the same next token at {found['agreement']:.2%}"
        )
    compared = "compared with" if report.checksums else "not compared: nothing states"
    lines.append(f"contents {compared} their sha256")
    terminal().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
