"""patch_model: the only door to transformers' internals.

A patch belongs to one instance and is reversible: classes, shared configs and globals stay as they are. A patched model
behaves as before until a Trace is passed as `past_key_values` (`cache` since transformers 5.24). Then a hook on the body
plans the forward pass (diffmas.models.forward), every attention layer writes and reads the trace (diffmas.models.attention),
and a second hook commits it.

A model that needs a feature diffmas lacks is refused, by a static check of its attributes (diffmas.models.support), by a
numeric probe of every layer against its own forward (diffmas.models.probe), and by the patched model's run on a trace against
its plain one (diffmas.models.rehearsal); each alone misses cases.
"""

import functools
import logging
import traceback
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffmas import ops
from diffmas.models import probe
from diffmas.models.adapted import check_adapters
from diffmas.models.attention import Layer, install, uninstall
from diffmas.models.compiled import compile_body, uncompile_body
from diffmas.models.forward import after_body, before_body
from diffmas.models.generate import generate
from diffmas.models.identity import fingerprint_of
from diffmas.models.linears import fuse_layers, restore_layers
from diffmas.models.local import failing_together, gathered, is_part
from diffmas.models.parts import attention_layers, body_of, causal_lm_of, text_stack_of
from diffmas.models.rehearsal import at_rest, rehearse
from diffmas.models.support import Unsupported, dropout_in_training, dropout_of, refuse, unsupported, window_of
from diffmas.ops.huge_pages import gather_in_huge_pages
from diffmas.ops.layer import usable
from diffmas.trace.spec import ATTRIBUTE, ModelSpec, check_offload

__all__ = ["Patch", "check_trainable", "patch_model", "patch_of", "unpatch_model"]

logger = logging.getLogger("diffmas")

NOT_THE_MODELS = (Unsupported, MemoryError, torch.OutOfMemoryError)


@dataclass
class Patch:
    """All state of a patched model; `unpatch_model` drops it.

    attentions: one a layer. checkpointed: the modules that have an activation-checkpointing switch. graphs, training_graphs:
    see `patch_model` (diffmas.models.capture). fuse: the same (what comes of it is spec.fused). tries: by what is captured,
    how often that may still fail.
    """

    body: nn.Module
    causal_lm: nn.Module
    layers: list[Layer]
    spec: ModelSpec
    arguments: tuple  # of patch_model
    checkpointed: list[nn.Module] = field(default_factory=list)
    attentions: list[nn.Module] = field(default_factory=list)
    hook_ids: tuple[int | None, int | None] = (None, None)
    graphs: bool = True
    training_graphs: bool = False
    fuse: bool | None = None
    gathered: bool = False  # its weights, in huge pages
    tries: dict[str, int] = field(default_factory=dict)

    def pairs(self) -> list[tuple[nn.Module, Layer]]:
        return list(zip(attention_layers(self.body), self.layers))


def patch_of(model: nn.Module) -> Patch:
    """The record of a patched model; raises ValueError for one that is not patched."""
    record = getattr(causal_lm_of(model), "diffmas_patch", None)
    if record is None:
        raise ValueError(f"model: expected a patched model, got a plain {type(model).__name__}; call diffmas.patch_model first")
    return record


def check_trainable(model: nn.Module) -> None:
    """Raises Unsupported for a patched model that no training forward would take: one with attention dropout."""
    for attention in patch_of(model).attentions:
        if dropout := dropout_of(attention):
            raise dropout_in_training(attention, dropout)


