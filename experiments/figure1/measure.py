"""Retained saliency and output error of many permutations of a layer (PermLLM, figure 1).

The permutation that retains the most saliency is not the permutation with the smallest output
error.

    python experiments/figure1/measure.py model=smollm2-135m
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.measuring import check_whole, main
from permllm.data.lookup import calibration_text
from permllm.data.windows import calibration_windows
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups, linear_at
from permllm.models.layers import LayerStream
from permllm.models.load import load_model
from permllm.models.offload import placement_of
from permllm.models.selection import pruned_groups
from permllm.permutation.heuristic import heuristic_permutation
from permllm.pruning.phases import member_factors
from permllm.runtime.precision import compute_dtype
from permllm.settings.config import NMPattern, RunConfig, check_divides
from permllm.sparsity.method import instantiate
from permllm.sparsity.nm import nm_mask, permuted_nm_mask, saliency_sum
from permllm.sparsity.saliency import saliency
from permllm.sparsity.statistics import Gram, collecting

# Label, colour, marker and size of the points for each kind of permutation.
_LABELS = {
    "none": ("no permutation", "black", "s", 60),
    "random": ("random", "tab:gray", ".", 18),
    "shuffled heuristic": ("heuristic, some channels shuffled", "tab:orange", ".", 18),
    "raising saliency": ("swaps that retain more saliency", "tab:red", ".", 18),
    "lowering error": ("swaps that lower the error", "tab:blue", ".", 18),
    "lowering error from the heuristic": ("the same from the heuristic on", "tab:cyan", ".", 18),
    "heuristic": ("heuristic", "tab:orange", "^", 70),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement, `measure.NAME=VALUE`.

    Attributes:
        layer: index of the decoder layer; None: the middle layer.
        group: name of the channel group in the layer, as `plan=true` lists it; None: the last
            group, the MLP's output.
        random: number of random permutations, and of heuristic permutations with some channels
            shuffled.
        swaps: number of random swaps that each of the three searches tries: for more saliency, and
            for less error from two starts.
        trace: number of permutations that are recorded along each search.
    """

    layer: int | None = None
    group: str | None = None
    random: int = 200
    swaps: int = 4000
    trace: int = 60

    def __post_init__(self) -> None:
        for name in ("random", "swaps", "trace"):
            check_whole(f"measure.{name}", getattr(self, name), 1)


@dataclass
class Layer:
    """Channel group, with its members' weights one below the other.

    Attributes:
        weight: float32 `(C_out, C_in)`.
        saliency: float32 `(C_out, C_in)`.
        gram: mean of `x^T x` over the input's tokens x, float32 `(C_in, C_in)`.
        pattern: N:M.
    """

    weight: Tensor
    saliency: Tensor
    gram: Tensor
    pattern: NMPattern

    def removed(self, perm: Tensor) -> Tensor:
        """Return the weights that a permutation's mask prunes, zero elsewhere."""
        return self.weight * ~permuted_nm_mask(self.saliency, perm, self.pattern)

    def retained(self, perm: Tensor) -> float:
        """Return the share of the saliency that a permutation retains."""
        mask = permuted_nm_mask(self.saliency, perm, self.pattern)
        return saliency_sum(self.saliency, mask) / max(saliency_sum(self.saliency), 1e-300)

    def error(self, perm: Tensor) -> float:
        """Return `||X (W - W')^T||^2 / ||X W^T||^2` for the mask of a permutation."""
        return self._energy(self.removed(perm)) / self._energy(self.weight)

    def _energy(self, weight: Tensor) -> float:
        return float(((weight @ self.gram) * weight).sum(dtype=torch.float64))


