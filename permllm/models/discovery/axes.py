"""Which channels are whose: what a module reads, traced back to the rows of the modules that wrote it.

In one forward every module without children becomes a cut: what it gives goes on as a leaf of the
autograd graph, so that the gradient of what a module reads reaches the modules right before it and
no further. A channel that depends on one row alone, the row of its own number, is that row with
elementwise work between; where it depends on many, a norm or attention stands between.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from permllm.models.discovery.small import Refused, tokens

# In the place of the number of a row's only channel.
_NONE, _MANY = -1, -2


@dataclass
class Reads:
    """What the channels that a module reads depend on.

    Attributes:
        slices: modules and the row of theirs from which on each row is one channel, in the order of
            the channels.
        mixed: whether any of them depends on more than that.
    """

    slices: list[tuple[str, int]] = field(default_factory=list)
    mixed: bool = False


@dataclass
class Axes:
    """The cuts of a forward.

    Attributes:
        written: what each module gave, as a leaf `(..., rows)`, by path; a module that is called
            again has `#2` behind it. The first layer's is its own input, and the second one's is
            what the last of them gives.
        read: what each module was given, `(..., channels)`, with the graph behind it.
        modules: the modules of the paths.
        called: paths in the order of the calls.
        tuples: whether a layer returns a tuple, the states first.
    """

    written: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    tuples: bool = False

    def keeps_channels(self, path: str) -> bool:
        """Whether a module gives back the channels that it reads: a norm, an activation, or a whole decoder layer."""
        return not isinstance(self.modules[path], (nn.Linear, nn.Embedding))

    def reads(self, path: str, heads: tuple[int, int] = (1, 1)) -> Reads:
        """What a module reads.

        Args:
            path: of the module.
            heads: key-value heads and query heads for each; the channels of the query heads of one
                key-value head are then expected to be the same rows.
        """
        values = self.read[path]
        if not values.requires_grad:
            return Reads(mixed=True)
        channels = values.shape[-1]
        key_value, each = heads
        if channels % (key_value * each):
            return Reads(mixed=True)
        numbers = (
            torch.arange(channels // each).view(key_value, 1, -1).expand(-1, each, -1).flatten()
        )
        found = Reads()
        for source, rows in zip(
            self.written, _only_channels(values, numbers, list(self.written.values())), strict=True
        ):
            expected = torch.arange(channels // each)
            starts = [
                start
                for start in range(len(rows) - len(expected) + 1)
                if rows[start] == 0 and torch.equal(rows[start : start + len(expected)], expected)
            ]
            found.slices += [(source, start) for start in starts]
            elsewhere = torch.ones(len(rows), dtype=torch.bool)
            for start in starts:
                elsewhere[start : start + len(expected)] = False
            found.mixed |= bool((rows[elsewhere] != _NONE).any())
        return found


def _only_channels(values: Tensor, numbers: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """For each row of each source the number of the only channels that depend on it, or that there is none, or several.

    The gradient of channels that have a binary digit of their number in common is not zero where
    one of them depends on a row; so a row of one number answers to one value of each digit.

    Args:
        values: `(..., C)`, with a graph.
        numbers: int64 `(C,)`.
        sources: leaves of the graph, each `(..., rows)`.
    """
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(values.shape, dtype=values.dtype, generator=generator) + 0.5
    found = [torch.full((source.shape[-1],), _NONE) for source in sources]
    for digit in range(max(1, int(numbers.max()).bit_length())):
        answers = []
        for value in (0, 1):
            chosen = weights * ((numbers >> digit) & 1 == value)
            grads = torch.autograd.grad(
                values, sources, chosen, retain_graph=True, allow_unused=True
            )
            answers.append(
                [
                    torch.zeros(source.shape[-1], dtype=torch.bool)
                    if grad is None
                    else (grad != 0).flatten(0, -2).any(0)
                    for source, grad in zip(sources, grads, strict=True)
                ]
            )
        for rows, zero, one in zip(found, *answers, strict=True):
            rows[(rows == _NONE) & (zero | one)] = 0
            rows[zero & one] = _MANY
            rows[(rows >= 0) & one] += 1 << digit
    return found


def trace(model: PreTrainedModel, layers: str, model_type: str) -> Axes:
    """Run the small model once with cuts at the modules of its first layer, of what is outside the layers, and at layers.

    Args:
        model: the small model.
        layers: path of the decoder layers.
        model_type: for messages.

    Raises:
        Refused: a linear is called twice, or what it gives is changed in place.
    """
    axes, calls, handles = Axes(), Counter[str](), []
    depth = len(list(model.get_submodule(layers).children()))

    def path_of(name: str, module: nn.Module) -> str:
        calls[name] += 1
        path = name if calls[name] == 1 else f"{name}#{calls[name]}"
        axes.modules[path] = module
        axes.called.append(path)
        return path

    def leaf(path: str, values: Tensor) -> Tensor:
        axes.written[path] = values.detach().requires_grad_()
        # A leaf cannot be changed in place, nor can what a linear gives while orders or masks are
        # learned.
        return (
            axes.written[path]
            if isinstance(axes.modules[path], nn.Linear)
            else axes.written[path].clone()
        )

    def after(name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            given = [value for value in (*args, *kwargs.values()) if _is_floating(value)]
            if not _is_floating(output):
                return None
            if isinstance(module, nn.Embedding):
                return leaf(path_of(name, module), output)
            if len(given) != 1 or (
                not isinstance(module, nn.Linear) and given[0].shape != output.shape
            ):
                return None
            path = path_of(name, module)
            if isinstance(module, nn.Linear) and calls[name] > 1:
                raise Refused(model_type, f"{name} is called more than once")
            axes.read[path] = given[0]
            return leaf(path, output)

        return hook

    def before_layer(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            path = path_of(name, module)
            axes.read[path] = states = args[0] if args else kwargs["hidden_states"]
            cut = leaf(path, states) if name == first else states.detach()
            return ((cut, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": cut})

        return hook

    def after_layers(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        axes.tuples = isinstance(output, tuple)
        if depth == 1:  # what follows reads what the layer's modules wrote
            return None
        return (leaf(second, output[0]), *output[1:]) if axes.tuples else leaf(second, output)

    first, second, last = (f"{layers}.{index}" for index in (0, 1, depth - 1))
    for name, module in model.named_modules():
        if name in (first, second):
            handles.append(module.register_forward_pre_hook(before_layer(name), with_kwargs=True))
        if name == last:
            handles.append(module.register_forward_hook(after_layers))
        outside = not name.startswith(f"{layers}.")
        if (outside or name.startswith(f"{first}.")) and not list(module.children()):
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with torch.enable_grad():
            model(input_ids=tokens(), use_cache=False)
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
        raise Refused(
            model_type, "what a linear gives is changed in place, which nothing can learn through"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return axes


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
