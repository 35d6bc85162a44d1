"""Estimates of a job's memory and minutes by stage and placement, from settings and shapes.

The memory is the sum of the tensors that exist together, to within 15 %. The minutes are operations
and bytes divided by a share of the device's speed, to within a factor of two.
"""

from collections import Counter
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from permllm.models.families import channel_groups, decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.models.selection import groups_to_prune
from permllm.permutation.foldable import shared_orders
from permllm.permutation.heuristic import Heuristic
from permllm.planning.speed import Speed
from permllm.pruning.methods import Methods
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype
from permllm.settings.config import NMPattern, RunConfig
from permllm.sparsity.statistics import Gram
from permllm.training.losses import chunk_of
from permllm.training.objective import KEPT_ON_A_HOST, kept_a_token
from permllm.training.settings import LearningPlan

# Bytes a second at which layers are copied to the device, a checkpoint is loaded, and the host
# packs and writes results.
_COMES = {"host": 2e10, "sharded": 2e10, "disk": 2e9}
_LOADED = 5e8
_WRITTEN = 1e9
# Seconds of a start or of compiling, of a batch of tasks without its products, and of an assignment
# of 4,736 groups on one core.
_START = 20.0
_BATCH = 0.01
_ASSIGNMENT = 16.0
# Bytes that a search reads and writes for a pair of a row and a group.
_PAIR = 12
# Bytes that a step reads and writes for a value kept for backward, a logit of the vocabulary, a
# weight under a permutation that learns, its exchange gradients, and a weight whose mask learns.
_KEPT = 4
_WORD = 128
_ORDERED = 15
_EXCHANGED = 30
_MASKED = 20
# The same for a parameter of a permutation, and for any other parameter.
_LOGIT = 1000
_PARAMETER = 28
# Items of a task of lm-eval, sequences of an item, and their mean and largest length in tokens.
# Other tasks get a guess.
_TASKS = {
    "hellaswag": (10042, 4, 80, 155),
    "arc_easy": (2376, 4, 33, 110),
    "arc_challenge": (1172, 4, 38, 135),
    "openbookqa": (500, 4, 16, 66),
    "rte": (277, 2, 81, 280),
    "piqa": (1838, 2, 37, 245),
    "sciq": (1000, 4, 108, 572),
}
_ANY_TASK = (2000, 3, 150, 1024)


class Stage(NamedTuple):
    """Estimate of a stage of a job."""

    memory: int  # bytes, without the weights
    products: float = 0  # operations in the dtype of products
    single: float = 0  # operations in float32
    moved: float = 0  # bytes that the device reads and writes
    seconds: float = 0  # of work on the host
    passes: float = 1  # number of times that offloaded layers are copied to the device


class Needs(NamedTuple):
    """Bytes that a placement needs."""

    stages: dict[str, int]  # on the device, by stage
    device: int  # on the device, in the largest stage
    host: int  # on the host, in addition
    peak: int  # expected `peak_memory_bytes`; on a CPU with the present memory of the process


