"""What a run takes, by its settings and the model's shapes: memory by stage and placement, products, weights that travel.

A number here is an estimate. Memory is that of the tensors that exist together; a test holds it beside what is measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from permllm.config import PLACEMENTS, NMPattern, Placement, RunConfig
from permllm.mask.base import MaskPlan
from permllm.models.families import channel_groups, decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.models.selection import groups_to_prune
from permllm.permutation.base import LearningPlan
from permllm.runtime import parallel
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype
from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.gram import Gram
from permllm.training.losses import chunk_of
from permllm.training.objective import KEPT_ON_A_HOST, kept_a_token

# Of the memory that there is, what a run may be estimated to take: estimates are right to within 15 %.
FITS = 0.85
# Tokens that a text of evaluation is taken to have where all of it is measured: WikiText-2 test has 280,000 to 340,000.
_WHOLE_TEXT = 300_000


def placements(config: RunConfig) -> list[Placement]:
    """Those that a job can have, the fastest first: one process has nobody to share with, a random model no files."""
    without = {"sharded"} if parallel.world_size() == 1 else set()
    without |= {"disk"} if config.model.source == "random" else set()
    return [name for name in PLACEMENTS if name not in without]


@dataclass(frozen=True)
class Learning:
    """What learns in a stage.

    Attributes:
        name: of the stage.
        method: that learns.
        parameters: that learn in the largest window.
        windows: first decoder layer and the one after the last of each.
        waiting: bytes that wait for backward, beside activations.
    """

    name: str
    method: Any
    parameters: int
    windows: list[tuple[int, int]]
    waiting: int = 0

    @property
    def depth(self) -> int:
        """Layers of the largest window."""
        return max(stop - first for first, stop in self.windows)


@dataclass(frozen=True)
class Needs:
    """What a placement of the weights needs.

    Attributes:
        stages: bytes on the device, by stage.
        host: bytes on the host beside it.
    """

    stages: dict[str, int]
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device in the largest stage."""
        return max(self.stages.values())


