"""Decoder layers of a model, run one at a time with the arguments that the model would pass.

A model passes masks and rotary embeddings to its layers, and families differ in these arguments.
They are recorded: for one forward, stand-ins take the places of the layers, record their arguments
and return their input.

Most models compute the arguments from the shape of a batch alone, such as a causal mask and the
rotary embedding of each position. Batches of one shape may then share the arguments. If a model
computes arguments from the tokens (`arguments_depend_on_tokens`), each batch needs its own.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from permllm.models.checkpoint import vocabulary_of
from permllm.models.families import decoder_layers, family_of
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory
from permllm.runtime.precision import products_as_they_are, products_in

# Largest share of a GPU's free memory for the states of a stream; pruning has two streams.
_SHARE_OF_FREE = 1 / 8
# Shape of the two windows of tokens whose arguments are compared.
_COMPARED = (2, 8)
# Name of our attention function among those of transformers.
_IN_FLOAT32 = "permllm_float32"


@torch.no_grad()
def layer_inputs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Embed tokens, int64 `(batch, tokens)`, and record the arguments of each decoder layer.

    Returns:
        The input of the first layer, `(batch, tokens, hidden)`, in the model's dtype, and the
        keyword arguments of each layer; layers share tensors.
    """
    layers = decoder_layers(model)
    tuples = family_of(model).tuples
    names = list(signature(type(layers[0]).forward).parameters)[1:]  # without self
    hidden: list[Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def stand_in(*args: Tensor, **keywords: Any) -> Tensor | tuple[Tensor]:
        """Record the arguments of a layer, and return its input."""
        arguments = dict(zip(names, args, strict=False)) | keywords
        states = arguments.pop(names[0])
        if not hidden:
            # With gradient checkpointing the embedding's output requires gradients.
            hidden.append(states.detach())
        kwargs.append(arguments)
        return (states,) if tuples else states

    with replaced_forwards(layers, stand_in):
        # Without the head, whose logits would cost much more than the embedding.
        body: Any = model.base_model
        body(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    return hidden[0], kwargs


def arguments_depend_on_tokens(model: nn.Module) -> bool:
    """Tell whether two batches of one shape give a model's layers different arguments."""
    vocabulary = vocabulary_of(cast(PreTrainedModel, model))
    # A generator of its own, so that a job draws the same numbers as without the comparison.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, _COMPARED, generator=generator)
    others = (tokens + 1) % vocabulary  # each token differs
    arguments, structure = tree_flatten(layer_inputs(model, tokens)[1])
    other_arguments, other_structure = tree_flatten(layer_inputs(model, others)[1])
    if structure != other_structure:
        return True
    for value, other in zip(arguments, other_arguments, strict=True):
        equal = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        if not equal:
            return True
    return False


@contextmanager
def replaced_forwards(layers: list[nn.Module] | nn.ModuleList, forward: Any) -> Iterator[None]:
    """Replace the forward of each of these modules inside the context."""
    before = [vars(layer).get("forward") for layer in layers]  # a compiled forward, for example
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # makes the method of the class visible again
            if own is not None:
                layer.forward = own


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the output `(batch, tokens, hidden)` of one decoder layer."""
    with attention_in_float32(layer):
        output = layer(hidden, **kwargs)
    # Some layers return a tuple. In a tensor, index 0 would be the first sequence.
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def attention_in_float32(layer: nn.Module) -> Iterator[None]:
    """Compute a layer's attention in float32 where a CPU needs its gradients, despite autocast.

    The backward of torch's attention takes three times as long in bfloat16 as in float32 with
    windows of 128 tokens. Long windows gain nothing from bfloat16 either. Another model of the
    process attends as before, unless it has the same object as its config.
    """
    configs = []  # from which modules read the name of their attention function
    if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        for module in layer.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = _IN_FLOAT32
                configs.append(config)
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _attend_in_float32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Any:
    """Return the result of transformers' function `sdpa` for float32 arguments."""
    if mask is not None and mask.is_floating_point():  # a bool mask stays as it is
        mask = mask.float()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with products_as_they_are(query):
        return attend(module, query.float(), key.float(), value.float(), mask, **options)


ALL_ATTENTION_FUNCTIONS.register(_IN_FLOAT32, _attend_in_float32)


@torch.no_grad()
def last_states(
    model: nn.Module, tokens: Tensor, batch_size: int, compute_dtype: torch.dtype
) -> Tensor:
    """Return the output of the last decoder layer, `(windows, tokens, hidden)` on the host.

    The arguments are those of `LayerStream`.
    """
    stream = LayerStream(model, tokens, batch_size, compute_dtype)
    stream.to_the_end("dense states")
    return stream.states()


class Teacher:
    """Copy of the dense decoder layers, which computes the output of the last one in each step.

    `teacher[windows]`, with indices of windows, int64, is `(windows, tokens, hidden)` on the
    device.

    Args:
        tokens: all windows, int64 `(windows, tokens)`.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        own = {id(weight) for weight in decoder_layers(model).parameters()}
        shared = {id(weight): weight for weight in model.parameters() if id(weight) not in own}
        self._model = copy.deepcopy(model, shared)
        self._tokens = tokens

    @torch.no_grad()
    def __getitem__(self, windows: Tensor) -> Tensor:
        hidden, arguments = layer_inputs(self._model, self._tokens[windows])
        for layer, kwargs in zip(decoder_layers(self._model), arguments, strict=True):
            hidden = run_layer(layer, hidden, kwargs)
        return hidden


class LayerStream:
    """Hidden states of many windows, which advance through the decoder one layer at a time.

    Between two layers the states stay on a GPU that has room for them, else on the host. Batches go
    to the device one at a time. Under torchrun each rank has the states of its share of the
    windows, and all ranks advance together.

    Args:
        model: the model; the constructor runs its embedding.
        tokens: int64 `(windows, tokens)`.
        batch_size: windows per forward.
        compute_dtype: dtype of matrix products (`permllm.runtime.precision`); None: the dtype that
            the caller has set.
        already_split: True: this rank has all of the windows, because the caller has split them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        batch_size: int,
        compute_dtype: torch.dtype | None = None,
        already_split: bool = False,
    ) -> None:
        self._placement = placement_of(model)
        self._layers = decoder_layers(model)
        self._compute_dtype = compute_dtype
        self._device = next(model.parameters()).device
        self._model = model
        self._tokens = tokens
        self._batch_size = batch_size
        indices = torch.arange(len(tokens))
        if already_split:
            portions = [(part, len(part)) for part in indices.split(batch_size)]
        else:
            portions = parallel.portions(indices, batch_size)
        self._already_split = already_split
        # Windows of this rank in each of its batches.
        self._windows = [part for part, counted in portions if counted]
        # Arguments that batches share, by size of the batch, because the last may be smaller. Where
        # arguments depend on the tokens, those of all batches could take more memory than the
        # states. There the model computes them again for each layer.
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._states = torch.empty(0)
        shares = not arguments_depend_on_tokens(model)
        for position, (part, counted) in enumerate(portions):
            # A rank without windows embeds one, whose states have the shape of the others.
            hidden, kwargs = layer_inputs(model, tokens[part])
            if shares:
                self._kwargs.setdefault(len(part), kwargs)
            if not position:
                self._states = _room_for(sum(map(len, self._windows)), hidden)
            if counted:
                self._states.split(batch_size)[position].copy_(hidden)

    def forward(self, index: int) -> Iterator[Tensor]:
        """Yield the outputs of a layer on the device, batch by batch, without advancing."""
        dtype = self._compute_dtype
        with self._placement.layer(index) as layer:
            states = self._states.split(self._batch_size)
            for position, windows in enumerate(self._windows):
                hidden = states[position]
                kwargs = self._arguments(windows)[index]
                with torch.no_grad(), products_in(dtype, self._device) if dtype else nullcontext():
                    output = run_layer(layer, hidden.to(self._device), kwargs)
                yield output

    def _arguments(self, windows: Tensor) -> list[dict[str, Any]]:
        """Return the keyword arguments of each layer for a batch, int64 `(windows,)`."""
        if len(windows) in self._kwargs:
            return self._kwargs[len(windows)]
        return layer_inputs(self._model, self._tokens[windows])[1]

    def advance(self, index: int) -> None:
        """Replace the states by the outputs of a layer with its present weights."""
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

    def copy(self) -> "LayerStream":
        """Return a stream with the same states, which advances on its own."""
        other = copy.copy(self)
        other._states = self._states.clone()
        return other

    def states(self) -> Tensor:
        """Return the states of all windows, `(windows, tokens, hidden)` on the host, in all ranks.

        Advancing may overwrite them.
        """
        own = self._states.cpu()
        if self._already_split or parallel.world_size() == 1:
            return own
        count = len(self._tokens)
        windows = torch.cat([torch.arange(0), *self._windows])
        return parallel.joined(own, windows, count)


def _room_for(windows: int, batch: Tensor) -> Tensor:
    """Return memory for the states of all windows, on the host unless the batch's GPU has room."""
    size = windows * batch[0].numel() * batch.element_size()
    on_gpu = batch.device.type == "cuda" and size <= _SHARE_OF_FREE * free_memory(batch.device)
    return torch.empty(
        windows, *batch.shape[1:], dtype=batch.dtype, device=batch.device if on_gpu else "cpu"
    )
