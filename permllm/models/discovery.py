"""Structure of a decoder without a table: its linears, grouped by the tensors that they read."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel

from permllm.errors import ConfigError, first_line

_TOKENS = 3


@dataclass(frozen=True)
class Structure:
    """Parts of a decoder.

    Attributes:
        layers: path of the list of decoder layers.
        groups: linears of a layer that read the same tensor, as paths relative to the layer; in the
            order of the calls.
        after: paths of the modules between the last layer and the head.
        embeddings: paths of the embeddings outside of the layers.
        tuples: True: a decoder layer returns a tuple, and the hidden states are its first entry.
    """

    layers: str
    groups: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    embeddings: tuple[str, ...]
    tuples: bool


@dataclass
class _Calls:
    """Calls of one forward; the tensors are kept, because freed memory would be used again.

    Attributes:
        order: modules without children, in the order of their calls.
        linears: input and output of each linear, and the output's version at its return.
        tuples: True: a decoder layer returned a tuple.
    """

    order: list[str] = field(default_factory=list)
    linears: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    tuples: bool = False


def structure_of(model: PreTrainedModel) -> Structure:
    """Find the structure of a model by tracing its forward.

    Raises:
        ConfigError: the model is not a causal decoder of attention and dense linears, or its layers
            differ.
    """
    layers = _layers_path(model)
    stack = model.get_submodule(layers)
    children = list(stack.children())
    modules = stack.named_modules(prefix=layers)
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    for name, parameter in stack.named_parameters(prefix=layers):
        if parameter.dim() > 1 and name.removesuffix(".weight") not in linears:
            raise _refusal(model, f"{name} belongs to no linear")
    calls = _traced(model, children)
    groups = [_groups(calls, f"{layers}.{index}.") for index in range(len(children))]
    for name in linears:
        if calls.order.count(name) != 1:
            raise _refusal(model, f"a forward calls {name} more or less than once")
    for name, (_, output, version) in calls.linears.items():
        if output._version != version:
            raise _refusal(model, f"the output of {name} is changed in place")
    if any(of_layer != groups[0] for of_layer in groups):
        raise _refusal(model, f"the linears of the layers in {layers} differ from layer to layer")
    outside = [name for name in calls.order if not name.startswith(f"{layers}.")]
    last = max(index for index, name in enumerate(calls.order) if name.startswith(f"{layers}."))
    head = model.get_output_embeddings()
    return Structure(
        layers,
        groups[0],
        tuple(name for name in calls.order[last + 1 :] if model.get_submodule(name) is not head),
        tuple(name for name in outside if isinstance(model.get_submodule(name), nn.Embedding)),
        calls.tuples,
    )


def _refusal(model: nn.Module, reason: str) -> ConfigError:
    only = "only causal decoders of attention and dense linears can be pruned"
    return ConfigError(f"{type(model).__name__}: {reason}; {only}")


def _layers_path(model: PreTrainedModel) -> str:
    """Return the path of the only outermost list of modules that has linears in it."""
    paths: list[str] = []
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise _refusal(model, f"{name} attends to later tokens")
        inside = any(name.startswith(f"{path}.") for path in paths)
        linears = any(isinstance(child, nn.Linear) for child in module.modules())
        if isinstance(module, nn.ModuleList) and linears and not inside:
            paths.append(name)
    if len(paths) != 1:
        raise _refusal(model, f"expected one list of layers with nn.Linear, got {len(paths)}")
    return paths[0]


def _traced(model: PreTrainedModel, layers: list[nn.Module]) -> _Calls:
    """Record the calls of a forward on fake tensors, which have no values."""
    calls = _Calls()
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        calls.order.append(name)
        if isinstance(module, nn.Linear):
            calls.linears[name] = args[0], output, output._version

    def returns(module: nn.Module, args: Any, output: Any) -> None:
        calls.tuples = isinstance(output, tuple)

    leaves = [module for module in names if not list(module.children())]
    hooks = [leaf.register_forward_hook(record) for leaf in leaves]
    hooks += [layer.register_forward_hook(returns) for layer in layers]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True  # because it prints a traceback when a forward fails
    try:
        with FakeTensorMode(), torch.no_grad(), torch.inference_mode(False), torch.device("cpu"):
            values = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors
            }
            inputs = {"input_ids": torch.zeros(1, _TOKENS, dtype=torch.long), "use_cache": False}
            functional_call(model, values, kwargs=inputs)
    except Exception as error:  # any class may raise any error
        raise _refusal(model, f"its forward cannot be traced: {first_line(error)}") from error
    finally:
        log.disabled = False
        for hook in hooks:
            hook.remove()
    return calls


def _groups(calls: _Calls, prefix: str) -> tuple[tuple[str, ...], ...]:
    """Return the linears of a layer, grouped by the tensor, or the view of a tensor, they read."""
    members: dict[tuple[int, int, int, int], list[str]] = {}
    for name, (values, _, _) in calls.linears.items():
        if name.startswith(prefix):
            storage = values.untyped_storage()._cdata
            key = storage, int(values.storage_offset()), values.shape[-1], values.stride(-1)
            members.setdefault(key, []).append(name.removeprefix(prefix))
    return tuple(map(tuple, members.values()))
