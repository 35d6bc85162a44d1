"""Memory and minutes of a job by stage and placement, from its settings and the model's shapes.

All are estimates. Memory sums the tensors that exist together, to within 15 %: tests compare it with measured peaks. Minutes
are operations and bytes over a share of a device's speed, to within a factor of two.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from permllm.config import NMPattern, RunConfig
from permllm.evaluation.lm_eval import task_sizes
from permllm.models.families import channel_groups, decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.models.selection import groups_to_prune
from permllm.permutation.foldable import shared_orders
from permllm.permutation.heuristic import Heuristic
from permllm.pruning.methods import Methods
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype
from permllm.runtime.speed import Speed
from permllm.sparsity.statistics import Gram
from permllm.training.losses import chunk_of
from permllm.training.objective import KEPT_ON_A_HOST, kept_a_token

# Bytes a second by which layers come, a checkpoint is loaded, and the host packs and writes what was pruned.
_COMES, _LOADED, _WRITTEN = {"host": 2e10, "sharded": 2e10, "disk": 2e9}, 5e8, 1e9
# Seconds of a start, of compiling, of a batch of tasks beside its products, and of an assignment of 4,736 groups on one core.
_START, _COMPILING, _BATCH, _ASSIGNMENT = 20.0, 20.0, 0.01, 16.0
# Bytes that move in a search for a pair of a row and a group, and in a step: for a number kept for backward, a logit over the
# vocabulary, a weight whose mask follows an order, its exchange gradients, a weight whose mask learns; for a parameter of an
# order, and any other parameter.
_PAIR, _KEPT, _WORD, _ORDERED, _EXCHANGED, _MASKED, _LOGIT, _PARAMETER = 12, 4, 128, 15, 30, 20, 1000, 28


class Stage(NamedTuple):
    """A stage: bytes beside the weights, operations in the format of products and in float32, bytes that move on the device.

    The host takes `seconds`, and all layers come to the device `passes` times.
    """

    memory: int
    products: float = 0
    single: float = 0
    moved: float = 0
    seconds: float = 0
    passes: float = 1


class Needs(NamedTuple):
    """Memory that a placement needs: bytes on the device by stage, and bytes on the host beside them."""

    stages: dict[str, int]
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device in the largest stage."""
        return max(self.stages.values())


