"""Estimates of a job's memory and minutes by phase and placement, from settings and shapes.

The memory is the sum of the tensors that exist together, to within 16 %. The minutes are operations
and bytes divided by a share of the device's speed.
"""

from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from permllm.models.families import decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.permutation.foldable import shared_permutations
from permllm.planning.speed import Speed
from permllm.pruning.methods import Methods, ModelGroups, needs_teacher, stored_windows
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype, working_dtype
from permllm.settings.config import RunConfig
from permllm.settings.learning import LearningPlan
from permllm.sparsity.statistics import Gram, Statistics
from permllm.training.losses import chunk_of
from permllm.training.objective import KEPT_ON_A_HOST, kept_a_token

# The constants below are fitted to the minutes of runs on CPUs.
# Bytes a second at which layers are copied to the device, and files are read or written.
_COPIED_A_SECOND = {"host": 2e10, "sharded": 2e10, "disk": 2e9}
_FILES_A_SECOND = 5e8
# Seconds of a start or of compiling, and of a batch of tasks without its products.
_START_SECONDS = 20.0
_BATCH_SECONDS = 0.01
# Seconds of an assignment on one core, divided by the number of groups to the power of 2.5.
_ASSIGNMENT_SECONDS = 1e-8
# Operations of a search on a CPU for each pair of a row and a group.
_PAIR_OPERATIONS = 150
# Seconds of a step of learning, divided by the seconds of its products.
_STEP = 1.25
# Number of tokens of WikiText-2's test text, about.
_TEST_TOKENS = 300_000
# A guess for any task of lm-eval: items, sequences of an item, and their mean and largest length in
# tokens.
_ITEMS = 2500
_ANSWERS = 4
_TOKENS = 70
_LONGEST = 512


class PhaseCost(NamedTuple):
    """Estimate of a phase of a job."""

    memory: int  # bytes, without the weights
    products: float = 0  # operations in the dtype of products
    single: float = 0  # operations in float32
    seconds: float = 0  # of work on the host
    passes: float = 1  # number of times that offloaded layers are copied to the device

    def then(self, later: "PhaseCost") -> "PhaseCost":
        """Return the cost of this work and of later work, which do not share the memory."""
        return PhaseCost(
            max(self.memory, later.memory),
            self.products + later.products,
            self.single + later.single,
            self.seconds + later.seconds,
            self.passes + later.passes,
        )


class Needs(NamedTuple):
    """Bytes that a placement needs."""

    phases: dict[str, int]  # on the device, by phase
    device: int  # on the device, in the largest phase
    host: int  # on the host, in addition
    peak: int  # expected `peak_memory_bytes`; on a CPU with the present memory of the process


