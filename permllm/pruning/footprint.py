"""Estimates of a job's memory and minutes by stage and placement, from its settings and the model's shapes.

Memory sums the tensors that exist together, to within 15 %. Minutes are operations and bytes over a
share of a device's speed, to within a factor of two.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from permllm.config import NMPattern, RunConfig
from permllm.models.families import channel_groups, decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.models.selection import groups_to_prune
from permllm.permutation.foldable import shared_orders
from permllm.permutation.heuristic import Heuristic
from permllm.pruning.methods import Methods
from permllm.pruning.task_sizes import task_sizes
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype
from permllm.runtime.speed import Speed
from permllm.sparsity.statistics import Gram
from permllm.training.losses import chunk_of
from permllm.training.objective import KEPT_ON_A_HOST, kept_a_token

# Bytes a second by which layers come, a checkpoint is loaded, and the host packs and writes what
# was pruned.
_COMES, _LOADED, _WRITTEN = {"host": 2e10, "sharded": 2e10, "disk": 2e9}, 5e8, 1e9
# Seconds of a start or of compiling, of a batch of tasks beside its products, of an assignment of
# 4,736 groups on one core.
_START, _BATCH, _ASSIGNMENT = 20.0, 0.01, 16.0
# Bytes that move in a search for a pair of a row and a group; in a step for a number kept for
# backward, a logit over the vocabulary, a weight whose mask follows an order, its exchange
# gradients, a weight whose mask learns; for a parameter of an order, and any other parameter.
_PAIR, _KEPT, _WORD, _ORDERED, _EXCHANGED, _MASKED, _LOGIT, _PARAMETER = (
    12,
    4,
    128,
    15,
    30,
    20,
    1000,
    28,
)


class Stage(NamedTuple):
    """A stage of a job."""

    memory: int  # bytes beside the weights
    products: float = 0  # operations in the format of products
    single: float = 0  # operations in float32
    moved: float = 0  # bytes that move on the device
    seconds: float = 0  # of the host
    passes: float = 1  # how often all layers come to the device, where they come one at a time


class Needs(NamedTuple):
    """Bytes that a placement needs."""

    stages: dict[str, int]  # on the device, by stage
    device: int  # in the largest stage
    host: int  # beside them, on the host
    peak: int  # expected `peak_memory_bytes`: of a GPU; of a host all, with Python's own of now


class Footprint:
    """Sizes of a job, whose model is on the meta device and which `device` computes."""

    def __init__(
        self, config: RunConfig, model: PreTrainedModel, methods: Methods, device: torch.device
    ) -> None:
        self.config, self.model, self.methods, self.device = config, model, methods, device
        self.on_a_host, self.ranks = device.type == "cpu", parallel.world_size()
        of_layers = [
            sum(value.numel() for value in layer.parameters()) for layer in decoder_layers(model)
        ]
        self.layers, self.a_layer, self.all_layers = len(of_layers), max(of_layers), sum(of_layers)
        self.parameters = sum(value.numel() for value in model.parameters())
        self.hidden, self.vocabulary = model.config.hidden_size, model.config.vocab_size
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.item = self.dtype.itemsize
        self.every, self.groups = channel_groups(model), groups_to_prune(model, config)
        self.widest = max(sum(group.rows) for group in self.every)
        self.largest = max(group.channels * sum(group.rows) for group in self.every)
        self.weights: Counter[NMPattern] = Counter()
        for group in self.groups:
            self.weights[group.pattern or config.pattern] += group.channels * sum(group.rows)
        self.pruned, self.text = (
            self.weights.total(),
            config.calibration.samples * config.calibration.seqlen,
        )
        permutation, mask = methods.permutation, methods.mask
        self.orders = permutation.plan(self.groups, self.layers) if permutation.learned else None
        self.masks = mask.plan(self.groups, self.layers) if mask.learned else None
        self.products = compute_dtype(config.compute_dtype, self.dtype, device)
        texts = config.evaluation.perplexity
        self.measured = (
            texts.limit * texts.seqlen if texts.limit else 300_000
        )  # tokens; WikiText-2's test has as many

    def streams(self, placement: str) -> bool:
        """Tell whether layers come to the device one at a time."""
        return placement in ("disk", "sharded") or (placement == "host" and not self.on_a_host)

    def needs(self, placement: str) -> Needs:
        """Return the memory with the weights in a placement."""
        weights, streams = self.parameters * self.item, self.streams(placement)
        # the present layer and the next; a GPU may still compute with one that the host has left
        if streams:
            at_once = 2 if self.on_a_host or placement == "sharded" else 3
            weights += (min(self.layers, at_once) * self.a_layer - self.all_layers) * self.item
        if placement == "sharded":
            weights += self.all_layers * self.item // self.ranks
        stages = {name: weights + stage.memory for name, stage in self._stages(streams).items()}
        device, host = max(stages.values()), self._beside(placement, streams)
        return Needs(
            stages, device, host, device + host + host_memory() if self.on_a_host else device
        )

    def minutes(self, placement: str, speed: Speed) -> dict[str, float]:
        """Return the minutes of each stage with the weights in a placement."""
        streams, found = self.streams(placement), {}
        for name, stage in self._stages(streams).items():
            seconds = (
                stage.products / speed.rates[self.products]
                + stage.single / speed.rates[torch.float32]
            )
            seconds += stage.moved / speed.moved + stage.seconds
            coming = (
                stage.passes * self.all_layers * self.item / _COMES[placement] if streams else 0.0
            )
            found[name] = max(seconds, coming) / 60
        return found

    def _stages(self, streams: bool) -> dict[str, Stage]:
        """Return the stages of the job, in their order."""
        pruner, reconstruction = self.methods.pruner, self.methods.reconstruction
        permutation, mask = self.methods.permutation, self.methods.mask
        dense, changes = self.config.calibration.statistics == "dense", self.methods.change_weights
        forward, found = 2 * self.all_layers * self.text, dict[str, Stage]()
        found["weights"] = Stage(0, seconds=_START + self.parameters * self.item / _LOADED)
        memory, gram = self._statistics(pruner)
        calibrates = dense or not permutation.local
        found["calibrate"] = Stage(memory, calibrates * forward, calibrates * gram, seconds=_START)
        if isinstance(permutation, Heuristic) or getattr(permutation, "init", None) == "heuristic":
            found["search"] = self._search(permutation)
        if getattr(mask, "statistics", ()):
            memory, gram = self._statistics(mask)
            found["refine masks"] = Stage(memory + 6 * 4 * self.largest, forward, 4 * gram)
        if (
            self.orders and self.orders.windows
        ):  # the gradients of soft permutations wait for backward
            found["learn"] = self._learns(
                permutation, self.orders.logits, self.orders.windows, 4, streams
            )
        if self.masks and self.masks.windows:
            parameters = max(self.masks.parameters.values()) * sum(
                stop - first for first, stop in self.masks.windows
            )
            waiting = self.products.itemsize if self.masks.keeps_masked else 0
            found["learn masks"] = self._learns(
                mask, parameters, self.masks.windows, waiting, streams
            )
        if reconstruction.learned:  # places, and float32 weights rounded for products
            kept = sum(count * pattern.n // pattern.m for pattern, count in self.weights.items())
            waiting = 4 + (2 * self.pruned // kept if self.item == 4 else 0)
            found["learn weights"] = self._learns(
                reconstruction, kept, [(0, self.layers)], waiting, streams
            )
        # The new weights of a layer beside the old ones, and their saliency, while outputs are
        # compared.
        memory, gram = self._statistics(pruner, reconstruction)
        memory += self.a_layer * self.item + 8 * self.largest
        products = 2 + 4 * getattr(reconstruction, "iterations", 0)
        updates = sum(
            group.channels**2 * (3.0 * group.channels + products * sum(group.rows))
            for group in self.groups
        )
        written = self.pruned * (2 + 2 * self.item * changes) / _WRITTEN
        forward *= 2 if dense and not changes else 4
        found["prune"] = Stage(
            memory, forward, changes * (updates + gram), 100 * self.pruned, written, 2
        )
        return found | self._evaluations()

    def _statistics(self, *methods: Any) -> tuple[int, float]:
        """Return the bytes of a layer's forward with the statistics that methods ask for, and the operations of all Grams."""
        config, channels = self.config.calibration, [group.channels for group in self.every]
        kinds = {kind for method in methods for kind in method.statistics}
        forward = (
            config.batch_size * config.seqlen * (6 * self.hidden + 2 * self.widest) * self.item
        )
        gram = 2.0 * self.text * sum(count**2 for count in channels) if Gram in kinds else 0.0
        return forward + sum(kind.memory(max(channels)) for kind in kinds), gram

    def _search(self, permutation: Any) -> Stage:
        """Return the search for orders.

        Cores share the assignments of a GPU's scores, which hide behind them.
        """
        m, seconds, moved = self.config.pattern.m, 0.0, 0.0
        searched = shared_orders(self.groups, permutation.constraint)
        for order in searched:
            width, assignments = order.segment // m, order.channels // order.segment * m
            seconds += assignments * _ASSIGNMENT * (width / 4736) ** 2.5
            moved += (
                assignments
                * width**2
                * order.repeats
                * sum(sum(group.rows) for group in order.groups)
                * _PAIR
            )
        if self.on_a_host:
            return Stage(4 * self.largest, moved=moved, seconds=seconds)
        places = min(16 if self.config.plan_on else cores(), len(searched))
        return Stage(4 * self.largest, seconds=seconds / places)

    def _learns(
        self, method: Any, every: int, windows: list[tuple[int, int]], waiting: int, streams: bool
    ) -> Stage:
        """Return a stage that learns parameters, with the least memory: backward recomputes layers where they would keep much.

        Bytes that are `waiting` wait for backward beside activations, for each parameter that
        learns at the same time.
        """
        learning, depth = (
            sum(stop - first for first, stop in windows),
            max(stop - first for first, stop in windows),
        )
        parameters, share, seqlen = (
            every * depth // learning,
            learning / self.layers,
            self.config.calibration.seqlen,
        )
        orders = method is self.methods.permutation
        mine = -(-method.batch_size // self.ranks)
        together = min(mine, getattr(method, "micro_batch_size", None) or mine) * seqlen
        gathers = method is self.methods.mask and self.config.permutation.get("name") != "none"
        a_token = kept_a_token(self.every, self.hidden, self.item, gathers) * self.item
        activations = together * a_token * depth
        recomputes = getattr(method, "activation_checkpointing", None)
        if streams or (activations > KEPT_ON_A_HOST if recomputes is None else recomputes):
            recomputes, activations = (
                True,
                together * (self.hidden * (depth + 8) + 4 * self.widest) * self.item,
            )
        # With gradients and two moments; a layer's masked weight and the gradient of it.
        memory = (16 + waiting) * parameters + activations + 3 * self.largest * self.item
        words = self.vocabulary if getattr(method, "loss", None) == "kl" else 0
        # The head in the format of products, unless it is; four numbers a token and a word.
        memory += words * (
            (2 * self.hidden if self.item > 2 else 0) + 16 * chunk_of(self.device, self.vocabulary)
        )
        samples = getattr(method, "samples", None) or self.config.calibration.samples
        steps = (
            method.steps_for(samples)
            if hasattr(method, "steps_for")
            else -(-samples // method.batch_size)
        )
        tokens = steps * method.batch_size * seqlen / self.ranks
        measured = (1 + getattr(method, "select_from", 0)) * samples * seqlen / self.ranks
        products = (tokens * (4 if recomputes else 3) + measured) * 2 * self.all_layers * share
        products += tokens * words * 8 * self.hidden
        of_weight = _ORDERED + _EXCHANGED / self.ranks if orders else _MASKED
        of_step = self.pruned * share * of_weight + parameters * len(windows) * (
            _LOGIT if orders else _PARAMETER
        )
        moved = tokens * (a_token * self.layers * share * _KEPT + words * _WORD) + steps * of_step
        return Stage(memory, products, 0, moved, _START, (1 + 2 * steps) * share)

    def _evaluations(self) -> dict[str, Stage]:
        """Return perplexity and tasks, each of the dense and of the pruned model; float32 models are not rounded."""
        texts, batch = self.config.evaluation.perplexity, self.config.evaluation.lm_eval.batch_size
        a_token = 4.0 * (self.all_layers + self.hidden * self.vocabulary)
        half, single = (a_token, 0.0) if self.item == 2 else (0.0, a_token)
        # Logits of a batch, and those of a window in float32: as logarithms, and before it where
        # that is another format.
        of_batch = (
            tokens_at_a_time(self.vocabulary, max(texts.batch_tokens, texts.seqlen)) * self.item
        )
        of_window = tokens_at_a_time(self.vocabulary, texts.seqlen) * (4 if self.item == 4 else 8)
        tokens, memory = self.measured * len(texts.names), (of_batch + of_window) * self.vocabulary
        found = {"perplexity": Stage(memory, tokens * half, tokens * single, passes=4)}
        sequences, tokens, longest = task_sizes(self.config.evaluation)
        if sequences:  # logits of a batch, and their logarithms
            batches, memory = (
                2 * sequences / batch,
                batch * longest * self.vocabulary * 2 * self.item,
            )
            found["tasks"] = Stage(
                memory, tokens * half, tokens * single, 0, _BATCH * batches, batches
            )
        return found

    def _beside(self, placement: str, streams: bool) -> int:
        """Return the bytes on the host."""
        config = self.config
        # The target of all windows, and two streams of states.
        beside = (
            3
            * (config.calibration.samples + config.further)
            * config.calibration.seqlen
            * self.hidden
            * self.item
        )
        if placement != "device" and config.evaluation.perplexity.names:  # the states of a text
            beside = max(beside, self.measured * self.hidden * self.item)
        if (
            self.on_a_host
            and not streams
            and (self.orders or self.masks)
            and config.model.source != "random"
        ):
            beside += (
                self.all_layers * self.item
            )  # pages of mapped files, beside weights that learning stores otherwise
        if placement != "disk" or not self.methods.mask.local:
            beside += self.pruned // 8  # masks, a bit a weight
        if (
            placement == "host" and streams
        ):  # pinned memory, of which torch gives each tensor a power of two
            sizes = [
                value.numel() * self.item
                for layer in decoder_layers(self.model)
                for value in layer.parameters()
            ]
            beside += sum(1 << (size - 1).bit_length() for size in sizes)
        return beside
