"""Logits of a permutation in blocks, and the soft permutations that Sinkhorn's iterations give."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permllm.permutation.foldable import BlockStack


class BlockLogits(nn.Module):
    """Learnable logits of one permutation, relative to a fixed start (PermLLM, section 4.2).

    Args:
        base: int64 `(C_in,)`, the permutation at the start, which is cut into blocks: position p of
            block b holds channel `base[b B + p]`.
        stacks: blocks of the positions (`split_blocks`).
        logits: float32 or float64 `(blocks, B, B)` for each stack; row = channel of the block, as
            in `base`; column = target position in the block.
        scale: start of a learnable scalar a (the paper's released code). The effective logits are
            `clamp(a * logits, -1, 1)`, and their gradient ignores the clamp, so that a logit can
            leave the bound. None: no scale and no clamp.
    """

    base: Tensor
    first: Tensor

    def __init__(
        self,
        base: Tensor,
        stacks: list[BlockStack],
        logits: list[Tensor],
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("base", base.clone())  # loading a state writes into the buffer
        self.stacks = stacks
        starts = [
            stack.start + stack.size * torch.arange(stack.count).repeat_interleave(stack.size)
            for stack in stacks
        ]
        self.register_buffer("first", torch.cat(starts).to(base.device), persistent=False)
        self.logits = nn.ParameterList(nn.Parameter(stack) for stack in logits)
        self.scale = None
        if scale is not None:
            self.scale = nn.Parameter(torch.tensor(scale, device=logits[0].device))

    def effective(self, number: int) -> Tensor:
        """Return the effective logits of a stack."""
        logits: Tensor = self.logits[number]
        if self.scale is None:
            return logits
        scaled = logits * self.scale
        # The difference is zero and has the gradient of `scaled`.
        return scaled.detach().clamp(-1.0, 1.0) + (scaled - scaled.detach())

    def permutation(self, hard: Tensor) -> Tensor:
        """Return the channel at each position, int64 `(C_in,)`.

        Args:
            hard: int64 `(C_in,)`, the row of the block's matrix at each position.
        """
        return self.base[self.first + hard]


class SoftBatch:
    """Soft permutations of one block size, made together, and the backward to their logits.

    Forward uses the hard permutations, and `logit_gradient` makes the values of the soft ones
    again. So placeholders collect the gradients: zeros of their shape, without memory of their own.

    Args:
        logits: logits of all permutations, by name.
        stacks: stacks in this batch, each by its permutation and its number in the permutation.
        temperature, half_iterations: as in `normalize`.

    Attributes:
        placeholders: leaf tensors, `(blocks, B, B)`, by stack.
        soft: soft permutations of all stacks, concatenated, `(blocks, B, B)`, not differentiable;
            the learner deletes them when it has the hard ones.
    """

    def __init__(
        self,
        logits: Mapping[str, BlockLogits],
        stacks: list[tuple[str, int]],
        temperature: float,
        half_iterations: int,
    ) -> None:
        self._stacks = stacks
        self._logits = logits
        self._temperature = temperature
        effective = self._effective()
        self._counts = [len(stack) for stack in effective]
        self.soft, self._potentials = normalize(_joined(effective), temperature, half_iterations)
        zero = self.soft.new_zeros(())
        self.placeholders = {
            stack: zero.expand(values.shape).requires_grad_()
            for stack, values in zip(stacks, effective, strict=True)
        }

    def parts(self, values: Tensor) -> dict[tuple[str, int], Tensor]:
        """Return the part of each stack in values `(blocks, ...)`."""
        return dict(zip(self._stacks, values.split(self._counts), strict=True))

    def backward(self) -> None:
        """Send the gradients of the placeholders on to the logits."""
        gradients = []
        for placeholder in self.placeholders.values():
            assert placeholder.grad is not None
            gradients.append(placeholder.grad)
        effective = self._effective()
        of_logits = logit_gradient(
            _joined(effective), self._temperature, self._potentials, _joined(gradients)
        )
        torch.autograd.backward(effective, of_logits.split(self._counts))

    def _effective(self) -> list[Tensor]:
        return [self._logits[name].effective(number) for name, number in self._stacks]


def soft_batches(
    logits: Mapping[str, BlockLogits], temperature: float, half_iterations: int
) -> list[SoftBatch]:
    """Return the soft permutations of several permutations in batches.

    On a GPU all blocks of a size are one batch, because each operator is a launch. On a CPU a batch
    is one stack, which fits into the cache.
    """
    batches: dict[object, list[tuple[str, int]]] = {}
    for name, blocks in logits.items():
        for number, stack in enumerate(blocks.logits):
            together = stack.shape[-1] if stack.is_cuda else (name, number)
            batches.setdefault(together, []).append((name, number))
    return [SoftBatch(logits, stacks, temperature, half_iterations) for stacks in batches.values()]


def _joined(stacks: list[Tensor]) -> Tensor:
    return stacks[0].detach() if len(stacks) == 1 else torch.cat(stacks).detach()


@torch.no_grad()
def normalize(
    logits: Tensor, temperature: float, half_iterations: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the soft permutation of each block (PermLLM, section 4.1; Adams and Zemel 2011).

    With logits X and temperature tau it is `S^L(X / tau)`:

        S^0(X) = exp(X)        S^l(X) = T_c(T_r(S^(l-1)(X)))

    `T_r` divides each row by its sum, and `T_c` each column. In the log domain each of these half
    iterations subtracts a log-sum-exp, the potential. Autograd would keep 2 L matrices of B x B;
    `logit_gradient` needs only the potentials.

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target
            position.
        temperature: tau > 0; the lower, the closer the result is to a hard permutation.
        half_iterations: 2 L, the number of half iterations: rows, columns, rows and so on.

    Returns:
        The soft permutations, `(blocks, B, B)`, positive, whose columns sum to one for L >= 1; and
        the potentials, alternately `(blocks, B, 1)` and `(blocks, 1, B)`.
    """
    log_p = logits / temperature
    potentials = []
    for half in range(half_iterations):  # rows first, so that the columns are exact at the end
        potential = log_p.logsumexp(-1 - half % 2, keepdim=True)
        log_p -= potential
        potentials.append(potential)
    return log_p.exp_(), potentials


@torch.no_grad()
def logit_gradient(
    logits: Tensor, temperature: float, potentials: list[Tensor], grad_soft: Tensor
) -> Tensor:
    """Return the gradient of the logits from the gradient of the soft permutations.

    A half iteration `Y = X - logsumexp(X)` has `dX = dY - exp(Y) sum(dY)`, with the sum along the
    same dimension. The matrices `exp(Y)` are recomputed from the last to the first.

    Args:
        logits, temperature, potentials: of `normalize`.
        grad_soft: gradient of the soft permutations, `(blocks, B, B)`.
    """
    log_p = logits / temperature
    for potential in potentials:
        log_p -= potential
    soft = log_p.exp_()
    grad = grad_soft * soft
    for half in reversed(range(len(potentials))):
        grad -= soft * grad.sum(-1 - half % 2, keepdim=True)
        if half:  # potentials after the first are at most log B, so exp cannot overflow
            soft *= potentials[half].exp()
    return grad.div_(temperature)
