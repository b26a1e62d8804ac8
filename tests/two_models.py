"""Two tiny models of different families, and plain loops with transformers' cache: the oracle of what crosses models."""

import torch
from models import body, tiny, with_lora
from systems import exact_norms
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from diffmas.models.parts import causal_lm_of
from diffmas.trace.cache import cache_argument

SHARER = dict(num_hidden_layers=2, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8, vocab_size=80)
RECEIVER = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10)


def exact_rotary(model):
    """Angles in float64, where transformers has float32."""
    rotary = body(model).rotary_emb

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    rotary.forward = forward
    return model


def pair(sharer: str = "glm4", receiver: str = "qwen3", lora: bool = True, dtype=torch.float64):
    """A sharer and a receiver; glm4 turns half of a key, interleaved."""
    exact = (lambda model: exact_rotary(exact_norms(model))) if dtype == torch.float64 else lambda model: model
    made = [
        exact(tiny(family, dtype, patch=False, seed=seed, **options))
        for family, options, seed in ((sharer, SHARER, 3), (receiver, RECEIVER, 0))
    ]
    return [with_lora(model, seed) for model, seed in zip(made, (5, 7))] if lora else made


def pieces(vocab: int = 80):
    """A tokenizer that cuts words in two where it can: w17 is w1 and 7; ids 0 pad, 1 unk, vocab - 1 eos."""
    parts = [f"w{i}" for i in range(10)] + [f"##{i}" for i in range(10)] + ["w"]
    known = {"<pad>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(parts)}, "<eos>": vocab - 1}
    backend = Tokenizer(models.WordPiece(known, unk_token="<unk>", continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def forward(model, module, kv, x, first: int):
    """One forward of embeddings x [n, hidden] behind kv, by layer [1, H, past, D] -> its output, and kv with its rows."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(kv):
        cache.update(k, v, layer)
    past = kv[0][0].shape[2] if kv else 0
    mask = torch.ones(1, past + len(x), dtype=torch.long)
    out = module(
        inputs_embeds=x[None], attention_mask=mask, position_ids=torch.arange(first, first + len(x))[None], use_cache=True,
        **{cache_argument(causal_lm_of(model)): cache},
    )  # fmt: skip
    return out, [(layer.keys, layer.values) for layer in cache.layers]


def think(model, ids, steps: int = 0, realign=lambda h: h, kv=(), first: int = 0):
    """kv of a prompt and its latent steps, behind kv. ids: of its tokens, or what stands for them, [n, hidden]."""
    x = ids if torch.is_tensor(ids) else model.get_input_embeddings()(torch.tensor(ids))
    for _ in range(steps + 1):
        out, kv = forward(model, body(model), kv, x, first)
        first += len(x)
        x = realign(out.last_hidden_state[0, -1:])
    return kv


def turn(k, positions, model):
    """Keys [1, H, n, D] turned on by positions [n]; as complex numbers."""
    inv_freq = body(model).rotary_emb.inv_freq.double()
    D = 2 * len(inv_freq)
    by = torch.polar(torch.ones(()).double(), torch.as_tensor(positions).double()[:, None] * inv_freq)
    head, rest = k[..., :D], k[..., D:]
    if "Glm" in type(causal_lm_of(model)).__name__:  # pairs are neighbours
        x = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous()) * by
        return torch.cat((torch.view_as_real(x).flatten(-2), rest), -1)
    x = torch.complex(head[..., : D // 2].contiguous(), head[..., D // 2 :].contiguous()) * by
    return torch.cat((x.real, x.imag, rest), -1)


def projected(projector, sharer, receiver, kv, positions=None):
    """kv of the sharer as rows of the receiver, by the weights of a linear projector or of its MLP."""
    n = kv[0][0].shape[2]
    positions = torch.arange(n) if positions is None else positions
    made = []
    for i, j in enumerate(projector.layers):
        k, v = kv[j]
        rows = []
        for maps, x in ((projector.keys[i], turn(k, -positions, sharer)), (projector.values[i], v)):
            x = x[0].transpose(0, 1).reshape(n, -1)
            x = x @ maps[0].weight.T + maps[0].bias
            if len(maps) > 1:
                x = x * 0.5 * (1 + torch.erf(x / 2**0.5)) @ maps[2].weight.T + maps[2].bias
            rows.append(x.view(n, *projector.receiver_rows[i]).transpose(0, 1)[None])
        made.append((turn(rows[0], positions, receiver), rows[1]))
    return made
