"""Time one LCP step against plain training and against dense permutation matrices, interleaved, in one run.

    python scripts/benchmark_lcp.py --shapes smollm2-135m --tokens 512 2048 --block-sizes 32 64 128 --json lcp.json

`--plot` needs matplotlib: pip install -e '.[plot]'. Per row, medians over the repeats, in seconds:

    plain_s       forward and backward of one decoder layer with gradients for all weights
    lcp_s         one step of LCP on the same layer: Sinkhorn, assignment, forward, backward, AdamW on the logits
    dense_s       the same with explicit C x C permutation matrices for saliency, hard and soft mask, as the paper describes
    checkpoint_s  as lcp_s, with the layer recomputed in backward
    harden_s      the part of lcp_s that turns soft into hard permutations
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.calibration.saliency import SaliencyFactors, saliency
from permllm.config import COMPUTE_DTYPES, read_config, register_resolvers
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers, linear_at
from permllm.models.losses import cosine_loss
from permllm.nodes import register
from permllm.permutation.heuristic import assignment_scores
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.kernels import EAGER, KernelUse, compiled_kernels
from permllm.permutation.lcp.method import LCP
from permllm.permutation.lcp.temperature import Linear
from permllm.permutation.lcp.training import Training, Window, masked_linears
from permllm.permutation.problem import LearningProblem
from permllm.permutation.shared import shared_orders
from permllm.record.environment import hardware, versions
from permllm.runtime.memory import keep_freed_memory, peak_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, products_in
from permllm.runtime.timing import clock
from permllm.sparsity import NMPattern

ROOT = Path(__file__).parent.parent
PATTERN = NMPattern(2, 4)
SEQUENCE = 128


def one_layer(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A random model with one decoder layer of the shape of a model in conf/model."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = read_config(compose("config", overrides=[f"model={shape}"]))
    settings = dict(config.model.architecture) | {"num_hidden_layers": 1, "vocab_size": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


class PlainStep:
    """Forward and backward with gradients for all weights of the layer."""

    def __init__(self, model: nn.Module, tokens: Tensor, target: Tensor) -> None:
        self.layer = decoder_layers(model)[0]
        self.inputs = layer_inputs(model, tokens)
        self.target = target

    def __call__(self) -> None:
        """One step."""
        self.layer.requires_grad_(True)
        loss = cosine_loss(run_layer(self.layer, self.inputs.hidden, self.inputs.kwargs[0]), self.target)
        loss.backward()
        self.layer.requires_grad_(False)
        for parameter in self.layer.parameters():
            parameter.grad = None


class DensePermutedLinear(nn.Module):
    """A frozen linear under dense permutation matrices: `x (W * M)^T`, `M = top-N(S P) P^T`, soft in backward."""

    def __init__(self, linear: nn.Linear, factors: SaliencyFactors) -> None:
        super().__init__()
        self.linear = linear
        self.saliency = saliency(linear.weight, factors)
        self.matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., C_in)` to `(..., C_out)`."""
        assert self.matrices is not None
        hard, through = self.matrices
        permuted = self.saliency @ through
        groups = permuted.unflatten(1, (-1, PATTERN.m))
        soft_mask = groups.softmax(-1).flatten(1)
        top = groups.topk(PATTERN.n, dim=2).indices
        kept = torch.zeros_like(groups).scatter_(2, top, 1.0).flatten(1)
        soft_in_place, kept_in_place = soft_mask @ through.T, kept @ hard.T
        mask = kept_in_place + soft_in_place - soft_in_place.detach()  # straight through
        return nn.functional.linear(x, self.linear.weight * mask.to(x.dtype), self.linear.bias)


