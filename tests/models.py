"""Tiny random models, and the oracle of the trace tests: whole contexts recomputed without any cache."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import diffmas

VOCAB = 64
EOS = VOCAB - 1

# What a family needs beyond BASE. Window and dropout are off where the defaults would be refused.
FAMILIES = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "mistral": dict(sliding_window=None),
    "ministral": dict(sliding_window=512),
    "ministral3": dict(
        sliding_window=None,
        rope_parameters=dict(  # short enough that the tests reach the positions where queries are scaled
            rope_type="yarn",
            rope_theta=1e4,
            factor=64.0,
            original_max_position_embeddings=8,
            llama_4_scaling_beta=0.3,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "phi3": {},
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": dict(num_local_experts=4, sliding_window=None),
    "olmo2": {},
    "cohere": {},
    "glm4": dict(partial_rotary_factor=0.5),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=512, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_neox": dict(rotary_pct=0.5),
}
FUSED = ["qwen3", "qwen2", "llama", "mistral", "ministral", "ministral3", "phi3", "qwen3_moe", "mixtral"]
GENERIC = ["olmo2", "cohere", "glm4", "smollm3", "gpt2", "gpt_neox"]
# One of each way in which families differ, for tests that need not see them all.
SOME = ["qwen3", "phi3", "cohere"]

BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
)  # fmt: skip


def make_config(family: str, **changes):
    """The tiny config of a family; skips where the installed transformers does not have it."""
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    options = {**BASE, **FAMILIES.get(family, {}), **changes}
    if family == "gpt2":  # does not take the names that are aliases of its own
        options = {k: v for k, v in options.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return AutoConfig.for_model(family, **options)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that attention is peaked, and norms that are not one: the defaults hide wrong code."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = 1.0 + 0.2 * noise if p.dim() == 1 and not name.endswith("bias") else 0.25 * noise
        p.data.copy_(scale)
    return module


def build(config, dtype=torch.float64, seed: int = 0):
    model = randomize(AutoModelForCausalLM.from_config(config), seed)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = EOS
    # Only floating-point weights: frequencies of the rotary embedding stay as they are, as from_pretrained leaves them.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.eval()


def tiny(family: str, dtype=torch.float64, patch: bool = True, seed: int = 0, max_length=None, **changes):
    """A tiny random causal LM of a family, patched unless told otherwise."""
    model = build(make_config(family, **changes), dtype, seed)
    return diffmas.patch_model(model, max_length=max_length) if patch else model


def with_lora(model, seed: int = 7, **options):
    """LoRA on the attention projections with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    targets = [name for name in ("q_proj", "v_proj", "qkv_proj") if any(n.endswith(name) for n, _ in model.named_modules())]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.get_base_model().parameters()).dtype
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    return model.eval()


def tokens(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    """Random token ids, one 1-D tensor per length, none of them pad or eos."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, EOS, (n,), generator=generator) for n in lengths]


def pad(rows: list[torch.Tensor], side: str = "left", value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids [B, longest], attention mask."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = row, 1
    return ids, mask


def body(model):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model if model.base_model_prefix else model.model  # the latter: multimodal models before transformers 5


def attend_only(n: int, hidden, dtype):
    """A 4-D mask that is causal, but for the (query, key) pairs in `hidden`: ranges of query and of key tokens."""
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    for queries, keys in hidden:
        allowed[queries, keys] = False
    return torch.zeros(n, n, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


def masked(model, parts, positions, hidden=()):
    """Logits of the context that `parts` make up, at explicit positions, some tokens not seeing some others."""
    ids = torch.cat(parts)
    mask = attend_only(len(ids), hidden, model.dtype)
    return model(ids[None], attention_mask=mask, position_ids=torch.tensor(positions)[None], use_cache=False).logits[0]


def embed(model, ids: torch.Tensor) -> torch.Tensor:
    """Input embeddings [n, hidden] as the body would compute them from ids [n]."""
    return body(model).get_input_embeddings()(ids)


def whole(model, x: torch.Tensor, positions=None):
    """One sequence's context in one forward, without a cache; x [n] ids or [n, hidden] -> the model's output."""
    name = "input_ids" if x.dim() == 1 else "inputs_embeds"
    extra = {} if positions is None else {"position_ids": torch.as_tensor(positions)[None]}
    # With a mask, transformers does not take a jump of the positions for the border of two packed sequences.
    mask = torch.ones(1, len(x), dtype=torch.long)
    return model(**{name: x[None]}, attention_mask=mask, use_cache=False, output_hidden_states=True, **extra)


def last_hidden(model, x: torch.Tensor) -> torch.Tensor:
    return body(model)(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]


def unroll(model, parts: list) -> torch.Tensor:
    """Logits [n, vocab] of everything, for one sequence. A part is ids, or the number of latent steps to take.

    Each latent step recomputes all that came before: no cache, so that plain autograd is right.
    """
    x = embed(model, torch.zeros(0, dtype=torch.long))
    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                x = torch.cat((x, last_hidden(model, x)[-1:]))
        else:
            x = torch.cat((x, embed(model, part)))
    return model(inputs_embeds=x[None], use_cache=False).logits[0]


def latent_steps(model, trace, hidden: torch.Tensor, steps: int, **options) -> torch.Tensor:
    """Feeds `hidden` [B, 1, hidden] back `steps` times."""
    for _ in range(steps):
        hidden = body(model)(inputs_embeds=hidden, past_key_values=trace, **options).last_hidden_state[:, -1:]
    return hidden


def episode(model, first, second, side="left", trace=None, steps: int = 3):
    """A prompt, latent steps, a second prompt. first, second: lists of rows of ids -> output of the second prompt."""
    trace = diffmas.Trace(model, batch_size=len(first)) if trace is None else trace
    ids, mask = pad(first, "left")
    h = body(model)(input_ids=ids, attention_mask=mask, past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, steps)
    ids, mask = pad(second, side)
    return model(input_ids=ids, attention_mask=mask, past_key_values=trace, output_hidden_states=True), mask, trace


def loss_of(logits):
    """A loss in which every logit counts differently."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum()


def monolithic(model, first, second, steps: int = 3):
    """The same episode, one sequence at a time and without a cache -> logits of each second prompt."""
    return [unroll(model, [a, steps, b])[len(a) + steps :] for a, b in zip(first, second)]


def prefill(model, *rows, trace=None):
    trace = diffmas.Trace(model, len(rows)) if trace is None else trace
    ids, mask = pad(list(rows))
    model(input_ids=ids, attention_mask=mask, past_key_values=trace)
    return trace


def read(model, trace, *rows):
    """Logits of each row's new tokens on a trace, which is left as it was."""
    ids, mask = pad(list(rows))
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=trace.fork(1)[0]).logits
    return [x[m.bool()] for x, m in zip(logits, mask)]


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of all parameters, which are then cleared."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    gap = (got - want).detach().abs()
    return float(gap.max() / want.detach().abs().max().clamp_min(1e-30)) if want.numel() else 0.0


# transformers computes norms and rotary tables in float32 even in float64 models: agreement ends there.
EXACT = 2e-5


def assert_close(got, want, limit: float = EXACT) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys(), got.keys() ^ want.keys()
        for name in want:
            # relative to the model's largest gradient where a parameter's own is (nearly) zero
            floor = 1e-3 * max(float(w.abs().max()) for w in want.values())
            gap = float((got[name] - want[name]).abs().max()) / max(float(want[name].abs().max()), floor)
            assert gap < limit, (name, gap)
        return
    gap = error(got, want)
    assert gap < limit, gap
