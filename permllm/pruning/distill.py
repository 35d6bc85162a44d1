"""Distillation of the dense model into the kept weights of the pruned one, end to end."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.models.families import decoder_layers
from permllm.pruning.admm import ADMM
from permllm.pruning.kept_weights import KeptWeights, WeightLearner
from permllm.pruning.obs import OBS
from permllm.pruning.reconstruction import NoReconstruction, PrunedLinear, PrunedNetwork, Reconstruction
from permllm.runs.names import DISTILL_CHECKPOINT
from permllm.runtime.values import SETTINGS, Count, Positive, Whole
from permllm.sparsity.statistics import Statistics
from permllm.training.checkpoint import read_checkpoint
from permllm.training.learner import Window
from permllm.training.loop import Training
from permllm.training.settings import DescentSettings, LearningSettings, Loss


@dataclass(kw_only=True, config=SETTINGS)
class Distill(DescentSettings, Reconstruction):
    """Adam on all kept weights towards the dense model's next-token distributions, by the loop that everything learns in.

    Holds the weights and `KeptWeights` with its moments.
    """

    learned = True
    learning_rate: Positive = 1e-4
    epochs: Count = 2
    skip: Whole = 0
    start: Literal["masked", "obs", "admm"] = "masked"
    loss: ClassVar[Loss] = "kl"  # type: ignore[misc]

    @property
    def statistics(self) -> Statistics:  # type: ignore[override]
        """Return the statistics of the reconstruction that the weights start from."""
        return self._before.statistics

    @property
    def _before(self) -> Reconstruction:
        return {"masked": NoReconstruction, "obs": OBS, "admm": ADMM}[self.start]()

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the weight that learning starts from."""
        return self._before.linear(pruned)

    def network(self, pruned: PrunedNetwork) -> None:
        """Train the linears in place, from the latest checkpoint. Raises TrainingError when the loss is not finite."""
        problem = pruned.problem
        settings = LearningSettings.of(self, loss=self.loss, select_from=0)
        kept = KeptWeights(pruned.linears, pruned.masks)
        learner = WeightLearner(kept, self.learning_rate)
        window = Window(0, 0, len(decoder_layers(problem.model)), None, problem.target)
        with kept.gradients():
            state = read_checkpoint(problem, DISTILL_CHECKPOINT)
            history = [] if state is None else list(state["history"])
            problem.on_resume(list(history))
            training = Training(settings, problem, window, learner, "distill", DISTILL_CHECKPOINT, history)
            if state is not None:
                training.restore(state)
            del state  # which is as large as the weights
            training.run()
