"""Fine-tuning of a pruned model, or of a copy of it, that keeps its zeros.

A weight that is zero and has no gradient stays zero: weight decay multiplies it, and moments of its
gradients are zero. For LoRA that is not enough, because the product of its factors is dense. So the
product is masked where it is used: in the forward and at the merge.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from permllm.errors import ConfigError
from permllm.export.gathered import gathered_input

# Attribute of weights whose gradients are masked.
_IS_MASKED = "_permllm_is_masked"


def keep_zeros(model: Any) -> None:
    """Let fine-tuning keep the zeros of a pruned model, in every linear but the head.

    The model is one of transformers, or of peft with LoRA, after all its adapters were added.
    Raises ConfigError if no linear has zeros, or an adapter is no plain LoRA.
    """
    others = {model.get_output_embeddings()}  # the head, and factors of LoRA
    has_zeros = False
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            others |= {*module.lora_A.modules(), *module.lora_B.modules()}
            _mask_products(module)
        elif isinstance(module, nn.Linear) and module not in others and not module.weight.all():
            has_zeros = True
            module.register_forward_pre_hook(_mask_gradients)
    if not has_zeros:
        raise ConfigError("model: no linear has zeros; expected a pruned model")


def _mask_gradients(linear: nn.Module, _: Any) -> None:
    """Mask the gradients of a weight from its first forward on.

    A copy of a model has the hooks of modules, but not those of its parameters.
    """
    weight: Any = linear.weight
    if weight.requires_grad and not hasattr(weight, _IS_MASKED):
        weight.register_hook(lambda gradient: gradient.masked_fill(weight == 0, 0))
        setattr(weight, _IS_MASKED, True)


def _mask_products(layer: Any) -> None:
    """Replace the forward and the merge of the adapters of a LoRA layer of peft."""
    for adapter in layer.lora_A:
        variant = layer.lora_variant.get(adapter)
        if not isinstance(variant, _MaskedLora | None) or layer.lora_bias[adapter]:
            raise ConfigError(f"model: its adapter {adapter} is no plain LoRA without biases")
        layer.lora_variant[adapter] = _MaskedLora()


class _MaskedLora:
    """Variant of LoRA, as peft calls it, whose product is zero where the weight is zero."""

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Add the product for the inputs `x` to the output of the linear."""
        inputs = module.lora_dropout[active_adapter](gathered_input(module.get_base_layer(), x))
        return result + linear(inputs, _product(module, active_adapter))

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the product."""
        return orig_weight + _product(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the product to the weight in place."""
        orig_weight.data += _product(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the product."""
        return orig_weight - _product(module, active_adapter).to(orig_weight.dtype)


def _product(layer: Any, adapter: str) -> Tensor:
    """Return the scaled product of an adapter's factors, zero where the weight is zero."""
    zeros = layer.get_base_layer().weight == 0
    product: Tensor = layer.get_delta_weight(adapter)
    return product.masked_fill(zeros, 0)
