"""Time of a step of LCP, of plain training, and of LCP with dense permutation matrices.

    python experiments/lcp_speed/measure.py compute_dtype=float32

The measurement uses one decoder layer with random weights. It needs the model's sizes, not its
weights.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.measuring import check_whole, clock, main
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers, linear_at
from permllm.models.layers import layer_inputs, run_layer
from permllm.permutation.foldable import shared_permutations
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.lcp import LCP
from permllm.permutation.lcp.sinkhorn import soft_batches
from permllm.permutation.lcp.temperature import Constant
from permllm.runtime.memory import keep_freed_memory, peak_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, products_in
from permllm.settings.config import NMPattern, RunConfig
from permllm.sparsity.method import instantiate
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.store.environment import hardware
from permllm.store.files import LCP_CHECKPOINT
from permllm.training.kernels import chosen_kernels
from permllm.training.learner import Progress, Stage
from permllm.training.losses import cosine_loss
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.trainer import Trainer

# Tokens of each sequence of a step.
SEQUENCE = 128
_PATTERN = NMPattern(2, 4)
_VARIANTS = ("plain", "lcp", "checkpoint", "dense")


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement, `measure.NAME=VALUE`.

    Attributes:
        tokens: numbers of tokens of a step, multiples of 128.
        block_sizes: block sizes B of LCP.
        repeats: number of measurements after a first one that does not count; medians are
            reported, and variants take turns.
    """

    tokens: list[int] = field(default_factory=lambda: [512, 2048])
    block_sizes: list[int] = field(default_factory=lambda: [32, 64, 128])
    repeats: int = 5

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            check_whole("measure.tokens", tokens, SEQUENCE)
            if tokens % SEQUENCE:
                raise ConfigError(
                    f"measure.tokens={tokens} is not a multiple of {SEQUENCE}, the sequence length"
                )
        for size in self.block_sizes:
            check_whole("measure.block_sizes", size, 4)
        check_whole("measure.repeats", self.repeats, 1)


def measure(config: RunConfig, own: Settings, device: torch.device) -> dict[str, Any]:
    """Measure seconds of all variants."""
    if device.type == "cpu":
        keep_freed_memory()
    rows = [
        _row(config, tokens, size, device, own.repeats)
        for tokens in own.tokens
        for size in own.block_sizes
    ]
    return {"repeats": own.repeats, "rows": rows}


