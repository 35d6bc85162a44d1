"""Trial: weights and masks that learn together (AST), and ADMM on the true loss (ELSA)."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from permllm.runtime.files import cache_directory
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.learner import Learner, Progress


def dense_weights(paths: Sequence[str]) -> list[Tensor]:
    (file,) = (cache_directory() / "models").glob("smollm2*/model.safetensors")
    tensors = load_file(file)
    return [tensors[f"{path}.weight"].float() for path in paths]


class MovingWeights(Learner):
    """All weights of the linears, `(C_out, C_in)` in units of the root mean square of the kept ones.

    mode ast: forward multiplies the masked weights, the gradient goes to all weights, the mask is
    chosen anew. mode elsa: forward is dense, a penalty pulls to the last projection.
    """

    def __init__(
        self,
        mode: str,
        paths: Sequence[str],
        linears: Sequence[nn.Linear],
        masks: Sequence[Tensor],
        permutations: Sequence[Tensor],
        factors: Sequence[SaliencyFactors],
        pattern: NMPattern,
        settings: Any,
    ) -> None:
        self.mode = mode
        self.settings = settings
        self._weights = [linear.weight for linear in linears]
        self._masks = [mask.clone() for mask in masks]
        self._permutations = list(permutations)
        self._factors = list(factors)
        self._pattern = pattern
        self._units: list[float] = []
        self.values: list[Tensor] = []
        self.optimizer: Any = None
        self._changed = 0.0
        for weight, mask, dense in zip(self._weights, self._masks, dense_weights(paths), strict=True):
            kept = weight.detach()[mask]
            unit = kept.square().mean().sqrt().item() or 1.0
            outside = dense if mode == "elsa" else settings.pruned_start * dense
            value = torch.where(mask, dense if mode == "elsa" else weight.detach(), outside) / unit
            self._units.append(unit)
            self.values.append(value)
        self._targets = [value * mask for value, mask in zip(self.values, self._masks)]
        self._duals = [torch.zeros_like(value) for value in self.values] if mode == "elsa" else []
        self._dual_done = 0

    @contextmanager
    def gradients(self) -> Any:
        with ExitStack() as hooks:
            for number, weight in enumerate(self._weights):
                weight.requires_grad_(True)
                hooks.callback(weight.requires_grad_, False)
                hook = partial(self._take, number)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(hook))
            yield

    def _take(self, number: int, weight: Tensor) -> None:
        value = self.values[number]
        gradient = weight.grad.to(value.dtype) * self._units[number]
        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
        weight.grad = None

    def parameters(self) -> list[Tensor]:
        return self.values

    def _mask(self, number: int, value: Tensor) -> Tensor:
        return permuted_nm_mask(
            saliency(value, self._factors[number]), self._permutations[number], self._pattern
        )

    @torch.no_grad()
    def begin(self, progress: Progress | None) -> None:
        if self.mode == "elsa":
            self._begin_elsa(progress)
        else:
            self._begin_ast(progress)

    def _begin_ast(self, progress: Progress | None) -> None:
        s = self.settings
        if progress is not None and progress.step:
            if s.decay:
                at = progress.step / progress.steps
                rate = self.optimizer.param_groups[0]["lr"]
                ramp = min(1.0, 4 * at)
                for value, mask in zip(self.values, self._masks):
                    value.mul_(torch.where(mask, 1.0, 1.0 - s.decay * ramp * rate))
            if progress.step % s.refresh == 0 and progress.step <= progress.steps * 2 / 3:
                changed = total = 0
                for number, value in enumerate(self.values):
                    mask = self._mask(number, value)
                    changed += int((mask ^ self._masks[number]).sum())
                    total += mask.numel()
                    self._masks[number] = mask
                self._changed = changed / total
        for number, weight in enumerate(self._weights):
            weight.copy_(self.values[number] * self._units[number] * self._masks[number])

    def _begin_elsa(self, progress: Progress | None) -> None:
        s = self.settings
        last = progress is None or progress.step + 1 >= progress.steps
        if progress is not None and progress.step and progress.step % s.dual_every == 0:
            if self._dual_done != progress.step:
                changed = total = 0
                for number, value in enumerate(self.values):
                    moved = value + self._duals[number]
                    second = self.optimizer.state[value]["exp_avg_sq"]
                    mask = self._project(moved, second, number)
                    changed += int((mask ^ self._masks[number]).sum())
                    total += mask.numel()
                    self._masks[number] = mask
                    self._targets[number] = moved * mask
                    self._duals[number] = moved - self._targets[number]
                self._changed = changed / total
                self._dual_done = progress.step
        for number, weight in enumerate(self._weights):
            weight.copy_(self.values[number] * self._units[number])

    def _project(self, moved: Tensor, second: Tensor, number: int) -> Tensor:
        score = (second + 1e-30) * moved.square()
        return permuted_nm_mask(score, self._permutations[number], self._pattern)

    @torch.no_grad()
    def collect(self) -> None:
        if self.mode != "elsa":
            return
        for number, value in enumerate(self.values):
            pull = value - self._targets[number] + self._duals[number]
            value.grad.add_(pull, alpha=self.settings.penalty * self._units[number] ** 2)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """Write the pruned weights; return the masks."""
        distance = norm = 0.0
        for number, weight in enumerate(self._weights):
            value = self.values[number]
            if self.mode == "elsa":
                second = self.optimizer.state[value]["exp_avg_sq"]
                self._masks[number] = self._project(value + self._duals[number], second, number)
                distance += float((value * ~self._masks[number]).square().sum())
                norm += float(value.square().sum())
            weight.copy_(value * self._units[number] * self._masks[number])
        if norm:
            print(f"share of x outside of z: {distance / norm:.6f}", flush=True)
        return self._masks

    def step_values(self, progress: Progress) -> dict[str, Tensor]:
        changed, self._changed = self._changed, 0.0
        return {"changed": torch.tensor(changed)}

    def state(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "masks": self._masks,
            "targets": self._targets if self.mode == "elsa" else [],
            "duals": self._duals,
            "dual_done": self._dual_done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
        self._masks = [mask.bool() for mask in state["masks"]]
        if self.mode == "elsa":
            self._targets = list(state["targets"])
            self._duals = list(state["duals"])
            self._dual_done = state["dual_done"]