def swaps(
    layer: Layer, start: Tensor, tries: int, keep: int, by_error: bool, generator: torch.Generator
) -> list[Tensor]:
    """Try random swaps of two channels, and keep those that improve the permutation.

    A swap changes the masks of two groups only, so that only their columns S are computed. With the
    removed weights D and `A = D G`, a change E of these columns changes the error `tr(D G D^T)` by
    `2 <E, A_S> + <E G_SS, E>`.

    Args:
        layer: the channel group.
        start: the permutation to start from, int64 `(C_in,)`.
        tries: number of swaps to try.
        keep: number of permutations along the way to return.
        by_error: True: lower the output error; False: raise the retained saliency.
        generator: generator of the swaps.

    Returns:
        Permutations, int64 `(C_in,)`; the last one is the best.
    """
    m = layer.pattern.m
    perm = start.clone()
    removed = layer.removed(perm)
    product = removed @ layer.gram
    trace: list[Tensor] = []
    for attempt in range(1, tries + 1):
        first, second = (
            int(place) for place in torch.randint(len(perm), (2,), generator=generator)
        )
        if first // m != second // m:
            places = torch.cat(
                [torch.arange(m) + first // m * m, torch.arange(m) + second // m * m]
            )
            changed = perm.clone()
            changed[first], changed[second] = perm[second], perm[first]
            columns = changed[places]
            mask = nm_mask(layer.saliency[:, columns], layer.pattern)
            new = layer.weight[:, columns] * ~mask
            change = new - removed[:, columns]
            if by_error:
                corner = layer.gram[columns][:, columns]
                gain = -float(
                    2 * (change * product[:, columns]).sum() + ((change @ corner) * change).sum()
                )
            else:
                before = nm_mask(layer.saliency[:, perm[places]], layer.pattern)
                gain = float(
                    (layer.saliency[:, columns] * mask).sum()
                    - (layer.saliency[:, perm[places]] * before).sum()
                )
            if gain > 0:
                perm = changed
                removed[:, columns] = new
                product += change @ layer.gram[columns]
        if attempt * keep // tries > (attempt - 1) * keep // tries:
            trace.append(perm.clone())
    return trace


def measure(config: RunConfig, own: Settings, device: torch.device) -> dict[str, Any]:
    """Compute retained saliency and output error of every permutation.

    Raises:
        ConfigError: the layer or the channel group does not exist.
    """
    loaded = load_model(config.model, config.seed)
    every = channel_groups(loaded.model)
    groups = pruned_groups(every, config.keep_dense)
    group = _group(groups, own)
    check_divides(config.pattern, group.channels, group.name)
    pruner = instantiate("pruner", config.pruner)
    text = calibration_text(config.calibration)
    tokens = calibration_windows(
        loaded.tokenizer, text, config.calibration, config.seed, loaded.bos
    )
    products = compute_dtype(config.compute_dtype, loaded.model.dtype, device)
    stream = LayerStream(loaded.model, tokens, config.calibration.batch_size, products)
    for index in range(group.layer):
        stream.advance(index)
    with collecting(loaded.model, [group], (*pruner.statistics, Gram)) as statistics:
        stream.advance(group.layer)
    read = statistics[group.name]
    with placement_of(loaded.model).layer(group.layer):
        factors = member_factors(loaded.model, group, pruner, read)
        weights = {path: linear_at(loaded.model, path).weight for path in group.members}
        layer = Layer(
            weight=torch.cat(list(weights.values())).float(),
            saliency=torch.cat(
                [saliency(weight, factors[path]) for path, weight in weights.items()]
            ),
            gram=read[Gram].value / read.tokens,
            pattern=config.pattern,
        )
    points = [
        {
            "order": kind,
            "retained_saliency": layer.retained(perm),
            "output_error": layer.error(perm),
        }
        for kind, perm in _orders(layer, own, config.seed)
    ]
    return {
        "what": "orders of one channel group: share of saliency retained, "
        "squared output error over the squared output",
        "model": loaded.identity,
        "text": calibration_text(config.calibration).digest(calibration=True),
        "group": group.name,
        "members": list(group.members),
        "pruner": config.pruner["name"],
        "sparsity": config.sparsity,
        "points": points,
    }


def _group(groups: list[ChannelGroup], own: Settings) -> ChannelGroup:
    count = max(group.layer for group in groups) + 1
    index = count // 2 if own.layer is None else own.layer
    inside = {group.table.name: group for group in groups if group.layer == index}
    if not inside:
        raise ConfigError(f"measure.layer={index}: the model has the layers 0 to {count - 1}")
    if own.group is None:
        return list(inside.values())[-1]
    if own.group not in inside:
        raise ConfigError(
            f"measure.group={own.group!r} is not valid; valid are {', '.join(inside)}"
        )
    return inside[own.group]


def _orders(layer: Layer, own: Settings, seed: int) -> list[tuple[str, Tensor]]:
    channels = layer.weight.shape[1]
    device = layer.weight.device
    generator = torch.Generator().manual_seed(seed)
    identity = torch.arange(channels)
    heuristic = heuristic_permutation(lambda: [layer.saliency], layer.pattern).cpu()
    found = [("none", identity)]
    found += [("random", torch.randperm(channels, generator=generator)) for _ in range(own.random)]
    for index in range(own.random):
        # The number of shuffled channels goes from two to all, evenly on a logarithmic scale.
        count = round(2 * (channels / 2) ** (index / max(1, own.random - 1)))
        places = torch.randperm(channels, generator=generator)[:count]
        shuffled = heuristic.clone()
        shuffled[places] = heuristic[places[torch.randperm(count, generator=generator)]]
        found.append(("shuffled heuristic", shuffled))
    for kind, start, by_error in (
        ("raising saliency", identity, False),
        ("lowering error", identity, True),
        ("lowering error from the heuristic", heuristic, True),
    ):
        found += [
            (kind, perm) for perm in swaps(layer, start, own.swaps, own.trace, by_error, generator)
        ]
    found.append(("heuristic", heuristic))
    return [(kind, perm.to(device)) for kind, perm in found]


def lines(results: dict[str, Any]) -> list[str]:
    """Return a table of four permutations: none, heuristic, most saliency, smallest error."""
    points = results["points"]
    most = max(points, key=lambda point: point["retained_saliency"])
    least = min(points, key=lambda point: point["output_error"])
    single = {point["order"]: point for point in points if point["order"] in ("none", "heuristic")}
    rows = [
        ("no permutation", single["none"]),
        ("heuristic", single["heuristic"]),
        (f"the most saliency ({_LABELS[most['order']][0]})", most),
        (f"the smallest error ({_LABELS[least['order']][0]})", least),
    ]
    lines = [
        f"{results['group']}, {results['pruner']}, {results['sparsity']}, {len(points)} orders",
        "",
        "| order | saliency retained | output error |",
        "| --- | --- | --- |",
    ]
    return lines + [
        f"| {name} | {p['retained_saliency']:.2%} | {p['output_error']:.4f} |" for name, p in rows
    ]


def draw(results: dict[str, Any], axes: Any) -> None:
    """Draw output error over retained saliency, with a point for each permutation."""
    for kind, (label, color, marker, size) in _LABELS.items():
        points = [point for point in results["points"] if point["order"] == kind]
        x = [100 * point["retained_saliency"] for point in points]
        y = [point["output_error"] for point in points]
        axes.scatter(x, y, s=size, c=color, marker=marker, label=label)
    axes.set_xlabel("saliency retained, %")
    axes.set_ylabel("output error")
    axes.set_title(
        f"{results['group']}, {results['pruner']}, {results['sparsity']}", fontsize="medium"
    )
    axes.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(main(__file__, Settings, measure, lines, draw))
