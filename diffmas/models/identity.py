"""Who wrote a file: fingerprints of a model and of its adapter, to refuse a trace or an adapter of another model."""

import hashlib
import json

import torch
from torch import nn

from diffmas.models.parts import causal_lm_of

__all__ = ["adapter_fingerprint", "fingerprint_of", "model_fingerprint", "rope_of"]

SAMPLES = 64  # values looked at per weight: enough to tell checkpoints apart, cheap for large models


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _digest(named) -> str:
    digest = hashlib.sha256()
    for name, p in sorted(named, key=lambda item: item[0]):
        flat = p.detach().flatten()
        step = max(1, flat.numel() // SAMPLES)
        # As bfloat16: a model loaded in float32 and in bfloat16 is the same model.
        values = flat[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(f"{name}{tuple(p.shape)}".encode() + values)
    return digest.hexdigest()[:32]


def model_fingerprint(model: nn.Module) -> str:
    """Of the base weights: the same with and without a PEFT adapter around them, different once it is merged."""
    weights = []
    for name, p in causal_lm_of(model).named_parameters():
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if not _is_adapter(name):
            weights.append((name, p))
    return _digest(weights)


def adapter_fingerprint(model: nn.Module) -> str | None:
    """Of the active adapters' weights and scaling, whatever they are called; None without one, or with all disabled."""
    weights = []
    for name, module in causal_lm_of(model).named_modules():
        if not hasattr(module, "adapter_layer_names") or module.disable_adapters:  # not a PEFT layer, or one without effect
            continue
        for i, adapter in enumerate(module.active_adapters):
            scaling = getattr(module, "scaling", {}).get(adapter)
            for key, p in module.named_parameters():
                parts = key.split(".")
                if _is_adapter(key) and adapter in parts:
                    key = ".".join(str(i) if part == adapter else part for part in parts)
                    weights.append((f"{name}.{key}*{scaling}", p))
    return _digest(weights) if weights else None


def rope_of(model: nn.Module) -> dict:
    """The RoPE parameters that stored keys depend on."""
    config = causal_lm_of(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"theta": getattr(config, "rope_theta", None), **rope} if not rope.get("rope_theta") else dict(rope)


def fingerprint_of(model: nn.Module) -> dict:
    """What stored rows depend on, as plain data."""
    return {
        "model": model_fingerprint(model),
        "adapter": adapter_fingerprint(model),
        "rope": json.loads(json.dumps(rope_of(model), default=str)),
    }
