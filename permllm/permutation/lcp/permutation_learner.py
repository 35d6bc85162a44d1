"""Learner of a stage's permutations, soft and hard, which it sets in the masked linears."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.permutation.foldable import SharedPermutation
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.permutation_linear import PermutationLinear
from permllm.permutation.lcp.sinkhorn import BlockLogits, SoftBatch, soft_batches
from permllm.training.learner import Learner, Progress, on_cpu


def members(
    shared: Iterable[SharedPermutation], layers: Container[int]
) -> Iterator[tuple[SharedPermutation, ChannelGroup]]:
    """Yield the channel groups in some layers, each with its shared permutation."""
    for permutation in shared:
        for group in permutation.groups:
            if group.layer in layers:
                yield permutation, group


class PermutationLearner(Learner):
    """Learner of the shared permutations in a stage.

    A step has four parts:

    1. `begin` makes the soft permutations (Sinkhorn) and from them the hard ones (assignment).
       Nothing reads the values of the soft ones after that, so placeholders replace them.
    2. `set_layer` gives both to the masked linears before their layer runs.
    3. Backward of the masked linears adds the gradients of the soft ones to the placeholders.
    4. `collect` sends these gradients through Sinkhorn to the logits.

    Args:
        permutations: values of all shared permutations at the start, int64 `(channels,)` by name.
        logits: logits of each permutation that learns, by name.
        linears: masked linears of the stage, by path.
        temperature: returns the temperature of the soft permutations in a step.
        half_iterations: number of half iterations in Sinkhorn's normalisation.

    Attributes:
        present: present values of all shared permutations, on the device of the logits.
        best: best values of all shared permutations, on the CPU.
    """

    def __init__(
        self,
        shared: list[SharedPermutation],
        permutations: Mapping[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, PermutationLinear],
        temperature: Callable[[Progress], float],
        half_iterations: int,
    ) -> None:
        self.shared = shared
        self.logits = logits
        self.linears = linears
        # Names in a ModuleDict have no dots.
        self._module = nn.ModuleDict(
            {name.replace(".", "/"): block for name, block in logits.items()}
        )
        self.temperature = temperature
        self.half_iterations = half_iterations
        bases = [block.base for block in logits.values()]
        self.channels = sum(map(len, bases))
        self.device = bases[0].device
        self.present = self._on_device(permutations)
        self.best = on_cpu(permutations)
        self._hard: dict[str, Tensor] = {}
        self._soft: dict[str, list[Tensor]] = {}
        self._batches: list[SoftBatch] = []
        # Permutations of the last step, and at the end of the last epoch.
        self._at_step = self.present
        self._at_epoch = self.present

    def _on_device(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: permutation.to(self.device) for name, permutation in permutations.items()}

    @override
    def parameters(self) -> list[Tensor]:
        return list(self._module.parameters())

    @override
    @torch.no_grad()
    def begin(self, progress: Progress) -> None:
        """Make the soft and the hard permutations of a step."""
        self._batches = soft_batches(self.logits, self.temperature(progress), self.half_iterations)
        try:
            hardened = harden([batch.soft for batch in self._batches])
        except ValueError as error:
            raise ValueError(f"the soft permutation of {self._broken()} is not finite") from error
        hard: dict[tuple[str, int], Tensor] = {}
        soft: dict[tuple[str, int], Tensor] = {}
        for batch, blocks in zip(self._batches, hardened, strict=True):
            del batch.soft  # only `harden` reads the values; placeholders get the gradients
            hard |= batch.parts(blocks)
            soft |= batch.placeholders
        self.present = dict(self.present)
        for name, block in self.logits.items():
            stacks = [(name, number) for number in range(len(block.logits))]
            self._soft[name] = [soft[stack] for stack in stacks]
            self._hard[name] = torch.cat([hard[stack].flatten() for stack in stacks])
            self.present[name] = block.permutation(self._hard[name])

    def _broken(self) -> str:
        """Return the name of a permutation whose soft permutation is not finite."""
        for batch in self._batches:
            for (name, _), soft in batch.parts(batch.soft).items():
                if not bool(soft.isfinite().all()):
                    return name
        raise AssertionError

    @override
    def collect(self) -> None:
        """Send the gradients of the soft permutations on to the logits."""
        for batch in self._batches:
            batch.backward()

    @override
    def set_layer(self, index: int) -> None:
        """Set the permutations of a layer's masked linears."""
        for permutation, group in members(self.shared, (index,)):
            columns = permutation.expand(self.present[permutation.name])
            hard = None
            soft: list[Tensor] = []
            if torch.is_grad_enabled() and permutation.name in self.logits:
                hard = permutation.expand_rows(self._hard[permutation.name])
                soft = permutation.expand_blocks(self._soft[permutation.name])
            for path in group.members:
                self.linears[path].set_permutation(columns, hard, soft)

    @override
    def step_values(self, progress: Progress) -> dict[str, Tensor]:
        """Return the temperature, and the share of channels that moved since the last step."""
        temperature = torch.tensor(
            self.temperature(progress), dtype=torch.float64, device=self.device
        )
        moved = self._moved(self._at_step)
        self._at_step = self.present
        return {"temperature": temperature, "flips": moved}

    @override
    def epoch_values(self, progress: Progress) -> dict[str, Any]:
        """Return the temperature, and the share of channels that moved in the epoch."""
        moved = float(self._moved(self._at_epoch))
        self._at_epoch = self.present
        return {"temperature": self.temperature(progress), "flips": moved}

    def _moved(self, before: dict[str, Tensor]) -> Tensor:
        """Return the share of channels that have moved since `before`, a scalar on the device."""
        earlier = torch.cat([before[name] for name in self.logits])
        present = torch.cat([self.present[name] for name in self.logits])
        return (earlier != present).sum().double() / self.channels

    @override
    def keep(self) -> None:
        self.best = on_cpu(self.present)

    @override
    def state(self) -> dict[str, Any]:
        return {
            "logits": self._module.state_dict(),
            "best": self.best,
            "present": self.present,
            "at_step": self._at_step,
            "at_epoch": self._at_epoch,
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._module.load_state_dict(state["logits"])
        self.best = on_cpu(state["best"])
        self.present = self._on_device(state["present"])
        self._at_step = self._on_device(state["at_step"])
        self._at_epoch = self._on_device(state["at_epoch"])
