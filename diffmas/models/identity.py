"""Fingerprints of a model and of its adapters, by which a file of another model is refused."""

import hashlib
import json

import torch
from torch import nn

from diffmas.models.parts import causal_lm_of

__all__ = ["adapter_fingerprint", "fingerprint_of", "model_fingerprint", "rope_of"]

SAMPLES = 64  # values hashed per weight: enough to tell checkpoints apart, and cheap for large models


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
    """Hash of the base weights, 32 hex digits; the same with and without PEFT adapters, until one is merged."""
    weights = []
    for name, p in causal_lm_of(model).named_parameters():
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if not _is_adapter(name):
            weights.append((name, p))
    return _digest(weights)


def adapter_fingerprint(model: nn.Module) -> str | None:
    """Hash of the active adapters' weights and scaling, whatever their names; None without an active adapter."""
    weights = []
    for name, module in causal_lm_of(model).named_modules():
        if not hasattr(module, "adapter_layer_names") or module.disable_adapters:  # no PEFT layer, or one that is off
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
    """All that stored K/V rows depend on, as plain data: {"model", "adapter", "rope"}."""
    return {
        "model": model_fingerprint(model),
        "adapter": adapter_fingerprint(model),
        "rope": json.loads(json.dumps(rope_of(model), default=str)),
    }
