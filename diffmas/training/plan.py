"""How much memory a team's training takes on each GPU, by engine: formulas over a model's config, of which nothing is loaded.

Not counted: what the CUDA context, NCCL and the allocator's gaps take (a few GB), and temporary tensors of single ops.
"""

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ENGINES", "Episode", "Need", "Sizes", "plan", "sizes_of"]

ENGINES = ("DDP", "ZeRO-2", "FSDP2, kept", "FSDP2", "ZeRO-3", "tensor parallel")
ADAPTER = 4  # bytes of an adapter's weight, whatever the model's are
MASTER = 16  # of DeepSpeed, for each trained weight: itself, its gradient and two moments in float32
PREFETCHED = 50_000_000  # weights that ZeRO-3 has on their way (stage3_prefetch_bucket_size)


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers of values. weights: all. root: embeddings, head and last norm. largest_layer: a decoder layer's.
    trained: adapters', or all weights. adapter: whether these are beside the weights. kv: of a row (K and V) of a layer.
    logits: of a token. saved: bytes that autograd keeps of a token and layer; entering: those that activation checkpointing
    keeps instead. trained_by_heads, saved_by_heads: the part that tensor parallelism takes apart. saved_by_zero3: what
    DeepSpeed's linears keep besides."""

    weights: int
    root: int
    largest_layer: int
    trained: int
    trained_by_heads: int
    kv: int
    saved: int
    saved_by_heads: int
    saved_by_zero3: int
    entering: int
    logits: int
    layers: int
    kv_heads: int
    dtype_bytes: int
    adapter: bool


@dataclass(frozen=True)
class Episode:
    """What a GPU computes at once. agents: the last one answers. prompt, answer: tokens. latent_steps: of each agent but the
    last. batch: questions."""

    agents: int
    prompt: int = 512
    latent_steps: int = 10
    answer: int = 256
    batch: int = 1

    @property
    def rows(self) -> int:
        """Of a trace, for all questions."""
        return self.batch * (self.agents * self.prompt + (self.agents - 1) * self.latent_steps + self.answer)

    @property
    def forwards(self) -> int:
        return self.agents + (self.agents - 1) * self.latent_steps


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU. gathered: that go over the wire to each GPU for the weights of one episode, forward and backward."""

    engine: str
    weights: int
    optimizer: int
    pools: int
    activations: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.pools + self.activations


def sizes_of(config, r: int | None = 8, dtype: torch.dtype = torch.bfloat16) -> Sizes:
    """The sizes of a model by its transformers config. r: the rank of a LoRA on all linear layers of the decoder; None: all
    weights are trained.

        >>> sizes_of(model.config, r=None).weights == sum(p.numel() for p in model.parameters())
        True
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    text, b = config.get_text_config(), dtype.itemsize
    count = lambda module: sum(p.numel() for p in module.parameters())
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=count)
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights, in_layers = count(model), [count(layer) for layer in layers]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    hidden, heads, inner = text.hidden_size, text.num_attention_heads * head_dim, text.intermediate_size
    # Two norms keep their input in float32 and what they return, attention its queries, outputs, and q and k before a norm;
    # the MLP gate, up, the activation and their product; a LoRA's A each linear layer's input as float32.
    saved, inside = 2 * (2 * 4 + b) * hidden, b * (3 * heads + kv_heads * head_dim) + 4 * b * inner
    if r and b < 4:
        saved, inside = saved + 4 * 2 * hidden, inside + 4 * (heads + inner)
    # Of a linear layer, what is not the hidden state's side.
    by_heads = [m.out_features if m.in_features == hidden else m.in_features for m in linears]
    return Sizes(
        weights=weights, root=weights - sum(in_layers), largest_layer=max(in_layers),
        trained=weights if r is None else sum(r * (m.in_features + m.out_features) for m in linears),
        trained_by_heads=sum(in_layers) if r is None else r * sum(by_heads),
        kv=2 * kv_heads * head_dim, saved=saved + inside, saved_by_heads=inside,
        saved_by_zero3=b * (heads + inner) if r and b < 4 else 0, entering=b * hidden, logits=text.vocab_size,
        layers=len(layers), kv_heads=kv_heads, dtype_bytes=b, adapter=r is not None,
    )  # fmt: skip


def plan(sizes: Sizes, gpus: int, episode: Episode, checkpointing: bool = False, offload: bool = False) -> list[Need]:
    """What each engine of ENGINES needs, on so many GPUs with an episode on each; with tensor parallelism they share one.

    offload: a GPU holds the pools of two layers, the host all of them. Tensor parallelism is left out where the GPUs do not
    divide the K/V heads.

        >>> needs = plan(sizes_of(model.config), gpus=2, episode=Episode(agents=3))
        >>> needs[0].weights > needs[3].weights
        True
    """
    b, rows, n = sizes.dtype_bytes, episode.rows, gpus
    weights, root, layers = b * sizes.weights, b * sizes.root, b * (sizes.weights - sizes.root)
    pools = rows * (min(2, sizes.layers) if offload else sizes.layers) * sizes.kv * (b + 4)  # and gradients, in float32
    if checkpointing:
        longest = episode.batch * (episode.prompt + episode.answer)
        activations, tokens = rows * sizes.layers * sizes.entering + longest * sizes.saved, longest
    else:
        activations, tokens = rows * sizes.layers * sizes.saved, rows * sizes.layers
    inside, inputs = tokens * sizes.saved_by_heads, tokens * sizes.saved_by_zero3
    logits = 3 * 4 * episode.batch * episode.answer * sizes.logits  # in float32, their softmax, their gradient
    activations += logits
    # What each trained weight takes: itself, unless it is one of the model's; its gradient, which is whole on every process
    # until the backward of all forwards has added to it, and which DDP copies to where it is summed; the optimizer's state.
    t = ADAPTER if sizes.adapter else b
    own, gradient = t * sizes.trained * sizes.adapter, t * sizes.trained
    # FSDP2 gathers into one piece of memory and copies each weight out of it, while the piece before is still there.
    layer = b * sizes.largest_layer + own // sizes.layers
    passed = 2 * episode.forwards * layers * (n - 1) // n
    parts = (own + 3 * gradient) // n + gradient
    needs = [
        Need("DDP", weights, own + (3 + (n > 1)) * gradient, pools, activations, 0),
        Need("ZeRO-2", weights, own + gradient + MASTER * sizes.trained // n, pools, activations, 0),
        Need("FSDP2, kept", weights // n + weights + own + 2 * layer, parts, pools, activations, layers * (n - 1) // n),
        Need("FSDP2", weights // n + max(2 * root + 2 * layer, root + 3 * layer), parts, pools, activations, passed),
        # ZeRO-3 lets a layer go when the backward of one forward is done, and not again after that of the others.
        Need(
            "ZeRO-3", weights // n + weights + own + min(weights + own, b * PREFETCHED),
            own // n + gradient + MASTER * sizes.trained // n, pools, activations + inputs, passed,
        ),
    ]  # fmt: skip
    if sizes.kv_heads % n == 0:
        # Its layers' insides are parts, what enters them is whole; the embeddings may be whole too.
        whole = sizes.trained - sizes.trained_by_heads
        mine = (own + 3 * gradient) * (whole + sizes.trained_by_heads // n) // sizes.trained
        needs.append(Need("tensor parallel", layers // n + root, mine, pools // n, activations - inside + inside // n, 0))
    return needs
