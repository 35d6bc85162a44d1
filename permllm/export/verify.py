"""Command `permllm verify`: reload a checkpoint, check N:M in stored order, compare logits."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.command import Answer
from permllm.errors import ConfigError
from permllm.export.write import check_files, read_summary
from permllm.models.checkpoint import check_runs, read_weights, vocabulary_of
from permllm.models.families import channel_groups, linear_at
from permllm.models.selection import recorded_groups
from permllm.settings.checkpoints import weight_files
from permllm.settings.config import NMPattern, check_divides
from permllm.sparsity.nm import violations
from permllm.store.files import SUMMARY

_SEQUENCES = 4
_LENGTH = 64
_TWO_OF_FOUR = NMPattern(2, 4)


def verify(
    folder: Path, pattern: NMPattern | None = None, against: Path | None = None
) -> dict[str, Any]:
    """Check a checkpoint that transformers can load, an export of PermLLM or any other.

    Args:
        folder: folder of the checkpoint.
        pattern: expected N:M of every linear; None: the N:M that an export states, else 2:4.
        against: folder of a checkpoint whose logits are compared; None: none are.

    Returns:
        Plain values:

        - `passed`: every linear has its expected N:M in stored order;
        - `by_row`: True: the export has the form `simulate`, which is N:M in the permuted order of
          its run. Without `pattern`, its rows must have the zeros of N:M instead;
        - `problems`: a line for each problem;
        - `pattern`: expected N:M;
        - `zeros`: share of zeros in all weights that should be sparse;
        - `layers`: for each of these weights its `name`, its share of `zeros`, and `violations`,
          the number of groups of M with more than N nonzeros in stored order;
        - `dense`: names of the linears' weights that the export states to be dense;
        - `bytes`: size of all files with weights;
        - `checksums`: the files were compared with the sha256 that an export states;
        - `difference`: difference of logits (`logits_difference`); None: it was not measured.

    Raises:
        ConfigError: the model has no known linears, or M does not divide the channels.
        DataError: a file is missing, damaged or changed, or the folder is no checkpoint.
    """
    summary = read_summary(folder)
    if summary:
        check_files(folder, summary)
    model = read_weights(folder, None, torch.device("cpu"))
    check_runs(folder, model)
    return {
        **_checked(model, summary, pattern),
        "bytes": sum(file.stat().st_size for file in weight_files(folder)),
        "checksums": summary is not None,
        "difference": logits_difference(folder, against) if against else None,
    }


def _checked(
    model: PreTrainedModel, summary: dict[str, Any] | None, pattern: NMPattern | None
) -> dict[str, Any]:
    """Return the values of `verify` that the weights of the linears decide."""
    every = channel_groups(model)
    groups = every
    expected = pattern or _TWO_OF_FOUR
    by_row = False
    if summary and not pattern:
        expected = NMPattern.parse(summary["sparsity"], f"{SUMMARY}: sparsity")
        groups = recorded_groups(every, summary.get("patterns", {}))
        by_row = summary.get("form") == "simulate"
    paths = [path for group in groups for path in group.members]
    dense = {path for group in every for path in group.members}.difference(paths)
    weights = {f"{path}.weight": linear_at(model, path).weight for path in paths}
    problems = []
    layers = []
    for name, weight in weights.items():
        check_divides(expected, weight.shape[1], name)
        count = violations(weight, None, expected)
        layers.append({"name": name, "zeros": _zeros([weight]), "violations": count})
        nonzeros = weight.count_nonzero(1)
        rows = int((nonzeros * expected.m > weight.shape[1] * expected.n).sum())
        if by_row and rows:
            problems.append(f"{name} has {rows} rows with fewer zeros than {expected}")
        elif count and not by_row:
            problems.append(f"{name} has {count} groups that are not {expected}")
    return {
        "passed": not problems,
        "by_row": by_row,
        "problems": problems,
        "pattern": str(expected),
        "zeros": _zeros([*weights.values()]),
        "layers": layers,
        "dense": sorted(f"{path}.weight" for path in dense),
    }


def _zeros(weights: list[Tensor]) -> float:
    nonzeros = sum(int(weight.count_nonzero()) for weight in weights)
    return 1 - nonzeros / sum(weight.numel() for weight in weights)


@torch.no_grad()
def logits_difference(first: Path, second: Path) -> dict[str, float]:
    """Compare the logits of two checkpoints on random tokens, in float32.

    Returns:
        With logits x of the first checkpoint and y of the second: `largest`, max |x - y|;
        `relative`, ||x - y|| / ||y||; `kl`, the mean of KL(softmax(y) || softmax(x)) over tokens,
        in nats; `agreement`, the share of tokens with the same most likely next token.
    """
    logits = []
    for folder in (first, second):
        model = read_weights(folder, torch.float32, torch.device("cpu")).eval()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary_of(model), (_SEQUENCES, _LENGTH), generator=generator)
        logits.append(model(input_ids=tokens).logits.double())
    x, y = logits
    if x.shape != y.shape:
        raise ConfigError(f"{first} and {second} have vocabularies of different sizes")
    nats = nn.functional.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="none"
    )
    return {
        "largest": float((x - y).abs().max()),
        "relative": float((x - y).norm() / y.norm()),
        "kl": float(nats.sum(-1).mean()),
        "agreement": float((x.argmax(-1) == y.argmax(-1)).double().mean()),
    }


def work(options: argparse.Namespace) -> Answer:
    """Run the command `permllm verify`."""
    disable_progress_bar()
    set_verbosity_error()  # the report has what transformers warns of
    pattern = NMPattern.parse(options.pattern, "--pattern") if options.pattern else None
    report = verify(options.folder, pattern, options.against)
    return Answer(report, lambda: _show(options.folder, report), int(not report["passed"]))


def _show(folder: Path, report: dict[str, Any]) -> None:
    verdict = "passed" if report["passed"] else "FAILED"
    lines = [f"{verdict}: {folder}, {report['pattern']} in stored order"]
    if report["by_row"]:
        lines = [
            f"{verdict}: {folder}, {report['pattern']} zeros in every row",
            "export=simulate keeps the dense model's channels, so it is not N:M as stored",
        ]
    lines += [f"- {problem}" for problem in report["problems"]]
    groups = sum(layer["violations"] for layer in report["layers"])
    lines.append(
        f"{len(report['layers'])} weights, {report['zeros']:.2%} zeros, {groups} violations, "
        f"{len(report['dense'])} dense weights, {report['bytes'] / 1e6:.1f} MB on disk"
    )
    if report["difference"]:
        lines.append(
            "logits: relative difference {relative:.2e}, largest {largest:.2e}, KL {kl:.2e} nats, "
            "the same next token at {agreement:.2%}".format(**report["difference"])
        )
    if report["checksums"]:
        lines.append("files compared with their sha256")
    print("\n".join(lines))