class Footprint:
    """Sizes of a job on a device; its model may be on the meta device.

    Attributes:
        layers, all_layers, largest_layer: number of decoder layers, and parameters of all of them
            and of the largest.
        item: bytes of a weight.
        widest: largest number of rows of a channel group, over its members.
        largest: weights of the largest channel group.
        pruned: number of weights in the groups to prune.
        plans: plan of a permutation and of a mask that learn, by group.
        window_bytes: bytes of the states of a calibration window.
        text: tokens of the calibration text that a rank reads.
        forward: operations of a rank in their forward through all layers.
        measured: tokens of each evaluated text that a rank reads.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        methods: Methods,
        groups: ModelGroups,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model = model
        self.methods = methods
        self.device = device
        self.on_a_host = device.type == "cpu"
        self.ranks = parallel.world_size()
        layers = decoder_layers(model)
        layer_sizes = [sum(value.numel() for value in layer.parameters()) for layer in layers]
        self.layers = len(layers)
        self.largest_layer = max(layer_sizes)
        self.all_layers = sum(layer_sizes)
        self.parameters = model.num_parameters()
        self.hidden = model.config.hidden_size
        self.vocabulary = model.config.vocab_size
        self.dtype = working_dtype(getattr(torch, config.model.dtype), device)
        self.item = self.dtype.itemsize
        self.compute_dtype = compute_dtype(config.compute_dtype, self.dtype, device)
        self.groups = groups
        self.widest = max(sum(group.rows) for group in self.groups.every)
        self.largest = max(group.weights for group in self.groups.every)
        self.pruned = sum(group.weights for group in self.groups.pruned)
        self.plans: dict[str, LearningPlan] = {}
        for group in ("permutation", "mask"):
            if group in methods.learned:
                method = methods.learned[group]
                self.plans[group] = method.plan(groups.pruned, self.layers, config.pattern)
        self.samples = config.calibration.samples
        self.seqlen = config.calibration.seqlen
        self.window_bytes = self.seqlen * self.hidden * self.item
        self.text = self.samples * self.seqlen / self.ranks
        self.forward = 2 * self.all_layers * self.text
        texts = config.evaluation.perplexity
        self.measured = (texts.limit * texts.seqlen if texts.limit else _TEST_TOKENS) / self.ranks

    def streams(self, placement: str) -> bool:
        """Tell whether layers are copied to the device one at a time."""
        return placement in ("disk", "sharded") or (placement == "host" and not self.on_a_host)

    def needs(self, placement: str) -> Needs:
        """Return the memory that a placement needs."""
        weights = self.parameters
        if self.streams(placement):
            # The present layer and the next; a GPU may still compute with the layer before.
            at_once = 2 if self.on_a_host or placement == "sharded" else 3
            weights += min(self.layers, at_once) * self.largest_layer - self.all_layers
        weights *= self.item
        if placement == "sharded":
            weights += self.all_layers * self.item // self.ranks
        phases = {name: weights + cost.memory for name, cost in self.phases(placement).items()}
        device = max(phases.values())
        host = self._on_the_host(placement)
        peak = device + host + host_memory() if self.on_a_host else device
        return Needs(phases, device, host, peak)

    def minutes(self, placement: str, speed: Speed) -> dict[str, float]:
        """Return the minutes of each phase in a placement."""
        minutes = {}
        for name, cost in self.phases(placement).items():
            seconds = cost.seconds + cost.products / speed[self.compute_dtype]
            seconds += cost.single / speed[torch.float32]
            if self.streams(placement):
                copied = cost.passes * self.all_layers * self.item
                seconds = max(seconds, copied / _COPIED_A_SECOND[placement])
            minutes[name] = seconds / 60
        return minutes

    def phases(self, placement: str) -> dict[str, PhaseCost]:
        """Return the phases of the job, by the names under which a run records their seconds."""
        streams = self.streams(placement)
        methods = self.methods
        loading = _START_SECONDS + self.parameters * self.item / _FILES_A_SECOND
        evaluation = self._evaluate()
        work = [
            ("load", PhaseCost(0, seconds=loading)),
            ("evaluate dense", evaluation),
            ("calibrate", self._calibrate()),
        ]
        if methods.allocation is not None:
            work.append(("allocate", self._allocate(methods.allocation.windows)))
        if methods.permutation is not None and methods.permutation.searches:
            work.append(("permute", self._search(methods.permutation.constraint)))
        if "permutation" in self.plans:
            # The gradients of soft permutations stay in memory until the end of backward.
            learning = self._learn(methods.permutation, self.plans["permutation"], 4, streams)
            work.append(("permute", learning))
        if methods.mask is not None and methods.mask.statistics:
            work.append(("mask", self._refine_masks(methods.mask.statistics)))
        if "mask" in self.plans:
            plan = self.plans["mask"]
            waiting = self.compute_dtype.itemsize if plan.keeps_masked else 0
            work.append(("mask", self._learn(methods.mask, plan, waiting, streams)))
        if "reconstruction" in methods.learned:
            work.append(("prune", self._learn_weights(streams)))
        work += [("prune", self._prune()), ("evaluate sparse", evaluation)]
        phases: dict[str, PhaseCost] = {}
        for name, cost in work:
            phases[name] = phases[name].then(cost) if name in phases else cost
        return phases

    def _grams(self, statistics: Statistics) -> float:
        """Return the operations of the Gram matrices of all channel groups, if they are summed."""
        if Gram not in statistics:
            return 0.0
        return 2.0 * self.text * sum(group.channels**2 for group in self.groups.every)

    def _forward_memory(self, statistics: Statistics) -> int:
        tokens = self.config.calibration.batch_size * self.seqlen
        widest = max(group.channels for group in self.groups.every)
        sums = sum(kind.memory(widest) for kind in set(statistics))
        return tokens * (6 * self.hidden + 2 * self.widest) * self.item + sums

    def _calibrate(self) -> PhaseCost:
        statistics = self.methods.pruner.statistics
        return PhaseCost(
            self._forward_memory(statistics),
            products=self.forward,
            single=self._grams(statistics),
            seconds=_START_SECONDS,
        )

    def _allocate(self, windows: int) -> PhaseCost:
        tokens = min(windows, self.samples) * self.seqlen / self.ranks
        # From the layer of the group on; on average half of the layers.
        passes = len(self.groups.pruned) / 2
        weights = self.all_layers + 4 * self.hidden * self.vocabulary
        return PhaseCost(self._forward_memory(()), 2 * tokens * passes * weights, passes=passes)

    def _search(self, constraint: Any) -> PhaseCost:
        """Return the search for permutations; a GPU makes scores while the cores solve others."""
        m = self.config.pattern.m
        seconds = 0.0
        pairs = 0
        searched = shared_permutations(self.groups.pruned, constraint)
        for permutation in searched:
            width = permutation.segment // m
            assignments = permutation.channels // permutation.segment * m
            rows = permutation.repeats * sum(sum(group.rows) for group in permutation.groups)
            seconds += assignments * _ASSIGNMENT_SECONDS * width**2.5
            pairs += assignments * width**2 * rows
        if self.on_a_host:
            return PhaseCost(4 * self.largest, single=_PAIR_OPERATIONS * pairs, seconds=seconds)
        places = min(16 if self.config.plan_on else cores(), len(searched))
        return PhaseCost(4 * self.largest, seconds=seconds / places)

    def _refine_masks(self, statistics: Statistics) -> PhaseCost:
        """Return the exchanges of a mask; each rank searches for itself."""
        # The search takes as long as three Grams of the whole text.
        products = (1 + 3 * self.ranks) * self._grams(statistics)
        memory = self._forward_memory(statistics) + 6 * 4 * self.largest
        return PhaseCost(memory, self.forward, single=products)

    def _learn_weights(self, streams: bool) -> PhaseCost:
        pattern = self.config.pattern
        weights = self.pruned * pattern.n // pattern.m
        # Positions of kept weights, and rounded copies of float32 weights.
        waiting = 4 + (2 * self.pruned // weights if self.item == 4 else 0)
        plan = LearningPlan([range(self.layers)], weights)
        return self._learn(self.methods.reconstruction, plan, waiting, streams)

    def _learn(self, method: Any, plan: LearningPlan, waiting: int, streams: bool) -> PhaseCost:
        """Return a phase that learns; `waiting` bytes a parameter stay until backward."""
        parameters = plan.parameters * plan.depth // plan.layers
        share = plan.layers / self.layers
        of_rank = ceil(method.batch_size / self.ranks)
        together = min(of_rank, method.micro_batch_size or of_rank) * self.seqlen
        gathers = method is self.methods.mask and self.config.permutation.get("name") != "none"
        layer_bytes = kept_a_token(self.groups.every, self.hidden, self.item, gathers) * self.item
        activations = together * layer_bytes * plan.depth
        recomputes = streams or method.activation_checkpointing
        if recomputes is None:
            recomputes = activations > KEPT_ON_A_HOST
        if recomputes:
            states = self.hidden * (plan.depth + 8) + 4 * self.widest
            activations = together * states * self.item
        # Parameters, gradients and two moments; a layer's masked weight and its gradient.
        memory = (16 + waiting) * parameters + activations + 3 * self.largest * self.item
        if needs_teacher(method, self.samples, self.window_bytes, streams):
            memory += self.all_layers * self.item
        samples = method.samples or self.samples
        steps = method.steps_for(samples)
        tokens = steps * method.batch_size * self.seqlen / self.ranks
        measured = (1 + method.select_from) * samples * self.seqlen / self.ranks
        products = tokens * _STEP * (4 if recomputes else 3) + measured
        products *= 2 * self.all_layers * share
        if method.loss == "kl":
            # A copy of the head in the dtype of products; four values for each logit of a chunk.
            head = 2 * self.hidden if self.item > 2 else 0
            memory += self.vocabulary * (head + 16 * chunk_of(self.device, self.vocabulary))
            products += tokens * _STEP * self.vocabulary * 8 * self.hidden
        passes = (1 + 2 * steps) * share
        return PhaseCost(memory, products, seconds=_START_SECONDS, passes=passes)

    def _prune(self) -> PhaseCost:
        reconstruction = self.methods.reconstruction
        statistics = self.methods.pruner.statistics
        iterations = 0
        if reconstruction is not None:
            statistics = (*statistics, *reconstruction.statistics)
            iterations = reconstruction.iterations
        # New weights of a layer, in addition to its old weights, and their saliency.
        memory = self._forward_memory(statistics) + self.largest_layer * self.item
        memory += 8 * self.largest
        forwards = 2 if self.config.calibration.statistics == "dense" else 4
        changes = 0.0
        bytes_a_weight = 2
        if self.methods.change_weights:
            forwards = 4
            bytes_a_weight += 2 * self.item
            products = 2 + 4 * iterations
            changes = self._grams(statistics)
            for group in self.groups.pruned:
                changes += group.channels * (3 * group.channels**2 + products * group.weights)
        return PhaseCost(
            memory,
            products=forwards * self.forward,
            single=changes,
            seconds=self.pruned * bytes_a_weight / _FILES_A_SECOND,
            passes=2,
        )

    def _evaluate(self) -> PhaseCost:
        texts = self.config.evaluation.perplexity
        # Logits of a batch; of a window float32 logarithms, and float32 logits for another dtype.
        longest = max(texts.batch_tokens, texts.seqlen)
        memory = tokens_at_a_time(self.vocabulary, longest) * self.item
        memory += tokens_at_a_time(self.vocabulary, texts.seqlen) * (4 if self.item == 4 else 8)
        tokens = self.measured * len(texts.names)
        batches = 0.0
        lm_eval = self.config.evaluation.lm_eval
        for task in self.config.evaluation.tasks.values():
            shots = 1 + (task.num_fewshot or 0)
            items = task.limit or lm_eval.limit or _ITEMS
            sequences = items * _ANSWERS / self.ranks
            tokens += sequences * _TOKENS * shots
            batches += sequences / lm_eval.batch_size
            # Logits of a batch and their logarithms.
            memory = max(memory, lm_eval.batch_size * _LONGEST * shots * 2 * self.item)
        operations = 2.0 * (self.all_layers + self.hidden * self.vocabulary) * tokens
        return PhaseCost(
            memory * self.vocabulary,
            # Products of float32 models are not rounded.
            products=operations if self.item == 2 else 0.0,
            single=0.0 if self.item == 2 else operations,
            seconds=_BATCH_SECONDS * batches,
            passes=2 + batches,
        )

    def _on_the_host(self, placement: str) -> int:
        streams = self.streams(placement)
        # Targets of all windows, and this rank's states of two streams.
        stored = stored_windows(self.methods.all, self.samples, self.window_bytes, streams)
        tokens = stored * self.seqlen
        states = ceil((1 + 2 / self.ranks) * tokens)
        if placement != "device" and self.config.evaluation.perplexity.names:  # states of a text
            states = max(states, ceil(self.measured))
        size = states * self.hidden * self.item
        if self.on_a_host and not streams and self.plans and self.config.model.source != "random":
            # Pages of mapped files, in addition to the weights in the layout for learning.
            size += self.all_layers * self.item
        if placement != "disk" or self.methods.mask is not None:
            size += self.pruned // 8  # masks, a bit for each weight
        if placement == "host" and streams:
            # Pinned memory, of which torch allocates a power of two for each tensor.
            for value in decoder_layers(self.model).parameters():
                size += 1 << (value.numel() * self.item - 1).bit_length()
        return size
