"""Finding the parts of a transformers model."""

from torch import nn
from transformers import PreTrainedModel

from diffmas.models.support import Unsupported

__all__ = ["attention_layers", "beside_the_text", "body_of", "causal_lm_of", "text_stack_of", "trained_beside_the_text"]


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: nn.Module) -> nn.Module:
    """What is under the language-model head; raises Unsupported for a model that is not transformers'.

    In a multimodal model that is the language model together with the vision tower: only there are a prompt's token ids known.
    """
    causal_lm = causal_lm_of(model)
    if not isinstance(causal_lm, PreTrainedModel):
        raise Unsupported(f"diffmas cannot patch {type(model).__name__}: expected a transformers model, or PEFT around one")
    body = causal_lm.base_model
    if body is causal_lm and causal_lm.get_output_embeddings() is not None:  # multimodal models before transformers 5, Llama 4
        body = getattr(causal_lm, "model", body)
    # OPT, and decoders taken out of encoder-decoder models: what is around the decoder is not called.
    decoder = getattr(body, "decoder", None)
    return decoder if isinstance(decoder, PreTrainedModel) and not hasattr(body, "encoder") else body


def text_stack_of(body: nn.Module) -> nn.Module:
    """The module whose layers the text goes through: the body, or in a multimodal one its language model."""
    if body.config.get_text_config() is body.config:
        return body
    return next((m for name in ("language_model", "text_model") if (m := getattr(body, name, None)) is not None), body)


def beside_the_text(model: nn.Module) -> list[str]:
    """The names of a multimodal model's modules that text does not go through, such as a vision tower and its projector."""
    causal_lm = causal_lm_of(model)
    if causal_lm.config.get_text_config() is causal_lm.config:
        return []
    stack, head, found = text_stack_of(body_of(model)), causal_lm.get_output_embeddings(), []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if any(m is stack for m in child.modules()):
                if child is not stack:
                    visit(child, f"{prefix}{name}.")
            elif child is not head:
                found.append(prefix + name)

    visit(causal_lm, "")
    return found


def trained_beside_the_text(model: nn.Module) -> bool:
    """Whether a trainable parameter gets no gradient from text, such as an adapter in a vision tower."""
    beside = [causal_lm_of(model).get_submodule(name) for name in beside_the_text(model)]
    return any(p.requires_grad for module in beside for p in module.parameters())


def attention_layers(body: nn.Module) -> list[nn.Module]:
    """The attention modules that text goes through by layer index; raises Unsupported unless there is one for every layer."""
    found = {}
    for name, module in text_stack_of(body).named_modules():
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