class DenseStep:
    """The paper's way, from its description: one dense C x C matrix a group, one assignment call a block."""

    def __init__(self, problem: LearningProblem, block_size: int) -> None:
        self.problem = problem
        self.inputs = layer_inputs(problem.model, problem.tokens)
        self.logits: dict[str, nn.Parameter] = {}
        self.linears: dict[str, list[DensePermutedLinear]] = {}
        device = next(problem.model.parameters()).device
        for group in problem.groups:
            start = torch.randn(-(-group.channels // block_size), block_size, block_size, device=device) * 0.1
            self.logits[group.name] = nn.Parameter(start)
            self.linears[group.name] = [
                DensePermutedLinear(linear_at(problem.model, path), problem.factors[path].to(device)) for path in group.members
            ]
        self.optimizer = torch.optim.AdamW(self.logits.values(), lr=1e-3)

    @contextmanager
    def installed(self) -> Any:
        """The dense linears in the places of the plain ones."""
        plain = {path: linear_at(self.problem.model, path) for group in self.problem.groups for path in group.members}
        for group in self.problem.groups:
            for path, linear in zip(group.members, self.linears[group.name], strict=True):
                self.problem.model.set_submodule(path, linear)
        try:
            yield
        finally:
            for path, module in plain.items():
                self.problem.model.set_submodule(path, module)

    def __call__(self) -> None:
        """One step."""
        for group in self.problem.groups:
            soft = self._sinkhorn(self.logits[group.name])
            size = soft.shape[-1]
            dense = torch.block_diag(*soft)[: group.channels, : group.channels]
            hard = torch.zeros_like(dense)
            for index, block in enumerate(soft.detach()):
                rows = harden(block[None])[0].to(dense.device) + index * size
                columns = torch.arange(size, device=dense.device) + index * size
                inside = (rows < group.channels) & (columns < group.channels)
                hard[rows[inside], columns[inside]] = 1.0
            for linear in self.linears[group.name]:
                linear.matrices = (hard, hard + dense - dense.detach())
        layer = decoder_layers(self.problem.model)[0]
        hidden = run_layer(layer, self.inputs.hidden, self.inputs.kwargs[0])
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


def problem_of(model: nn.Module, tokens: Tensor, target: Tensor) -> LearningProblem:
    """Learn the layer's order against a target, with Wanda's saliency under random input norms."""
    groups = channel_groups(model)
    generator = torch.Generator().manual_seed(0)
    factors = {
        path: SaliencyFactors(1, torch.rand(1, group.channels, generator=generator) + 0.5)
        for group in groups
        for path in group.members
    }
    return LearningProblem(model, groups, tokens, factors, target, PATTERN, seed=0)


def measure(shape: str, count: int, block_size: int, device: torch.device, repeats: int, products: str) -> dict[str, Any]:
    """One row: all variants in turn, `repeats` times after one warm-up, their products in the format `products`."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = one_layer(shape, device, dtype)
    tokens = torch.randint(0, 256, (count // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(0))
    hidden = model.config.hidden_size  # type: ignore[union-attr]
    target = torch.randn(*tokens.shape, hidden, generator=torch.Generator().manual_seed(1), dtype=dtype)  # type: ignore[call-overload]
    problem = problem_of(model, tokens, target)
    everything = torch.arange(len(tokens))
    settings: dict[str, Any] = {"block_size": block_size, "temperature": Linear(), "loss": "cosine", "epochs": 1000}
    plain = PlainStep(model, tokens, target.to(device))
    times: dict[str, list[float]] = {name: [] for name in ("plain", "lcp", "dense", "checkpoint", "harden")}
    dense = DenseStep(problem, block_size) if _dense_fits(problem.groups, device) else None
    compute = compute_dtype(products, dtype, device)
    kernels = compiled_kernels(KernelUse(device.type, weights=dtype, products=compute)) or EAGER
    shared = shared_orders(problem.groups, "free")
    orders = {order.name: torch.arange(order.channels) for order in shared}
    window = Window(0, 0, 0, 1, shared, shared, None, problem.target)
    # Both learn on from step to step, as a run does: an order that never changes would be assigned sooner.
    logits = {name: LCP(**settings).start_logits(problem, shared, orders, near=True) for name in ("lcp", "checkpoint")}
    peak = 0
    for repeat in range(repeats + 1):
        with products_in(compute, device):
            found = {"plain": clock(plain, device)}
            for name, recompute in (("lcp", False), ("checkpoint", True)):
                lcp = LCP(**settings, activation_checkpointing=recompute)
                with masked_linears(lcp, problem, window, kernels) as linears:
                    training = Training(lcp, problem, shared, window, orders, logits[name], linears)
                    training.step(everything, 0.5)  # the first step of an optimizer allocates its moments
                    reset_peak_memory(device)
                    found[name] = clock(lambda training=training: training.step(everything, 0.5), device)  # type: ignore[misc]
                    if name == "lcp":
                        peak = max(peak, peak_memory(device))
                        found["harden"] = training.harden_seconds
            if dense is not None:
                with dense.installed():
                    found["dense"] = clock(dense, device)
        if repeat:
            for name, seconds in found.items():
                times[name].append(seconds)
    row: dict[str, Any] = {"shape": shape, "tokens": count, "block_size": block_size, "device": str(device)}
    row |= {"dtype": str(dtype).removeprefix("torch."), "compute_dtype": str(compute).removeprefix("torch.")}
    row["peak_bytes"] = peak
    for name, values in times.items():
        row[f"{name}_s"] = statistics.median(values) if values else None
        row[f"{name}_spread_s"] = [min(values), max(values)] if values else None
    row["lcp_over_plain"] = row["lcp_s"] / row["plain_s"]
    row["dense_over_lcp"] = row["dense_s"] / row["lcp_s"] if row["dense_s"] else None
    return row


def _dense_fits(groups: list[ChannelGroup], device: torch.device) -> bool:
    """Six matrices of C x C a group and eight of the layer's size a linear, in float32, against the memory there is."""
    needed = sum(6 * 4 * group.channels**2 + 8 * 4 * group.channels * sum(group.rows) for group in groups)
    if device.type == "cuda":
        return needed < 0.8 * torch.cuda.get_device_properties(device).total_memory
    return needed < 0.8 * int(hardware(device)["memory_bytes"])


def heuristic_row(channels: int, device: torch.device, repeats: int, loop_groups: int = 16) -> dict[str, Any]:
    """Our score matrix of one position against the per-group loop of RIA's description, timed on some groups and scaled."""
    scores = torch.rand(channels, channels, generator=torch.Generator().manual_seed(0)).pow(3).to(device)
    perm = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    places = perm.view(-1, PATTERN.m).to(device)
    count = len(places)
    moving = scores[:, places[:, 0]]

    def loop() -> Tensor:
        rows = []
        for group in range(loop_groups):
            others = scores[:, places[group, 1:]].unsqueeze(1).expand(-1, count, -1)
            candidates = torch.cat([moving.unsqueeze(2), others], dim=2)
            rows.append(candidates.topk(PATTERN.n, dim=2).values.sum((0, 2)))
        return torch.stack(rows, dim=1)

    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(clock(lambda: assignment_scores(scores, perm, 0, PATTERN), device))
        theirs.append(clock(loop, device) * count / loop_groups)
    found = assignment_scores(scores.double(), perm, 0, PATTERN)[:, :loop_groups]
    difference = loop().double() - found
    difference = difference - difference[:1]  # a constant of the group
    return {
        "channels": channels,
        "rows": channels,
        "device": str(device),
        "ours_s": statistics.median(ours),
        "loop_s": statistics.median(theirs),
        "loop_over_ours": statistics.median(theirs) / statistics.median(ours),
        "loop_groups_timed": loop_groups,
        "loop_groups_scaled_to": count,
        "relative_difference": float(difference.abs().max() / found.abs().max()),
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars of each variant relative to the plain step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.1 * len(rows), 4), layout="constrained")
    positions = torch.arange(len(rows)).numpy()
    for offset, name in enumerate(("plain", "lcp", "checkpoint", "dense")):
        heights = [(row[f"{name}_s"] or 0.0) / row["plain_s"] for row in rows]
        bars = axes.bar(positions + 0.2 * (offset - 1.5), heights, 0.2, label=name)
        axes.bar_label(bars, fmt=lambda height: f"{height:.1f}" if height else "", fontsize=7)
    axes.set_xticks(positions, [f"{row['shape']}\n{row['tokens']} tokens\nB {row['block_size']}" for row in rows], fontsize=7)
    axes.set_ylabel("time of a step over the plain step")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "qwen2.5-7b", "llama-2-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-dtype", default="float32", choices=COMPUTE_DTYPES, help="of matrix products, on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heuristic-channels", type=int, default=4096, help="0 leaves the heuristic out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    register_resolvers()
    register()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    result: dict[str, Any] = {"hardware": hardware(device), "versions": versions(), "repeats": arguments.repeats, "rows": []}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for shape in arguments.shapes:
        for count in arguments.tokens:
            for block_size in arguments.block_sizes:
                row = measure(shape, count, block_size, device, arguments.repeats, arguments.compute_dtype)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                save()
    if arguments.heuristic_channels:
        result["heuristic"] = heuristic_row(arguments.heuristic_channels, device, arguments.repeats)
        print(json.dumps(result["heuristic"]), flush=True)
    save()
    if arguments.plot:
        plot(result["rows"], arguments.plot)


if __name__ == "__main__":
    main()
