"""Models and agents of the end-to-end modules: random weights in the shapes of real models, and the time of their parts."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from diffmas import Agent, MultiAgentSystem
from diffmas.benchmarks.machine import clock
from diffmas.benchmarks.measure import Case
from diffmas.models.parts import body_of, causal_lm_of

__all__ = [
    "DEVICE", "NOTE", "SMOL", "Stopwatch", "eager_attention", "end_to_end", "make_model", "make_smol", "make_system",
    "word_tokenizer",
]  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 4096
NOTE = f"random weights, vocabulary {VOCABULARY}"
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "small": dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    "135M": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64),
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
}


SMOL = SHAPES["135M"] | dict(
    vocab_size=49_152, num_hidden_layers=30, max_position_embeddings=16_384, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
LITTLE = 1 / 32


def make_smol(case: Case, dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M's shape. Layers add little to what they are given: random ones would make noise of the rounding of 16
    bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMOL | {"num_hidden_layers": case.layers}, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    model = LlamaForCausalLM(config).requires_grad_(False).to(getattr(torch, case.dtype))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(LITTLE)
    return model.to(dtype).eval()


def end_to_end(op: str, regime: str, phase: str, model="small", layers=4, quick=False, **shape) -> Case:
    """A case with the heads of its model."""
    s = SHAPES[model]
    heads = f"{s['num_attention_heads']}/{s['num_key_value_heads']}"
    return Case(
        op, regime, phase, heads=heads, D=s["head_dim"], model=model, layers=layers, quick=quick, **{"note": NOTE, **shape}
    )


def make_model(case: Case, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """Qwen3 of the case's shape and number of layers, the same weights for every dtype."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_hidden_layers=case.layers, max_position_embeddings=40_960, tie_word_embeddings=True,
        **SHAPES[case.model],
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(DEVICE, dtype).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w2 and so on."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")


def make_system(case: Case, lora: bool) -> tuple[MultiAgentSystem, list[str], list[str]]:
    """Agents whose prompts make a trace of about N rows with T latent steps each; batches have questions of different lengths,
    the longest of which makes N rows, but those of model 135M. -> system, questions, answers."""
    smol = case.model == "135M"
    model = make_smol(case, getattr(torch, case.dtype)).to(DEVICE) if smol else make_model(case)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    writers = case.agents - 1
    agents = [Agent(f"agent{i}", f"w{2 + i} " + "{question}", case.T if i < writers else 0) for i in range(case.agents)]
    prompt = (case.N - writers * case.T) // case.agents - 1
    lengths = [prompt if smol else max(1, prompt * (b + 1) // case.batch) for b in range(case.batch)]
    questions = [" ".join(f"w{2 + (b + i) % 4000}" for i in range(n)) for b, n in enumerate(lengths)]
    return MultiAgentSystem(model, word_tokenizer(), agents), questions, ["w5 " * 15] * case.batch


@contextlib.contextmanager
def eager_attention(system: MultiAgentSystem) -> Iterator[None]:
    config = system.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


class Stopwatch:
    """The time of a system's parts, whichever way it runs: by hooks on the model's body, which all ways call.

    prefill: several tokens a sequence; latent steps: embeddings; decode: one token a sequence; handoff: everything around.
    """

    def __init__(self, system: MultiAgentSystem, batch: int):
        self.system, self.batch = system, batch
        self.seconds: dict[str, list[float]] = defaultdict(list)  # part -> one entry per call
        self._now = clock(DEVICE)
        self._parts: dict[str, float] = defaultdict(float)
        self._kind, self._start = "", 0.0

    def now(self) -> float:
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        return self._now()

    def _enter(self, module, args, kwargs):
        if kwargs.get("inputs_embeds") is not None:
            self._kind = "latent steps"
        else:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self._kind = "decode" if ids.numel() == self.batch else "prefill"
        self._start = self.now()

    def _leave(self, module, args, output):
        self._parts[self._kind] += self.now() - self._start

    def measure(self, **steps):
        """Runs steps in order, timing each; what the body does in one of them is a part of its own. -> the last result."""
        self._parts.clear()
        body = body_of(causal_lm_of(self.system.model))
        handles = [
            body.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True), body.register_forward_hook(self._leave)
        ]  # fmt: skip
        result = None
        try:
            for name, step in steps.items():
                before, start = sum(self._parts.values()), self.now()
                result = step(result)
                spent = self.now() - start
                self._parts[name] += spent - (sum(self._parts.values()) - before)
        finally:
            for handle in handles:
                handle.remove()
        for name, seconds in self._parts.items():
            self.seconds[name].append(seconds)
        return result