class Footprint:
    """What a run takes.

    Args:
        config: of the run.
        model: on the meta device.
        pruner, permutation, mask, reconstruction: the methods.
        device: where it computes.

    Attributes:
        every: all channel groups of the model.
        groups: those that are pruned.
        orders: what orders learn; None where they do not.
        masks: what masks learn; None where they do not.
        weights: how many weights are pruned to what.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        pruner: Pruner,
        permutation: Any,
        mask: Any,
        reconstruction: Any,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self._pruner, self._permutation, self._mask, self._reconstruction = pruner, permutation, mask, reconstruction
        self.every, self.groups = channel_groups(model), groups_to_prune(model, config)
        self.layers = len(decoder_layers(model))
        self.masks: MaskPlan | None = mask.plan(self.groups, self.layers) if mask.learned else None
        self.orders: LearningPlan | None = permutation.plan(self.groups, self.layers) if permutation.learned else None
        self.weights: Counter[NMPattern] = Counter()
        for group in self.groups:
            self.weights[group.pattern or config.pattern] += group.channels * sum(group.rows)
        self.item = torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size()

    @cached_property
    def parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def of_layers(self) -> list[int]:
        """Parameters of each decoder layer."""
        return [sum(value.numel() for value in layer.parameters()) for layer in decoder_layers(self.model)]

    @property
    def _product_item(self) -> int:
        """Bytes of a number in a product."""
        return compute_dtype(self.config.compute_dtype, getattr(torch, self.config.model.dtype), self.device).itemsize

    @property
    def reconstructs(self) -> bool:
        """Kept weights learn."""
        return bool(self._reconstruction.learned)

    @property
    def kept(self) -> int:
        """Weights that pruning keeps."""
        return sum(count * pattern.n // pattern.m for pattern, count in self.weights.items())

    @cached_property
    def learning(self) -> list[Learning]:
        """What learns, in its order."""
        found = []
        if self.orders and self.orders.windows:
            depth = max(stop - first for first, stop in self.orders.windows)
            share = self.layers - self.orders.windows[0][0]
            of_window = self.orders.logits * depth // share
            waiting = 4 * of_window  # the gradients of soft permutations
            found.append(Learning("learn", self._permutation, of_window, self.orders.windows, waiting))
        if self.masks:
            most = max(self.masks_by_window)
            # A masked weight in the format of the products.
            waiting = self._product_item * most if self.masks.keeps_masked else 0
            found.append(Learning("learn masks", self._mask, most, self.masks.windows, waiting))
        if self.reconstructs:
            waiting = 4 * self.kept  # places
            # Half-precision weights learn as float32 copies and are read as they are; float32 ones are rounded.
            waiting += 2 * sum(self.weights.values()) if self.config.model.dtype == "float32" else 0
            windows = [(0, self.layers)]
            found.append(Learning("learn weights", self._reconstruction, self.kept, windows, waiting))
        return found

    @property
    def masks_by_window(self) -> list[int]:
        """How many parameters of masks learn in each window."""
        assert self.masks is not None
        sizes: Mapping[int, int] = self.masks.parameters
        return [sum(sizes.get(layer, 0) for layer in range(first, stop)) for first, stop in self.masks.windows]

    @property
    def streamed(self) -> int:
        """Bytes of the weights that come to the device in each pass over the layers, where they wait elsewhere."""
        return sum(self.of_layers) * self.item

    @property
    def _pinned(self) -> int:
        """Bytes that the layers take in pinned memory, of which torch gives each tensor a power of two."""
        sizes = [value.numel() * self.item for layer in decoder_layers(self.model) for value in layer.parameters()]
        return sum(1 << (size - 1).bit_length() for size in sizes)

    @property
    def _measured(self) -> int:
        """Tokens of a text whose perplexity is measured."""
        perplexity = self.config.evaluation.perplexity
        return perplexity.limit * perplexity.seqlen if perplexity.limit else _WHOLE_TEXT

    def needs(self, placement: str) -> Needs:
        """Memory with the weights in a placement."""
        streams = placement in ("disk", "sharded") or (placement == "host" and self.device.type != "cpu")
        stages: dict[str, float] = {"weights": 0, "evaluate": self._evaluating, "calibrate": self._statistics(self._pruner)}
        if not self._mask.local and self._mask.statistics:
            # A group's weights and their mask, in order, and what a refinement keeps of them up to date.
            stages["refine masks"] = self._statistics(self._mask) + 6 * 4 * self._largest
        if self.config.further and self.device.type == "cpu":
            # The target of further windows is there once more while that of all is put together, beside no stream.
            again = max(0, self.config.further - 2 * self._streamed_samples) * self._state
            stages["target"] = self._statistics() + again
        for learning in self.learning:
            stages[learning.name] = self._held_by(learning, streams)
        # The new weights of a layer beside the old ones, while their outputs are compared.
        new = max(self.of_layers) * self.item
        stages["prune"] = self._statistics(self._pruner, self._reconstruction) + new + 4 * 2 * self._largest
        weights = self._weights(placement, streams)
        on_device = {name: math.ceil(weights + size) for name, size in stages.items()}
        return Needs(on_device, math.ceil(self._beside(placement, streams)))

    def _weights(self, placement: str, streams: bool) -> int:
        """Bytes of the weights on the device."""
        # Of the layers that come and go there are two: the one that is computed with, and the next, or its file's. A GPU may
        # still compute with the one before when the host has left it.
        there = min(len(self.of_layers), 3 if self.device.type == "cuda" and placement != "sharded" else 2)
        held = self.parameters * self.item - (self.streamed - there * max(self.of_layers) * self.item if streams else 0)
        return held + (self.streamed // parallel.world_size() if placement == "sharded" else 0)

    @cached_property
    def _pruned(self) -> int:
        """Weights of the linears that there are."""
        return sum(group.channels * sum(group.rows) for group in self.every)

    @cached_property
    def _largest(self) -> int:
        """Weights of the largest group."""
        return max(group.channels * sum(group.rows) for group in self.every)

    @cached_property
    def _widest(self) -> int:
        """Outputs of the widest group."""
        return max(sum(group.rows) for group in self.every)

    @property
    def _evaluating(self) -> int:
        """Bytes of the logits, of which those of a batch's tokens exist together, and in float32 those of a window."""
        perplexity, vocabulary, item = self.config.evaluation.perplexity, self.model.config.vocab_size, self.item
        of_batch = tokens_at_a_time(vocabulary, max(perplexity.batch_tokens, perplexity.seqlen))
        of_window = tokens_at_a_time(vocabulary, perplexity.seqlen)
        # In float32 as logarithms, and before it where that is another format.
        return (of_batch * item + of_window * (4 if item == 4 else 8)) * vocabulary

    def _statistics(self, *methods: Any) -> int:
        """Bytes of a layer's forward and of the statistics of inputs that methods ask for there."""
        config, hidden = self.config.calibration, self.model.config.hidden_size
        channels = max(group.channels for group in self.every)
        asked = dict.fromkeys(statistic for method in methods for statistic in method.statistics)
        forward = config.batch_size * config.seqlen * (6 * hidden + 2 * self._widest) * self.item
        return forward + sum(kind.memory(channels) for kind in asked)

    def _held_by(self, learning: Learning, streams: bool) -> float:
        """Bytes of what learns and of what a step takes."""
        method, depth = learning.method, learning.depth
        hidden, vocabulary, item = self.model.config.hidden_size, self.model.config.vocab_size, self.item
        mine = -(-method.batch_size // parallel.world_size())
        together = min(mine, getattr(method, "micro_batch_size", None) or mine)
        tokens = together * self.config.calibration.seqlen
        # What backward needs of all layers where that is little, else the states between layers and one layer's internals.
        gathers = method is self._mask and self.config.permutation.get("name") != "none"
        activations = tokens * kept_a_token(self.every, hidden, item, gathers) * item * depth
        recomputes = getattr(method, "activation_checkpointing", None)
        if streams or recomputes or (recomputes is None and activations > KEPT_ON_A_HOST):
            activations = tokens * (hidden * depth + 8 * hidden + 4 * self._widest) * item
        # Where the loss goes through the head: its weight in the format of the products, unless it is in it, and four
        # numbers a token and a word.
        words = chunk_of(self.device, vocabulary) * vocabulary if _through_the_head(method) else 0
        # Parameters, their gradient and two moments; a layer's masked weight and the gradient of it.
        held = 16 * learning.parameters + learning.waiting + activations + 3 * self._largest * item
        return held + 4 * 4 * words + (2 * vocabulary * hidden if words and item > 2 else 0)

    @property
    def _state(self) -> int:
        """Bytes of a sample between two layers."""
        return self.config.calibration.seqlen * self.model.config.hidden_size * self.item

    @property
    def _streamed_samples(self) -> int:
        """Samples of a stream of states: of all that is learned from in stages, else of the calibration."""
        samples = self.config.calibration.samples
        return samples + self.config.further if self._in_stages else samples

    @property
    def _in_stages(self) -> bool:
        return any(len(learning.windows) > 1 for learning in self.learning)

    def _beside(self, placement: str, streams: bool) -> float:
        """Bytes on the host."""
        config, hidden = self.config, self.model.config.hidden_size
        every = config.calibration.samples + config.further
        # The learning target and two streams of states. Or a text's states, which goes through layer by layer. On a host that
        # learns, what is there only while the target is computed is a stage of its own.
        computed = 0 if self.device.type == "cpu" else config.further
        states = (every + max(2 * self._streamed_samples, computed)) * self._state
        of_text = self._measured * hidden * self.item if placement != "device" and config.evaluation.perplexity.names else 0
        beside: float = max(states, of_text)
        learns = self.orders or self.masks
        if self.device.type == "cpu" and not streams and learns and config.model.source != "random":
            # Pages of the mapped files stay, beside weights that learning stores in another way.
            learn = {layer for learning in self.learning for first, stop in learning.windows for layer in range(first, stop)}
            beside += sum(self.of_layers[layer] for layer in learn) * self.item
        if placement != "disk" or not self._mask.local:
            beside += self._pruned / 8  # masks, a bit a weight, which are read from files else
        return beside + (self._pinned if placement == "host" and streams else 0)

    def peak(self, placement: str) -> int:
        """Bytes that a run's `peak_memory_bytes` is expected to be: of the device; on a host all, with Python's own of now."""
        needs = self.needs(placement)
        return needs.device + (needs.host + host_memory() if self.device.type == "cpu" else 0)

    def on_a_card(self, placement: str) -> Needs:
        """`needs`, were it a GPU."""
        other = copy(self)
        other.device = torch.device("cuda")
        return other.needs(placement)

    @property
    def passes(self) -> float:
        """How often all layers' weights come to the device in the run, zero-shot tasks not counted."""
        texts = len(self.config.evaluation.perplexity.names)
        found = 4.0 + 2 * texts  # checked, calibrated, pruned, counted; measured before and after
        for learning in self.learning:
            share = sum(stop - first for first, stop in learning.windows) / self.layers
            found += share * (1 + 2 * self._steps(learning))  # to where it begins; forward and backward
        return found

    @property
    def products(self) -> float:
        """Floating-point operations of the run's matrix products; zero-shot tasks not counted."""
        config, model = self.config, self.model
        layers, head = 2 * sum(self.of_layers), 2 * model.config.vocab_size * model.config.hidden_size
        perplexity = config.evaluation.perplexity
        tokens = config.calibration.samples * config.calibration.seqlen
        found = 2.0 * len(perplexity.names) * self._measured * (layers + head)
        found += tokens * layers  # statistics
        found += tokens * (layers + 2 * sum(self.weights.values()))  # dense outputs, and those of the pruned linears
        changes = self._pruner.updates_weights or self._reconstruction.changes_weights
        if changes or config.calibration.statistics != "dense":
            found += 2 * tokens * layers  # inputs that the pruned layers before give
        for asked in (
            self._pruner.statistics,
            () if self._mask.local else self._mask.statistics,
            self._reconstruction.statistics,
        ):
            if Gram in asked:
                found += 2 * tokens * sum(group.channels**2 for group in self.every)
        for learning in self.learning:
            a_step = learning.method.batch_size * config.calibration.seqlen
            share = sum(stop - first for first, stop in learning.windows) / self.layers
            # Forward, again in backward where layers are computed anew, and gradients of inputs and of weights.
            found += self._steps(learning) * a_step * 4 * layers * share
            if _through_the_head(learning.method):
                found += self._steps(learning) * a_step * 3 * head
            found += self._windows(learning) * config.calibration.seqlen * layers
        return found

    def _windows(self, learning: Learning) -> int:
        return getattr(learning.method, "samples", None) or self.config.calibration.samples

    def _steps(self, learning: Learning) -> int:
        return int(learning.method.steps_for(self._windows(learning)))


def _through_the_head(method: Any) -> bool:
    return getattr(method, "loss", None) == "kl"