def lines(results: dict[str, Any]) -> list[str]:
    """Return a table of steps."""
    columns = ["layer", "tokens", "B", "products", "plain s", "LCP s", "LCP / plain"]
    columns += ["recomputed s", "dense s", "dense / LCP", "hardening", "peak"]
    lines = [f"Medians of {results['repeats']} repeats.", ""]
    lines += [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for row in results["rows"]:
        cells = [row["shape"], str(row["tokens"]), str(row["block_size"]), row["compute_dtype"]]
        cells += [f"{row['plain_s']:.3f}", f"{row['lcp_s']:.3f}", f"{row['lcp_over_plain']:.2f}"]
        cells += [f"{row['checkpoint_s']:.3f}"]
        cells += (
            [f"{row['dense_s']:.2f}", f"{row['dense_s'] / row['lcp_s']:.1f}"]
            if row["dense_s"]
            else ["-", "-"]
        )
        cells += [f"{row['harden_s'] / row['lcp_s']:.1%}", f"{row['peak_bytes'] / 1e9:.1f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(results: dict[str, Any], axes: Any) -> None:
    """Draw the time of each variant relative to the plain step."""
    rows = results["rows"]
    for place, name in enumerate(_VARIANTS):
        positions = [index + 0.2 * (place - 1.5) for index in range(len(rows))]
        axes.bar(
            positions, [(row[f"{name}_s"] or 0.0) / row["plain_s"] for row in rows], 0.2, label=name
        )
    axes.set_xticks(
        range(len(rows)),
        [f"{row['tokens']} tokens\nB {row['block_size']}" for row in rows],
        fontsize=7,
    )
    axes.set_ylabel("time of a step over the plain step")
    axes.legend()


def _one_layer(config: RunConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model with one decoder layer of the config's sizes, with random weights."""
    if not config.model.architecture:
        raise ConfigError(f"model={config.model.name}: its settings have no architecture")
    settings: dict[str, Any] = dict(config.model.architecture) | {
        "num_hidden_layers": 1,
        "vocab_size": 256,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype
    )
    return model.to(device).eval().requires_grad_(False)


class _PlainStep:
    """Step of plain training: forward and backward with gradients for all weights of the layer."""

    def __init__(self, model: nn.Module, tokens: Tensor, target: Tensor) -> None:
        self.layer = decoder_layers(model)[0]
        self.hidden, self.kwargs = layer_inputs(model, tokens)
        self.target = target

    def __call__(self) -> None:
        """Run a step."""
        self.layer.requires_grad_(True)
        loss = cosine_loss(run_layer(self.layer, self.hidden, self.kwargs[0]), self.target)
        loss.backward()
        self.layer.requires_grad_(False)
        for parameter in self.layer.parameters():
            parameter.grad = None


class DensePermutedLinear(nn.Module):
    """Frozen linear with dense permutation matrices: `x (W * M)^T`, `M = top-N(S P) P^T`."""

    def __init__(self, linear: nn.Linear, factors: SaliencyFactors) -> None:
        super().__init__()
        self.linear = linear
        self.saliency = saliency(linear.weight, factors)
        self.matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `(..., C_out)` for an input `(..., C_in)`."""
        assert self.matrices is not None
        hard, through = self.matrices
        permuted = self.saliency @ through
        groups = permuted.unflatten(1, (-1, _PATTERN.m))
        soft_mask = groups.softmax(-1).flatten(1)
        top = groups.topk(_PATTERN.n, dim=2).indices
        kept = torch.zeros_like(groups).scatter_(2, top, 1.0).flatten(1)
        soft_in_place, kept_in_place = soft_mask @ through.T, kept @ hard.T
        mask = kept_in_place + soft_in_place - soft_in_place.detach()  # straight-through gradient
        return nn.functional.linear(x, self.linear.weight * mask.to(x.dtype), self.linear.bias)


class _DenseStep:
    """Step of LCP as the paper describes it, with a dense C x C matrix for each group."""

    def __init__(self, problem: LearningProblem, block_size: int) -> None:
        self.problem = problem
        self.hidden, self.kwargs = layer_inputs(problem.model, problem.tokens)
        self.logits: dict[str, nn.Parameter] = {}
        self.linears: dict[str, list[DensePermutedLinear]] = {}
        device = next(problem.model.parameters()).device
        for group in problem.groups:
            start = (
                torch.randn(-(-group.channels // block_size), block_size, block_size, device=device)
                * 0.1
            )
            self.logits[group.name] = nn.Parameter(start)
            self.linears[group.name] = [
                DensePermutedLinear(
                    linear_at(problem.model, path), problem.factors[path].to(device)
                )
                for path in group.members
            ]
        self.optimizer = torch.optim.AdamW(self.logits.values(), lr=1e-3)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the plain linears by those with dense matrices inside the context."""
        plain = {
            path: linear_at(self.problem.model, path)
            for group in self.problem.groups
            for path in group.members
        }
        for group in self.problem.groups:
            for path, linear in zip(group.members, self.linears[group.name], strict=True):
                self.problem.model.set_submodule(path, linear)
        try:
            yield
        finally:
            for path, module in plain.items():
                self.problem.model.set_submodule(path, module)

    def __call__(self) -> None:
        """Run a step."""
        for group in self.problem.groups:
            soft = self._sinkhorn(self.logits[group.name])
            size = soft.shape[-1]
            dense = torch.block_diag(*soft)[: group.channels, : group.channels]
            hard = torch.zeros_like(dense)
            for index, block in enumerate(soft.detach()):
                rows = harden([block[None]])[0][0].to(dense.device) + index * size
                columns = torch.arange(size, device=dense.device) + index * size
                inside = (rows < group.channels) & (columns < group.channels)
                hard[rows[inside], columns[inside]] = 1.0
            for linear in self.linears[group.name]:
                linear.matrices = (hard, hard + dense - dense.detach())
        layer = decoder_layers(self.problem.model)[0]
        hidden = run_layer(layer, self.hidden, self.kwargs[0])
        loss = cosine_loss(hidden, self.problem.target.to(hidden.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        for linears in self.linears.values():
            for linear in linears:
                linear.matrices = None

    @staticmethod
    def _sinkhorn(logits: Tensor) -> Tensor:
        log_p = logits / 0.5
        for _ in range(5):
            log_p = log_p - log_p.logsumexp(2, keepdim=True)
            log_p = log_p - log_p.logsumexp(1, keepdim=True)
        return log_p.exp()


def _problem(model: nn.Module, tokens: Tensor, target: Tensor) -> LearningProblem:
    """Return the problem of learning the layer's permutations for a target output.

    The saliency is Wanda's with random input norms.
    """
    groups = channel_groups(model)
    generator = torch.Generator().manual_seed(0)
    factors = {
        path: SaliencyFactors(1, torch.rand(1, group.channels, generator=generator) + 0.5)
        for group in groups
        for path in group.members
    }
    return LearningProblem(model, groups, tokens, factors, target, tokens, _PATTERN, seed=0)


def _row(
    config: RunConfig, count: int, block_size: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Measure all variants in turn, `repeats` times after a first time that does not count.

    Returns:
        Medians in seconds: `plain_s`, forward and backward with gradients for all weights; `lcp_s`,
        a step of LCP on the same layer (Sinkhorn, assignment, forward, backward, AdamW on the
        logits); `checkpoint_s`, the same with the layer recomputed in backward; `dense_s`, a step
        with C x C permutation matrices; `harden_s`, the part of `lcp_s` for the assignment.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = _one_layer(config, device, dtype)
    tokens = torch.randint(
        0, 256, (count // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(0)
    )
    shape = (*tokens.shape, int(config.model.architecture["hidden_size"]))
    target = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    problem = _problem(model, tokens, target)
    everything = torch.arange(len(tokens))
    settings = config.permutation | {
        "block_size": block_size,
        "temperature": Constant(0.5),
        "loss": "cosine",
        "epochs": 1000,
    }
    plain = _PlainStep(model, tokens, target.to(device))
    times: dict[str, list[float]] = {
        name: [] for name in ("plain", "lcp", "dense", "checkpoint", "harden")
    }
    dense = _DenseStep(problem, block_size) if _dense_fits(problem.groups, device) else None
    compute = compute_dtype(config.compute_dtype, dtype, device)
    compiled = instantiate("permutation", settings | {"compile": True})
    kernels = chosen_kernels(compiled, problem, problem.groups)
    shared = shared_permutations(problem.groups, "free")
    orders = {order.name: torch.arange(order.channels) for order in shared}
    stage = Stage(0, range(1), None, problem.target)
    progress = Progress(1, 2, 0, 1)
    # The logits of both change from step to step, as in a run, because the assignment of constant
    # logits is faster.
    logits = {
        name: instantiate("permutation", settings).start_logits(problem, shared, orders)
        for name in ("lcp", "checkpoint")
    }
    peak = 0
    for repeat in range(repeats + 1):
        with products_in(compute, device):
            found = {"plain": clock(plain, device)}
            for name, recompute in (("lcp", False), ("checkpoint", True)):
                lcp: LCP = instantiate(
                    "permutation", settings | {"activation_checkpointing": recompute}
                )
                with lcp.masked_linears(problem, shared, stage, kernels) as linears:
                    learner = lcp.learner(shared, orders, logits[name], linears)
                    objective = Objective(lcp, problem, stage, learner)
                    trainer = Trainer(objective, "lcp", LCP_CHECKPOINT)
                    # Not timed, because the first step of an optimizer allocates its moments.
                    trainer.step(everything, progress)
                    reset_peak_memory(device)
                    found[name] = clock(
                        lambda trainer=trainer: trainer.step(everything, progress), device
                    )  # type: ignore[misc]
                    if name == "lcp":
                        peak = max(peak, peak_memory(device))
                        batches = soft_batches(
                            logits[name], lcp.temperature(0.0), 2 * lcp.sinkhorn_iterations
                        )
                        softs = [batch.soft for batch in batches]
                        found["harden"] = clock(lambda softs=softs: harden(softs), device)  # type: ignore[misc]
            if dense is not None:
                with dense.installed():
                    found["dense"] = clock(dense, device)
        if repeat:
            for name, seconds in found.items():
                times[name].append(seconds)
    row: dict[str, Any] = {
        "shape": config.model.name,
        "tokens": count,
        "block_size": block_size,
        "device": str(device),
    }
    row |= {
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": str(compute).removeprefix("torch."),
    }
    row["peak_bytes"] = peak
    for name, values in times.items():
        row[f"{name}_s"] = statistics.median(values) if values else None
        row[f"{name}_spread_s"] = [min(values), max(values)] if values else None
    row["lcp_over_plain"] = row["lcp_s"] / row["plain_s"]
    row["dense_over_lcp"] = row["dense_s"] / row["lcp_s"] if row["dense_s"] else None
    return row


def _dense_fits(groups: list[ChannelGroup], device: torch.device) -> bool:
    """Tell if six C x C matrices for each group and eight of each linear's size fit into memory."""
    needed = sum(
        6 * 4 * group.channels**2 + 8 * 4 * group.channels * sum(group.rows) for group in groups
    )
    if device.type == "cuda":
        return needed < 0.8 * torch.cuda.get_device_properties(device).total_memory
    return needed < 0.8 * int(hardware(device)["memory_bytes"])


if __name__ == "__main__":
    sys.exit(main(__file__, Settings, measure, lines, draw))