class Footprint:
    """Sizes of a job on a device.

    Args:
        config: settings of the job.
        model: model on the meta device.
        methods: methods of the settings.
        device: device of the job.
    """

    def __init__(
        self, config: RunConfig, model: PreTrainedModel, methods: Methods, device: torch.device
    ) -> None:
        self.config = config
        self.model = model
        self.methods = methods
        self.device = device
        self.on_a_host = device.type == "cpu"
        self.ranks = parallel.world_size()
        layers = decoder_layers(model)
        of_layers = [sum(value.numel() for value in layer.parameters()) for layer in layers]
        self.layers = len(layers)
        self.a_layer = max(of_layers)
        self.all_layers = sum(of_layers)
        self.parameters = sum(value.numel() for value in model.parameters())
        self.hidden = model.config.hidden_size
        self.vocabulary = model.config.vocab_size
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.item = self.dtype.itemsize
        self.products = compute_dtype(config.compute_dtype, self.dtype, device)
        self.every = channel_groups(model)
        self.groups = groups_to_prune(model, config)
        self.widest = max(sum(group.rows) for group in self.every)
        self.largest = max(group.channels * sum(group.rows) for group in self.every)
        self.weights: Counter[NMPattern] = Counter()
        for group in self.groups:
            self.weights[group.pattern or config.pattern] += group.channels * sum(group.rows)
        self.pruned = self.weights.total()
        permutation = methods.permutation
        mask = methods.mask
        self.orders = permutation.plan(self.groups, self.layers) if permutation.learned else None
        self.masks = mask.plan(self.groups, self.layers) if mask.learned else None
        # Tokens that a rank has of the calibration text and of a text for perplexity. WikiText-2's
        # test text has about 300,000.
        self.text = config.calibration.samples * config.calibration.seqlen / self.ranks
        texts = config.evaluation.perplexity
        self.measured = (texts.limit * texts.seqlen if texts.limit else 300_000) / self.ranks

    def streams(self, placement: str) -> bool:
        """Tell whether layers are copied to the device one at a time."""
        return placement in ("disk", "sharded") or (placement == "host" and not self.on_a_host)

    def needs(self, placement: str) -> Needs:
        """Return the memory that a placement needs."""
        weights = self.parameters * self.item
        streams = self.streams(placement)
        # The present layer and the next; a GPU may still compute with the layer before.
        if streams:
            at_once = 2 if self.on_a_host or placement == "sharded" else 3
            weights += (min(self.layers, at_once) * self.a_layer - self.all_layers) * self.item
        if placement == "sharded":
            weights += self.all_layers * self.item // self.ranks
        stages = {name: weights + stage.memory for name, stage in self._stages(placement).items()}
        device = max(stages.values())
        host = self._beside(placement, streams)
        peak = device + host + host_memory() if self.on_a_host else device
        return Needs(stages, device, host, peak)

    def minutes(self, placement: str, speed: Speed) -> dict[str, float]:
        """Return the minutes of each stage in a placement."""
        streams = self.streams(placement)
        minutes = {}
        for name, stage in self._stages(placement).items():
            seconds = stage.seconds + stage.moved / speed.moved
            seconds += stage.products / speed.rates[self.products]
            seconds += stage.single / speed.rates[torch.float32]
            if streams:
                coming = stage.passes * self.all_layers * self.item / _COMES[placement]
                seconds = max(seconds, coming)
            minutes[name] = seconds / 60
        return minutes

    def _stages(self, placement: str) -> dict[str, Stage]:
        """Return the stages of the job, from the first to the last."""
        streams = self.streams(placement)
        methods = self.methods
        dense = self.config.calibration.statistics == "dense"
        permutation = methods.permutation
        mask = methods.mask
        reconstruction = methods.reconstruction
        forward = 2 * self.all_layers * self.text
        stages = {"weights": Stage(0, seconds=_START + self.parameters * self.item / _LOADED)}
        memory, gram = self._statistics(methods.pruner)
        stages["calibrate"] = Stage(memory, seconds=_START)
        if dense or not permutation.local:
            stages["calibrate"] = Stage(memory, products=forward, single=gram, seconds=_START)
        if isinstance(permutation, Heuristic) or getattr(permutation, "init", None) == "heuristic":
            stages["search"] = self._search(permutation)
        if getattr(mask, "statistics", ()):
            memory, gram = self._statistics(mask)
            # Each rank searches for itself. That takes as long as three Grams of the whole text.
            products = (1 + 3 * self.ranks) * gram
            memory += 6 * 4 * self.largest
            stages["refine masks"] = Stage(memory, products=forward, single=products)
        if self.orders and self.orders.spans:
            # The gradients of soft permutations stay in memory until the end of backward.
            stages["learn"] = self._learns(permutation, self.orders, 4, streams)
        if self.masks and self.masks.spans:
            waiting = self.products.itemsize if self.masks.keeps_masked else 0
            stages["learn masks"] = self._learns(mask, self.masks, waiting, streams)
        if reconstruction.learned:
            # Positions of kept weights, and rounded copies of float32 weights.
            weights = sum(count * pattern.n // pattern.m for pattern, count in self.weights.items())
            waiting = 4 + (2 * self.pruned // weights if self.item == 4 else 0)
            plan = LearningPlan([range(self.layers)], weights)
            stages["learn weights"] = self._learns(reconstruction, plan, waiting, streams)
        passes = 2 if dense and not methods.change_weights else 4
        stages["prune"] = self._prune(forward * passes)
        return stages | self._evaluations(placement)

    def _prune(self, forward: float) -> Stage:
        """Return the stage that prunes; its forwards take `forward` operations."""
        pruner = self.methods.pruner
        reconstruction = self.methods.reconstruction
        # New weights of a layer, in addition to its old weights, and their saliency.
        memory, gram = self._statistics(pruner, reconstruction)
        memory += self.a_layer * self.item + 8 * self.largest
        products = 2 + 4 * getattr(reconstruction, "iterations", 0)
        changes = 0.0
        if self.methods.change_weights:
            changes = gram + sum(
                group.channels**2 * (3.0 * group.channels + products * sum(group.rows))
                for group in self.groups
            )
        bytes_a_weight = 2 + 2 * self.item if self.methods.change_weights else 2
        written = self.pruned * bytes_a_weight / _WRITTEN
        moved = 100 * self.pruned
        return Stage(memory, forward, single=changes, moved=moved, seconds=written, passes=2)

    def _statistics(self, *methods: Any) -> tuple[int, float]:
        """Return the bytes of a layer's forward with statistics, and operations of all Grams."""
        config = self.config.calibration
        channels = [group.channels for group in self.every]
        kinds = {kind for method in methods for kind in method.statistics}
        states = 6 * self.hidden + 2 * self.widest
        memory = config.batch_size * config.seqlen * states * self.item
        gram = 2.0 * self.text * sum(count**2 for count in channels) if Gram in kinds else 0.0
        return memory + sum(kind.memory(max(channels)) for kind in kinds), gram

    def _search(self, permutation: Any) -> Stage:
        """Return the search for permutations; a GPU makes scores while the cores solve others."""
        m = self.config.pattern.m
        seconds = 0.0
        moved = 0.0
        searched = shared_orders(self.groups, permutation.constraint)
        for order in searched:
            width = order.segment // m
            assignments = order.channels // order.segment * m
            rows = order.repeats * sum(sum(group.rows) for group in order.groups)
            seconds += assignments * _ASSIGNMENT * (width / 4736) ** 2.5
            moved += assignments * width**2 * rows * _PAIR
        if self.on_a_host:
            return Stage(4 * self.largest, moved=moved, seconds=seconds)
        places = min(16 if self.config.plan_on else cores(), len(searched))
        return Stage(4 * self.largest, seconds=seconds / places)

    def _learns(self, method: Any, plan: LearningPlan, waiting: int, streams: bool) -> Stage:
        """Return a stage that learns, with backward recomputing large activations.

        Args:
            method: method that learns.
            plan: stages of the method, and number of its parameters.
            waiting: bytes that stay in memory until backward, for each parameter in a stage.
            streams: layers are copied to the device one at a time.
        """
        learning = sum(map(len, plan.spans))
        depth = max(map(len, plan.spans))
        parameters = plan.parameters * depth // learning
        share = learning / self.layers
        orders = method is self.methods.permutation
        seqlen = self.config.calibration.seqlen
        mine = ceil(method.batch_size / self.ranks)
        together = min(mine, getattr(method, "micro_batch_size", None) or mine) * seqlen
        gathers = method is self.methods.mask and self.config.permutation.get("name") != "none"
        a_token = kept_a_token(self.every, self.hidden, self.item, gathers) * self.item
        activations = together * a_token * depth
        recomputes = getattr(method, "activation_checkpointing", None)
        if recomputes is None:
            recomputes = activations > KEPT_ON_A_HOST
        if streams or recomputes:
            recomputes = True
            states = self.hidden * (depth + 8) + 4 * self.widest
            activations = together * states * self.item
        # Parameters, gradients and two moments; a layer's masked weight and its gradient.
        memory = (16 + waiting) * parameters + activations + 3 * self.largest * self.item
        # A copy of the head in the dtype of products; four values for each logit of a chunk.
        words = self.vocabulary if getattr(method, "loss", None) == "kl" else 0
        head = 2 * self.hidden if self.item > 2 else 0
        memory += words * (head + 16 * chunk_of(self.device, self.vocabulary))
        samples = getattr(method, "samples", None) or self.config.calibration.samples
        steps = ceil(samples / method.batch_size)
        if hasattr(method, "steps_for"):
            steps = method.steps_for(samples)
        tokens = steps * method.batch_size * seqlen / self.ranks
        measured = (1 + getattr(method, "select_from", 0)) * samples * seqlen / self.ranks
        products = (tokens * (4 if recomputes else 3) + measured) * 2 * self.all_layers * share
        products += tokens * words * 8 * self.hidden
        of_weight = _ORDERED + _EXCHANGED / self.ranks if orders else _MASKED
        of_parameter = _LOGIT if orders else _PARAMETER
        of_step = self.pruned * share * of_weight + parameters * len(plan.spans) * of_parameter
        moved = tokens * (a_token * self.layers * share * _KEPT + words * _WORD) + steps * of_step
        passes = (1 + 2 * steps) * share
        return Stage(memory, products, moved=moved, seconds=_START, passes=passes)

    def _evaluations(self, placement: str) -> dict[str, Stage]:
        """Return the stages of perplexity and tasks, for the dense and the pruned model."""
        config = self.config.evaluation
        texts = config.perplexity
        batch = config.lm_eval.batch_size
        a_token = 4.0 * (self.all_layers + self.hidden * self.vocabulary)
        # Products of float32 models are not rounded.
        half = a_token if self.item == 2 else 0.0
        single = 0.0 if self.item == 2 else a_token
        # Logits of a batch; float32 logarithms of the logits of a window, and float32 logits if the
        # model has another dtype.
        longest = max(texts.batch_tokens, texts.seqlen)
        memory = tokens_at_a_time(self.vocabulary, longest) * self.item
        memory += tokens_at_a_time(self.vocabulary, texts.seqlen) * (4 if self.item == 4 else 8)
        tokens = self.measured * len(texts.names)
        measured = Stage(memory * self.vocabulary, tokens * half, tokens * single, passes=4)
        if not config.tasks:
            return {"perplexity": measured}
        sequences = tokens = longest = 0
        for name, task in config.tasks.items():
            items, of_item, mean, most = _TASKS.get(name, _ANY_TASK)
            shots = 1 + (task.num_fewshot or 0)
            count = min(items, task.limit or config.lm_eval.limit or items) * of_item
            sequences += count
            tokens += count * mean * shots
            longest = max(longest, most * shots)
        # Logits of a batch and their logarithms.
        memory = batch * longest * self.vocabulary * 2 * self.item
        # With parts of layers, each rank runs all items.
        share = 1 if placement == "sharded" else self.ranks
        batches = 2 * sequences / batch / share
        tokens_of_rank = tokens / share
        of_tasks = Stage(
            memory,
            products=tokens_of_rank * half,
            single=tokens_of_rank * single,
            seconds=_BATCH * batches,
            passes=batches,
        )
        return {"perplexity": measured, "tasks": of_tasks}

    def _beside(self, placement: str, streams: bool) -> int:
        """Return the bytes on the host, in addition to the device's."""
        config = self.config
        of_layers = self.all_layers * self.item
        # Targets of all windows, and this rank's states of two streams.
        samples = config.calibration.samples
        tokens = (samples + self.methods.further(samples)) * config.calibration.seqlen
        beside = ceil((1 + 2 / self.ranks) * tokens) * self.hidden * self.item
        if placement != "device" and config.evaluation.perplexity.names:  # states of a text
            beside = max(beside, ceil(self.measured) * self.hidden * self.item)
        learns = self.orders or self.masks
        if self.on_a_host and not streams and learns and config.model.source != "random":
            # Pages of mapped files, in addition to the weights in the layout for learning.
            beside += of_layers
        if placement != "disk" or not self.methods.mask.local:
            beside += self.pruned // 8  # masks, a bit for each weight
        if placement == "host" and streams:
            # Pinned memory, of which torch allocates a power of two for each tensor.
            values = [value for layer in decoder_layers(self.model) for value in layer.parameters()]
            beside += sum(1 << (value.numel() * self.item - 1).bit_length() for value in values)
        return beside
