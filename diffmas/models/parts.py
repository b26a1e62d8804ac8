"""Finding the parts of a transformers model."""

from torch import nn
from transformers import PreTrainedModel

from diffmas.models.support import Unsupported

__all__ = ["attention_layers", "body_of", "causal_lm_of"]


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: nn.Module) -> nn.Module:
    """The stack of layers under the language-model head; raises Unsupported for a model that is not transformers'."""
    causal_lm = causal_lm_of(model)
    if not isinstance(causal_lm, PreTrainedModel):
        raise Unsupported(f"diffmas cannot patch {type(model).__name__}: expected a transformers model, or PEFT around one")
    return causal_lm.base_model


def attention_layers(body: nn.Module) -> list[nn.Module]:
    """The attention modules by layer index; raises Unsupported unless there is exactly one for every layer."""
    found = {}
    for name, module in body.named_modules():
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int):
            if module.layer_idx in found:
                raise Unsupported(
                    f"diffmas cannot patch {type(body).__name__}: two attention modules are layer {module.layer_idx} ({name})"
                )
            found[module.layer_idx] = module
    layers = body.config.get_text_config().num_hidden_layers
    missing = [i for i in range(layers) if i not in found]
    if missing or len(found) != layers:
        raise Unsupported(
            f"diffmas cannot patch {type(body).__name__}: expected one self-attention in each of {layers} layers, "
            f"found none in layers {missing}; linear attention, convolution and state-space layers hold no K/V rows"
        )
    return [found[i] for i in range(layers)]
