"""Decoder layers of a model, run one at a time with the arguments that the model would pass.

transformers gives each layer its masks and rotary embeddings from outside, and families differ in
what they pass. Instead of rebuilding these, the layers are replaced for one forward by stand-ins
that record what they are given and return their input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from permllm.models.attention import attention_in_float32
from permllm.models.families import decoder_layers, family_of
from permllm.models.offload import placement_of
from permllm.runtime.memory import free_memory
from permllm.runtime.precision import products_in

# Share of a GPU's free memory that the states of a stream may take: pruning has two streams.
_SHARE_OF_FREE = 1 / 8


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of the decoder layers of a model for one batch of tokens.

    Attributes:
        hidden: `(batch, tokens, hidden)`, the input of the first layer, in the model's dtype.
        kwargs: the keyword arguments of each layer (tensors are shared between layers, not copied).
    """

    hidden: Tensor
    kwargs: list[dict[str, Any]]


@torch.no_grad()
def layer_inputs(model: nn.Module, tokens: Tensor) -> LayerInputs:
    """Embed `tokens` int64 `(batch, tokens)` and record the arguments of each decoder layer."""
    layers, tuples = decoder_layers(model), family_of(model).tuples
    hidden: list[Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def stand_in(*args: Tensor, **keywords: Any) -> Tensor | tuple[Tensor]:
        states = args[0] if args else keywords.pop("hidden_states")
        if not hidden:
            # Gradient checkpointing has the embedding's output ask for gradients.
            hidden.append(states.detach())
        kwargs.append(keywords)
        return (states,) if tuples else states

    with replaced_forwards(layers, stand_in):
        # The base model, without the head: its logits over the vocabulary would dwarf the
        # embedding's cost.
        body: Any = model.base_model
        body(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    return LayerInputs(hidden[0], kwargs)


@contextmanager
def replaced_forwards(layers: Iterable[nn.Module], forward: Any) -> Iterator[None]:
    """Replace the forward of each of these modules inside the context."""
    layers = list(layers)
    before = [vars(layer).get("forward") for layer in layers]  # such as a compiled one
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # uncovers the class's own method
            if own is not None:
                layer.forward = own


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the output `(batch, tokens, hidden)` of one decoder layer.

    Some layers return a tuple. Indexing a bare tensor would silently keep one sequence.
    """
    with attention_in_float32(hidden.device):
        output = layer(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def last_states(
    model: nn.Module, tokens: Tensor, batch_size: int, compute_dtype: torch.dtype
) -> Tensor:
    """Return the output of the last decoder layer, `(samples, tokens, hidden)` on the host.

    Args:
        model: of a known family.
        tokens: int64 `(samples, tokens)`.
        batch_size: samples a forward.
        compute_dtype: of matrix products.
    """
    stream = LayerStream(model, tokens, batch_size, compute_dtype)
    stream.to_the_end("dense states")
    return stream.states()


class LayerStream:
    """Hidden states of many samples, advanced through the decoder one layer at a time.

    The states between two layers wait on the host, from where a batch at a time visits the device,
    or on a GPU that has room.

    Args:
        model: of a known family; its embedding is run here.
        tokens: int64 `(samples, tokens)`, all of one length.
        batch_size: samples a forward.
        compute_dtype: of matrix products (`permllm.runtime.precision`); None leaves them as they
            are where the stream is used.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        batch_size: int,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._placement = placement_of(model)
        self._layers = decoder_layers(model)
        self._compute_dtype = compute_dtype
        self._device = next(model.parameters()).device
        self._batches = tokens.split(batch_size)
        self._batch_size = batch_size
        # By batch size: the last batch may be smaller.
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._states = torch.empty(0)
        for position, batch in enumerate(self._batches):
            inputs = layer_inputs(model, batch)
            self._kwargs.setdefault(len(batch), inputs.kwargs)
            if not position:
                self._states = _room_for(len(tokens), inputs.hidden)
            self._hidden[position].copy_(inputs.hidden)

    @property
    def _hidden(self) -> tuple[Tensor, ...]:
        """Return the states batch by batch."""
        return self._states.split(self._batch_size)

    def forward(self, index: int) -> Iterator[Tensor]:
        """Yield the outputs of layer `index` batch by batch, on the device; keep the states."""
        dtype = self._compute_dtype
        with self._placement.layer(index) as layer:
            for hidden in self._hidden:
                kwargs = self._kwargs[len(hidden)][index]
                with torch.no_grad(), products_in(dtype, self._device) if dtype else nullcontext():
                    output = run_layer(layer, hidden.to(self._device), kwargs)
                yield output

    def advance(self, index: int) -> None:
        """Replace the states by the outputs of layer `index` as it now is."""
        states = self._states
        for position, output in enumerate(self.forward(index)):
            if output.dtype != states.dtype:
                states = torch.empty_like(states, dtype=output.dtype)
            states.split(self._batch_size)[position].copy_(output)
        self._states = states

    def to_the_end(self, label: str) -> None:
        """Advance through all layers, with a bar of progress."""
        for index in tqdm(range(len(self._layers)), desc=label, unit="layer", leave=False):
            self.advance(index)

    def states(self) -> Tensor:
        """Return the states, `(samples, tokens, hidden)` on the host, until the stream advances."""
        return self._states.cpu()


def _room_for(samples: int, batch: Tensor) -> Tensor:
    """Return memory for the states of all samples; on the host where a GPU has no room."""
    size = samples * batch[0].numel() * batch.element_size()
    on_gpu = batch.device.type == "cuda" and size <= _SHARE_OF_FREE * free_memory(batch.device)
    return torch.empty(
        samples, *batch.shape[1:], dtype=batch.dtype, device=batch.device if on_gpu else "cpu"
    )