def patch_model(
    model: nn.Module, backend: str = "auto", max_length: int | None = None, *, graphs: bool = True,
    training_graphs: bool = False, fuse: bool | None = None, offload: str | None = None,
) -> nn.Module:  # fmt: skip
    """Patches a model in place to take a `diffmas.Trace` as past_key_values, and returns it.

    model: a transformers causal LM, or a PEFT model around one; a multimodal one takes a trace with text alone. backend:
    "auto", or one of `diffmas.ops.BACKENDS`. max_length: the most tokens per sequence that a trace of this model may hold. A
    sliding window must be at least that long; without max_length it must be as long as the model's context, and then limits
    traces itself. graphs: whether latent steps and decoding may be captured as CUDA graphs on a GPU; a model that
    cannot be runs without, after one warning. training_graphs: latent steps with gradients too, and their backward; off as long
    as no GPU has shown the gradients to be right. fuse: whether, in forwards over a trace, a frozen linear and its plain LoRA
    adapter are one op, the adapter's gradients of a run of latent steps one product, and norms and gates an op each; on a CPU
    also whether the layers of a Llama-like body are one op for up to 32 tokens, in latent steps with gradients one node of
    autograd; without gradients the weights' memory is then
    in huge pages, where the system gathers them (Linux 6.1), at the same addresses, and a forked process has it for itself.
    None: on a CPU, where it was shown to be exact and faster; True: on a GPU too, where the Triton kernels for it have not run
    yet; False: nowhere. What is adapted in another way is PEFT's own. Adapters that are added later are fused once it is
    patched again.
    offload: "cpu" keeps the rows of all new traces of this model on the host (`Trace`); no step is captured then.

    With torch.compile, fullgraph=True works: `layer.compile()` for each decoder layer, or `compile()` of the body (the model
    without its head). Compiled, backward(retain_graph=True) needs torch._functorch.config.donated_buffer = False. Each adapter
    is compiled for itself: layers that are trained and generate with n of them are compiled about 4 n + 1 times, and torch
    stops at torch._dynamo.config.recompile_limit = 8: raise it first where there are two adapters or more.

    Raises Unsupported (a ValueError) for a model that diffmas does not serve exactly, naming layer and feature where it can,
    and leaves the model as it was; attention dropout is refused by a forward in training mode. To find out, seven forwards of
    ten tokens or less run, nine with fuse. Patching again with the same arguments does nothing.

        >>> model = patch_model(model)
        >>> trace = Trace(model, batch_size=1)
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> logits = model(input_ids=ids, past_key_values=trace).logits
        >>> trace.lengths
        [3]
    """
    with gathered([*causal_lm_of(model).parameters()]):  # ZeRO-3's, all at once; one by one where a forward runs under it
        return _patch_model(model, backend, max_length, graphs, training_graphs, fuse, offload)


def _patch_model(
    model: nn.Module, backend: str, max_length: int | None, graphs: bool, training_graphs: bool, fuse: bool | None,
    offload: str | None,
) -> nn.Module:  # fmt: skip
    ops.check_backend(backend)
    check_offload(offload)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected at least 1 token or None, got {max_length}")
    check_adapters(model)
    causal_lm = causal_lm_of(model)
    previous = getattr(causal_lm, "diffmas_patch", None)
    if previous is not None:
        if previous.arguments == (backend, max_length):
            previous.graphs, previous.training_graphs, previous.spec.offload = graphs, training_graphs, offload
            _fuse(previous, fuse)
            return model
        unpatch_model(model)
    try:
        with failing_together(causal_lm, Unsupported), at_rest(causal_lm):
            record = _examine(causal_lm, body_of(model), backend, max_length)
        record.graphs, record.training_graphs, record.fuse = graphs, training_graphs, fuse
        record.spec.offload = offload
        _install(record)
        with failing_together(causal_lm, Unsupported), at_rest(causal_lm):
            rehearse(causal_lm, [attention for attention, _ in record.pairs()], record.spec, bool(record.spec.fused))
    except BaseException as error:
        if hasattr(causal_lm, "diffmas_patch"):
            unpatch_model(causal_lm)
        if previous is not None:
            _install(previous)
        if not isinstance(error, Exception) or isinstance(error, NOT_THE_MODELS) or _is_ours(error):
            raise
        raise Unsupported(f"{type(causal_lm).__name__} could not be patched: {type(error).__name__}: {error}") from error
    tiers = sorted({f"{type(a).__name__} {'fused' if x.family else 'generic'}" for a, x in record.pairs()})
    logger.info("diffmas: patched %d layers of %s (%s)", len(record.layers), type(causal_lm).__name__, ", ".join(tiers))
    return model