class Footprint:
    """Sizes of a job, whose model is on the meta device and which `device` computes."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, methods: Methods, device: torch.device) -> None:
        self.config, self.model, self.methods, self.device = config, model, methods, device
        self.every, self.groups = channel_groups(model), groups_to_prune(model, config)
        self.of_layers = [sum(value.numel() for value in layer.parameters()) for layer in decoder_layers(model)]
        self.layers, self.parameters = len(self.of_layers), sum(value.numel() for value in model.parameters())
        self.hidden, self.vocabulary = model.config.hidden_size, model.config.vocab_size
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.item, self.streamed = self.dtype.itemsize, sum(self.of_layers) * self.dtype.itemsize
        self.widest = max(sum(group.rows) for group in self.every)
        self.largest = max(group.channels * sum(group.rows) for group in self.every)
        self.weights: Counter[NMPattern] = Counter()
        for group in self.groups:
            self.weights[group.pattern or config.pattern] += group.channels * sum(group.rows)
        self.kept = sum(count * pattern.n // pattern.m for pattern, count in self.weights.items())
        self.pruned, self.text = self.weights.total(), config.calibration.samples * config.calibration.seqlen
        permutation, mask = methods.permutation, methods.mask
        self.orders = permutation.plan(self.groups, self.layers) if permutation.learned else None
        self.masks = mask.plan(self.groups, self.layers) if mask.learned else None
        searches = isinstance(permutation, Heuristic) or getattr(permutation, "init", None) == "heuristic"
        self.searched = shared_orders(self.groups, permutation.constraint) if searches else []
        # A card that is only named cannot be asked; each of them multiplies bfloat16.
        asked = device.type == "cpu" or torch.cuda.is_available() or config.compute_dtype != "auto"
        self.products = compute_dtype(config.compute_dtype if asked else "bfloat16", self.dtype, device)

    def streams(self, placement: str) -> bool:
        """Tell whether layers come to the device one at a time."""
        return placement in ("disk", "sharded") or (placement == "host" and self.device.type != "cpu")

    def needs(self, placement: str) -> Needs:
        """Return the memory with the weights in a placement."""
        weights, streams = self.parameters * self.item, self.streams(placement)
        if streams:  # the present layer and the next; a GPU may still compute with one that the host has left
            there = min(self.layers, 3 if self.device.type == "cuda" and placement != "sharded" else 2)
            weights += there * max(self.of_layers) * self.item - self.streamed
        weights += self.streamed // parallel.world_size() if placement == "sharded" else 0
        stages = {name: weights + stage.memory for name, stage in self.stages(streams).items()}
        return Needs(stages, self._beside(placement, streams))

    def minutes(self, placement: str, speed: Speed) -> dict[str, float]:
        """Return the minutes of each stage with the weights in a placement."""
        streams, found = self.streams(placement), {}
        for name, stage in self.stages(streams).items():
            seconds = stage.products / speed.rates[self.products] + stage.single / speed.rates[torch.float32]
            seconds += stage.moved / speed.moved + stage.seconds
            coming = stage.passes * self.streamed / _COMES[placement] if streams else 0.0
            found[name] = max(seconds, coming) / 60
        return found

    def stages(self, streams: bool) -> dict[str, Stage]:
        """Return the stages of the job, in their order."""
        methods, forward = self.methods, 2 * sum(self.of_layers) * self.text
        dense = not methods.permutation.local or self.config.calibration.statistics == "dense"
        found = {"weights": Stage(0, seconds=_START + self.parameters * self.item / _LOADED)}
        gram = dense * self._gram(methods.pruner)
        found["calibrate"] = Stage(self._statistics(methods.pruner), dense * forward, gram, seconds=_START)
        if self.searched:
            found["search"] = self._search()
        if not methods.mask.local and methods.mask.statistics:
            memory = self._statistics(methods.mask) + 6 * 4 * self.largest
            found["refine masks"] = Stage(memory, forward, 4 * self._gram(methods.mask))
        if self.orders and (windows := self.orders.windows):
            logits = self.orders.logits * max(stop - first for first, stop in windows) // (self.layers - windows[0][0])
            # The gradients of soft permutations wait for backward.
            found["learn"] = self._learns(methods.permutation, logits, windows, 4 * logits, streams)
        if self.masks and (windows := self.masks.windows):
            most = max(sum(self.masks.parameters.get(layer, 0) for layer in range(*window)) for window in windows)
            waiting = self.products.itemsize * most if self.masks.keeps_masked else 0
            found["learn masks"] = self._learns(methods.mask, most, windows, waiting, streams)
        if methods.reconstruction.learned:
            # Places, and float32 weights rounded for products.
            waiting = 4 * self.kept + (2 * self.pruned if self.item == 4 else 0)
            found["learn weights"] = self._learns(methods.reconstruction, self.kept, [(0, self.layers)], waiting, streams)
        changes, single = methods.pruner.updates_weights or methods.reconstruction.changes_weights, 0.0
        if changes:
            products = 2 + 4 * getattr(methods.reconstruction, "iterations", 0)
            single = sum(group.channels**2 * (3.0 * group.channels + products * sum(group.rows)) for group in self.groups)
            single += self._gram(methods.pruner, methods.reconstruction)
        forward *= 4 if changes or self.config.calibration.statistics != "dense" else 2
        # The new weights of a layer beside the old ones, and their saliency, while outputs are compared.
        memory = self._statistics(methods.pruner, methods.reconstruction) + max(self.of_layers) * self.item + 8 * self.largest
        written = self.pruned * (2 + 2 * self.item * changes) / _WRITTEN
        found["prune"] = Stage(memory, forward, single, 100 * self.pruned, written, 2)
        return found | self._evaluations()

    def _statistics(self, *methods: Any) -> int:
        """Return the bytes of a layer's forward and of the statistics of inputs that methods ask for there."""
        config, channels = self.config.calibration, max(group.channels for group in self.every)
        kinds = {kind for method in methods for kind in method.statistics}
        forward = config.batch_size * config.seqlen * (6 * self.hidden + 2 * self.widest) * self.item
        return forward + sum(kind.memory(channels) for kind in kinds)

    def _gram(self, *methods: Any) -> float:
        """Return the operations of the Gram matrices of all inputs, if a method asks for them."""
        asked = any(Gram in method.statistics for method in methods)
        return 2.0 * self.text * sum(group.channels**2 for group in self.every) if asked else 0.0

    def _search(self) -> Stage:
        """Return the search for orders. Cores share the assignments of a GPU's scores, which hide behind them."""
        seconds = moved = 0.0
        for order in self.searched:
            m, rows = self.config.pattern.m, order.repeats * sum(sum(group.rows) for group in order.groups)
            width, assignments = order.segment // m, order.channels // order.segment * m
            seconds += assignments * _ASSIGNMENT * (width / 4736) ** 2.5
            moved += assignments * width**2 * rows * _PAIR
        places = 1 if self.device.type == "cpu" else 16 if self.config.plan_on else cores()
        memory = 4 * self.largest + 4 * (max(order.segment for order in self.searched) // self.config.pattern.m) ** 2
        return Stage(memory, moved=moved if places == 1 else 0, seconds=seconds / min(places, len(self.searched)))

    def _learns(self, method: Any, parameters: int, windows: list[tuple[int, int]], waiting: int, streams: bool) -> Stage:
        """Return a stage that learns, with the least memory: backward recomputes layers where they would keep much."""
        depth, item, seqlen = max(stop - first for first, stop in windows), self.item, self.config.calibration.seqlen
        setting = partial(getattr, method)  # a method of someone else's has `batch_size` and what it likes
        ranks, orders = parallel.world_size(), method is self.methods.permutation
        mine, recomputes = -(-method.batch_size // ranks), setting("activation_checkpointing", None)
        together = min(mine, setting("micro_batch_size", None) or mine) * seqlen
        gathers = method is self.methods.mask and self.config.permutation.get("name") != "none"
        a_layer = kept_a_token(self.every, self.hidden, item, gathers) * item
        activations = together * a_layer * depth
        if recomputes := streams or (activations > KEPT_ON_A_HOST if recomputes is None else recomputes):
            # The states between layers, and one layer's internals.
            activations = together * (self.hidden * (depth + 8) + 4 * self.widest) * item
        # With gradients and two moments; a layer's masked weight and the gradient of it.
        memory = 16 * parameters + waiting + activations + 3 * self.largest * item
        words = self.vocabulary if setting("loss", None) == "kl" else 0
        # The head in the format of products, unless it is; four numbers a token and a word.
        memory += words * ((2 * self.hidden if item > 2 else 0) + 4 * 4 * chunk_of(self.device, self.vocabulary))
        samples = setting("samples", None) or self.config.calibration.samples
        steps = method.steps_for(samples) if setting("epochs", None) else -(-samples // method.batch_size)
        share, tokens = sum(stop - first for first, stop in windows) / self.layers, steps * method.batch_size * seqlen / ranks
        measured = (1 + setting("select_from", 0)) * samples * seqlen / ranks
        products = (tokens * (4 if recomputes else 3) + measured) * 2 * sum(self.of_layers) * share
        moved = tokens * (a_layer * self.layers * share * _KEPT + words * _WORD)
        moved += steps * self.pruned * share * (_ORDERED + _EXCHANGED / ranks if orders else _MASKED)
        moved += steps * parameters * len(windows) * (_LOGIT if orders else _PARAMETER)
        return Stage(memory, products + tokens * words * 8 * self.hidden, 0, moved, _COMPILING, (1 + 2 * steps) * share)

    def _evaluations(self) -> dict[str, Stage]:
        """Return perplexity and tasks, each of the dense and of the pruned model."""
        evaluation, vocabulary, item = self.config.evaluation, self.vocabulary, self.item
        texts, batch = evaluation.perplexity, evaluation.lm_eval.batch_size
        # The dense model and the pruned one; nothing is rounded, so that float32 models are measured in float32.
        token = 4.0 * (sum(self.of_layers) + self.hidden * vocabulary)
        half, single = (token, 0.0) if item == 2 else (0.0, token)
        # Logits of a batch, and those of a window in float32: as logarithms, and before it where that is another format.
        of_batch = tokens_at_a_time(vocabulary, max(texts.batch_tokens, texts.seqlen)) * item
        memory = (of_batch + tokens_at_a_time(vocabulary, texts.seqlen) * (4 if item == 4 else 8)) * vocabulary
        tokens = self.measured * len(texts.names)
        found = {"perplexity": Stage(memory, tokens * half, tokens * single, passes=4)}
        sequences, tokens, longest = task_sizes(evaluation)
        if sequences:  # logits of a batch, and their logarithms
            batches, memory = 2 * sequences / batch, batch * longest * vocabulary * 2 * item
            found["tasks"] = Stage(memory, tokens * half, tokens * single, 0, _BATCH * batches, batches)
        return found

    @property
    def measured(self) -> int:
        """Tokens of a text whose perplexity is measured: WikiText-2 test, a whole text, has about 300,000."""
        perplexity = self.config.evaluation.perplexity
        return perplexity.limit * perplexity.seqlen if perplexity.limit else 300_000

    def _beside(self, placement: str, streams: bool) -> int:
        """Return the bytes on the host."""
        config, on_a_host = self.config, self.device.type == "cpu"
        # The target of all windows and two streams of states: of windows learned from in stages, else of the calibration.
        in_stages = any(plan and len(plan.windows) > 1 for plan in (self.orders, self.masks))
        streamed = 2 * (config.calibration.samples + (config.further if in_stages else 0))
        samples = config.calibration.samples + config.further + max(streamed, 0 if on_a_host else config.further)
        beside = samples * config.calibration.seqlen * self.hidden * self.item
        if placement != "device" and config.evaluation.perplexity.names:  # the states of a text
            beside = max(beside, self.measured * self.hidden * self.item)
        if on_a_host and not streams and (self.orders or self.masks) and config.model.source != "random":
            beside += self.streamed  # pages of mapped files, beside weights that learning stores in another way
        if placement != "disk" or not self.methods.mask.local:
            beside += self.pruned // 8  # masks, a bit a weight
        if placement == "host" and streams:  # pinned memory, of which torch gives each tensor a power of two
            sizes = [value.numel() * self.item for layer in decoder_layers(self.model) for value in layer.parameters()]
            beside += sum(1 << (size - 1).bit_length() for size in sizes)
        return beside

    def peak(self, placement: str) -> int:
        """Return the expected `peak_memory_bytes`: of the device; on a host all, with Python's own of now."""
        needs = self.needs(placement)
        return needs.device + (needs.host + host_memory() if self.device.type == "cpu" else 0)
