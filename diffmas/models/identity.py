"""Fingerprints of a model and of its adapters, by which a file of another model is refused."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from diffmas.models.adapted import adapter_tensors, base_weights
from diffmas.models.local import is_spread, local, shape_of, whole
from diffmas.models.parts import causal_lm_of

__all__ = ["adapter_fingerprint", "fingerprint_of", "model_fingerprint", "rope_of", "sampled_fingerprint", "state_of"]

CHUNK = 1 << 24  # values hashed at once
WORDS = 1 << 16  # of 8 bytes, that a core keeps in its cache while it adds them up
SAMPLES = 64  # values of a weight in the fingerprints of earlier versions

# Digests of tensors, with what told that they have not changed since.
_DIGESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _bytes(x: Tensor):
    """The values as bytes on the CPU, floats as bfloat16: a model loaded in float32 and in bfloat16 is the same."""
    if x.is_floating_point():
        return x.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return x.cpu().contiguous().view(torch.uint8).numpy()


def state_of(x: Tensor, read: bool) -> tuple:
    """Differs when a tensor has changed. read: also where no version counts it, as writes to `.data`, at the cost of one pass
    over its memory. Of one that several processes share: their own part."""
    x = local(x)
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.shape, x.dtype, x.device, _sum_of_bits(x.detach()) if read and not x.is_meta else None


def _sum_of_bits(x: Tensor) -> int:
    """The sum of the memory's words as integers, each times an odd number of its place: any one value changes it, and so do
    rows that change places."""
    octets = x.reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8 or len(octets) % 8:
        octets = F.pad(octets, (0, -len(octets) % 8))  # a copy
    total, at_once = torch.zeros((), dtype=torch.int64, device=x.device), WORDS if x.device.type == "cpu" else 64 * WORDS
    odd = torch.arange(1, 2 * at_once + 1, 2, device=x.device)
    for k, words in enumerate(octets.view(torch.int64).split(at_once)):
        total += (words * odd[: len(words)]).sum() + words.sum() * (2 * at_once * k)
    return int(total)


def _digest_of(x: Tensor) -> str:
    """SHA-256 of all values of a tensor; computed once as long as it does not change."""
    known, state = _DIGESTS.get(x), state_of(x, read=True)
    if known is None or known[0] != state:
        digest = hashlib.sha256()
        for part in whole(x).reshape(-1).split(CHUNK):
            digest.update(_bytes(part))
        known = _DIGESTS[x] = state, digest.hexdigest()
    return known[1]


def _gather_digests(spread: list[Tensor]) -> None:
    """Of tensors that several processes share, in their order in all of them: of those that have changed in any."""
    changed = [float((known := _DIGESTS.get(x)) is None or known[0] != state_of(x, read=True)) for x in spread]
    if not spread:
        return
    changed = torch.tensor(changed, device=spread[0].device)
    dist.all_reduce(changed, dist.ReduceOp.MAX)
    for x, anew in zip(spread, changed.tolist()):
        if anew:
            _DIGESTS.pop(x, None)
            _digest_of(x)


def _align_hooks(module: nn.Module) -> Iterator:
    """accelerate's hooks that bring a module's weights for each forward, and take them away behind it."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.weights_map is not None:
            yield one


def _reader(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives a weight of the model its values, where accelerate has left an empty one and keeps them elsewhere."""
    kept = {
        id(x): (hook.weights_map, name)
        for module in model.modules() for hook in _align_hooks(module)
        for kind in (module.named_parameters, module.named_buffers) for name, x in kind(recurse=hook.place_submodules)
        if x.is_meta
    }  # fmt: skip

    def read(x: Tensor) -> Tensor:
        if id(x) not in kept:
            return x
        weights, name = kept[id(x)]
        return weights[name]  # on the host, or from a file just now

    return read


def _digest(named: list[tuple[str, Tensor]], model: nn.Module) -> str:
    named, read = sorted(named, key=lambda item: item[0]), _reader(model)
    _gather_digests([x for _, x in named if is_spread(x)])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing and copying let other threads run
        digests = list(threads.map(lambda x: _digest_of(read(x)), (x for _, x in named)))
    lines = (f"{name}{shape_of(x)}{digest}" for (name, x), digest in zip(named, digests))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def model_fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Hash of the base model's weights and saved buffers, 32 hex digits: of all values, as bfloat16.

    The same with and without PEFT adapters, whatever these have been trained to, until one is merged. without: names of
    weights that it leaves out (`diffmas.models.adapted.trained_in_base`).
    """
    return _digest([(name, x) for name, x in base_weights(model).items() if name not in without], model)


def sampled_fingerprint(model: nn.Module) -> str:
    """The fingerprint that earlier versions wrote, of 64 values a parameter."""
    parameters = {id(x): (name, x) for name, x in reversed(base_weights(model).items()) if isinstance(x, nn.Parameter)}
    digest = hashlib.sha256()
    for name, p in sorted(parameters.values(), key=lambda item: item[0]):  # a tied one once, under its first name
        flat = p.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(f"{name}{tuple(p.shape)}".encode() + values)
    return digest.hexdigest()[:32]


def adapter_fingerprint(model: nn.Module) -> str | None:
    """Hash of the active adapters' tensors and scaling, whatever their names; None without an active adapter."""
    tensors = list(adapter_tensors(model))
    return _digest(tensors, model) if tensors else None


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
