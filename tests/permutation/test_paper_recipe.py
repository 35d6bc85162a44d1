"""`permutation=lcp-paper` against the released code's recipe, with dense matrices in float64."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import ByT5Tokenizer, PreTrainedModel

from permllm.models.families import ChannelGroup, channel_groups, decoder_layers, linear_at
from permllm.models.load import LoadedModel
from permllm.permutation.foldable import shared_permutations
from permllm.permutation.lcp.lcp import LCP
from permllm.pruning.methods import Job, ModelGroups, learning_problem, methods_of
from permllm.pruning.phases import calibrate
from permllm.settings.config import RunConfig
from permllm.sparsity.method import instantiate
from permllm.store.directory import Record
from permllm.store.loggers import NO_LOGGER
from permllm.training.kernels import EAGER
from permllm.training.learner import Progress, Stage
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.trainer import Trainer
from tests.conftest import tiny_model
from tests.problems import straight_through, tokens
from tests.settings.test_config import config

BATCH = torch.tensor([0, 2, 5])
EPOCHS = 4
BLOCK = 24  # of 32 and 64 channels: blocks of 24 and a smaller one


def learning(model: PreTrainedModel, settings: RunConfig) -> LearningProblem:
    """Return the problem that a job gives the method."""
    loaded = LoadedModel(model, ByT5Tokenizer(extra_ids=0), "tiny")
    groups = ModelGroups(channel_groups(model), channel_groups(model))
    methods = methods_of(settings)
    dtype = model.dtype
    job = Job(settings, methods, Record(), NO_LOGGER, loaded, groups, dtype, tokens())
    dense = calibrate(job)
    return learning_problem(job, "permutation", dense.factors, dense.target)


def last_output(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the last decoder layer's output in the model's own forward."""
    outputs: list[Tensor] = []
    handle = decoder_layers(model)[-1].register_forward_hook(lambda *args: outputs.append(args[2]))
    model(input_ids=ids)
    handle.remove()
    return outputs[0]


def norms(
    model: PreTrainedModel, groups: list[ChannelGroup], norm_tokens: int
) -> dict[str, Tensor]:
    """Return `sqrt(norm_tokens * mean over all tokens of x^2)` of each linear's channels."""
    sums: dict[str, Tensor] = {}
    handles = []
    for path in (path for group in groups for path in group.members):

        def note(_: object, args: tuple[Tensor], path: str = path) -> None:
            sums[path] = args[0].flatten(0, -2).square().sum(0)

        handles.append(linear_at(model, path).register_forward_pre_hook(note))
    model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return {path: (norm_tokens * found / tokens().numel()).sqrt() for path, found in sums.items()}


def clamped(logits: Tensor) -> Tensor:
    """Clamp in place on the data, so that autograd knows nothing of it."""
    logits.data.clamp_(-1, 1)
    return logits


def dense_permutation(
    logits: list[Tensor], scale: Tensor, temperature: float, iterations: int, order: Tensor
) -> Tensor:
    """Return P, `(C_in, C_in)`: hard values, soft gradients.

    Of several best assignments, as logits at the bound make them, the values are those of `order`.
    """
    softs, best = [], 0.0
    for block in (block for stack in logits for block in stack):
        soft = (clamped(block * scale) / temperature).softmax(-1)
        for _ in range(iterations):
            soft = soft / soft.sum(-1, keepdim=True)
            soft = soft / soft.sum(-2, keepdim=True)
        found = soft.detach().numpy()
        best += found[linear_sum_assignment(found, maximize=True)].sum()
        softs.append(soft)
    whole = torch.block_diag(*softs)
    hard = torch.zeros_like(whole)
    hard[order, torch.arange(len(order))] = 1.0
    assert float((whole.detach() * hard).sum()) == pytest.approx(best, rel=1e-12)
    return straight_through(hard, whole)


def dense_mask(weight: Tensor, norm: Tensor, pruner: str, p: Tensor) -> Tensor:
    magnitude = weight.abs()
    saliency = magnitude * norm
    if pruner == "ria":
        relative = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)
        saliency = relative * norm.sqrt()
    groups = (saliency @ p).unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups).scatter_(2, groups.topk(2, dim=2).indices, 1.0)
    return straight_through(kept.flatten(1) @ p.T, groups.softmax(2).flatten(1) @ p.T)


@pytest.mark.parametrize(
    ("pruner", "iterations", "norm_tokens"), [("wanda", 0, None), ("ria", 5, None), ("ria", 5, 50)]
)
def test_loss_and_gradients_of_a_step_are_those_of_the_formula(
    cache: Path, pruner: str, iterations: int, norm_tokens: int | None
) -> None:
    words = [f"permutation.sinkhorn_iterations={iterations}", f"permutation.epochs={EPOCHS}"]
    words += [f"block_size={BLOCK}", "permutation.batch_size=3", f"pruner={pruner}"]
    words += [f"permutation.norm_tokens={norm_tokens or 'null'}"]
    settings = config("model=tiny-random", "permutation=lcp-paper", *words)
    method: LCP = instantiate("permutation", settings.permutation)
    model = tiny_model("llama", dtype=torch.float64)
    problem = learning(model, settings)
    shared = shared_permutations(problem.groups, "free")
    start = method.start_permutations(problem, shared, 0)
    blocks = method.start_logits(problem, shared, start)
    for block in blocks.values():
        assert block.scale is not None
        # As after some steps: a third of the logits has reached the bound.
        block.scale.data.mul_(1.5)
    reference: Any = copy.deepcopy(blocks)
    stage = Stage(0, range(2), None, problem.target)
    with method.masked_linears(problem, shared, stage, EAGER) as linears:
        learner = method.learner(shared, start, blocks, linears)
        trainer = Trainer(Objective(method, problem, stage, learner), "lcp", "checkpoint")
        # Two steps an epoch: in the second of four.
        progress = Progress(3, trainer.steps, 1, trainer.epochs)
        temperature = learner.temperature(progress)
        loss = trainer.step(BATCH, progress)["loss"]

    norm = norms(model, problem.groups, norm_tokens or tokens().shape[1])
    target = last_output(model, tokens()[BATCH]).detach()
    for group in problem.groups:
        theirs, now = reference[group.name], 1.0 + (0.1 - 1.0) * 1 / EPOCHS
        order = learner.present[group.name]
        p = dense_permutation(list(theirs.logits), theirs.scale, now, iterations, order)
        for path in group.members:
            linear = linear_at(model, path)
            weight = linear.weight * dense_mask(linear.weight, norm[path], pruner, p)
            linear.forward = partial(nn.functional.linear, weight=weight, bias=linear.bias)
    output = last_output(model, tokens()[BATCH])
    expected = (1 - nn.functional.cosine_similarity(output, target, dim=-1)).mean()
    expected.backward()

    assert temperature == 0.775
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, block in blocks.items():
        mine: Any = block
        scale = reference[name].scale
        torch.testing.assert_close(mine.scale.grad, scale.grad, rtol=1e-4, atol=1e-9)
        for parameter, stack in zip(mine.logits, reference[name].logits, strict=True):
            largest = float(stack.grad.abs().max())
            torch.testing.assert_close(parameter.grad, stack.grad, rtol=1e-4, atol=1e-5 * largest)
            outside = (stack * scale).abs() > 1
            assert outside.float().mean() > 0.2
            assert parameter.grad[outside].abs().max() > 0.01 * largest