def _is_ours(error: Exception) -> bool:
    """Whether an error is a fault in this code, which no model can be the cause of."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, (AssertionError, NameError)) and frame.f_globals.get("__name__", "").split(".")[0] == "diffmas"


def _examine(causal_lm: nn.Module, body: nn.Module, backend: str, max_length: int | None) -> Patch:
    """The record of a model that can be patched; changes nothing."""
    attentions = attention_layers(body)
    text_config = body.config.get_text_config()
    for name, module in causal_lm.named_modules():  # accelerate's hooks bring weights when they are needed
        if not hasattr(module, "_hf_hook") and any(p is not None and p.is_meta for p in module._parameters.values()):
            raise Unsupported(
                f"diffmas cannot patch {type(causal_lm).__name__}: weights of {name} are not in memory [device=meta]"
            )
    for attention in attentions:
        forward = attention.__dict__.get("_old_forward" if hasattr(attention, "_hf_hook") else "forward")
        # accelerate leaves the class's own forward on the instance
        if forward is not None and getattr(forward, "__func__", None) is not type(attention).forward:
            raise Unsupported(
                f"diffmas cannot patch {type(attention).__name__} (layer {attention.layer_idx}): its forward was replaced "
                "by someone else [forward]"
            )
        features = unsupported(attention, text_config, max_length)
        if features:
            raise refuse(attention, features)
    windows = [w for a in attentions if (w := window_of(a, text_config)) is not None]
    layers = probe.choose_tiers(body, attentions)
    spec = ModelSpec(
        layers, backend, *_limit(max_length, min(windows, default=None)), inv_freq=functools.partial(_inv_freq, body, {}),
        device=functools.partial(_device, body), fingerprint=functools.partial(fingerprint_of, causal_lm),
        anchored=any(map(is_part, body.parameters())),  # what joins parts of a tensor takes no missing gradient
    )  # fmt: skip
    checkpointed = [m for m in body.modules() if hasattr(m, "gradient_checkpointing")]
    return Patch(body, causal_lm, layers, spec, (backend, max_length), checkpointed, attentions)


def _limit(max_length: int | None, window: int | None) -> tuple[int | None, str]:
    """The most tokens per sequence that a trace may hold, and what sets that limit. window: the shortest sliding window."""
    if window is None or (max_length is not None and max_length <= window):
        return max_length, "patch_model's max_length"
    return window, "the model's sliding window"


def _inv_freq(body: nn.Module, by_device: dict, device: torch.device) -> Tensor:
    if device not in by_device:
        by_device[device] = text_stack_of(body).rotary_emb.inv_freq.detach().to(device, torch.float32)
    return by_device[device]


def _device(body: nn.Module, layer: int) -> torch.device:
    return next(attention_layers(body)[layer].parameters()).device


def _fuse(record: Patch, fuse: bool | None) -> None:
    restore_layers(record.causal_lm)
    record.fuse, record.spec.fused = fuse, usable(record.spec.backend, fuse)
    if record.spec.fused:
        if "cpu" in record.spec.fused and not record.gathered:
            gather_in_huge_pages(record.causal_lm.parameters())
            record.gathered = True
        fuse_layers(record.body, record.causal_lm.get_output_embeddings())


def _install(record: Patch) -> None:
    record.causal_lm.diffmas_patch = record  # first: what fails on the way is undone by `unpatch_model`
    for attention, layer in record.pairs():
        install(attention, layer)
    _fuse(record, record.fuse)
    before = record.body.register_forward_pre_hook(functools.partial(before_body, record), with_kwargs=True)
    after = record.body.register_forward_hook(after_body, with_kwargs=True)
    record.hook_ids = (before.id, after.id)
    if hasattr(type(record.causal_lm), "generate"):
        record.causal_lm.generate = functools.partial(generate, record.causal_lm)
    record.body.compile = functools.partial(compile_body, record.body)
    setattr(record.causal_lm, ATTRIBUTE, record.spec)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model`.

    Returns the model, in place. Raises ValueError if it is not patched.

        >>> model = unpatch_model(patch_model(model))
    """
    record = patch_of(model)
    for attention, _ in record.pairs():
        uninstall(attention)
    restore_layers(record.causal_lm)
    before, after = record.hook_ids
    for hooks, hook in (
        (record.body._forward_pre_hooks, before), (record.body._forward_pre_hooks_with_kwargs, before),
        (record.body._forward_hooks, after), (record.body._forward_hooks_with_kwargs, after),
    ):  # fmt: skip
        hooks.pop(hook, None)
    uncompile_body(record.body)
    for module, names in ((record.causal_lm, ("generate", "diffmas_patch", ATTRIBUTE)), (record.body, ("compile",))):
        for name in names:
            module.__dict__.pop(name, None)
    return model
