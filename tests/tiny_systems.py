"""Tiny trainable systems for the tests of training, evaluation and the command line, and a data set they can learn."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from diffmas import Agent, MultiAgentSystem
from diffmas.models.local import gathered, spread_like

WORDS = "plan : answer question notes where is the key lamp ring book coin map in kitchen cellar garden attic garage".split()
THINGS, PLACES = WORDS[8:14], WORDS[15:20]
VOCAB = ["<pad>", "<unk>", "<end>", *WORDS]


def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def model(seed: int = 0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    given = dict(
        vocab_size=len(VOCAB), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.25, max_position_embeddings=128, eos_token_id=2, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    config = AutoConfig.for_model("qwen3", **{**given, **options})
    return AutoModelForCausalLM.from_config(config).to(dtype)


def save_base(path, seed: int = 0, **options):
    """A base model and its tokenizer on disk, as `diffmas train` takes them by name."""
    model(seed, **options).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def agents(
    latent_steps: int = 2, middle: int | None = None, passes: int | None = None, parallel: bool = False,
    select: dict | None = None,
):  # fmt: skip
    """select: which of the planner's rows the solver reads."""
    how = dict(passes=passes, reads=[] if parallel else None)
    return [
        Agent("planner", prompt="plan : {question}", latent_steps=latent_steps, **how),
        Agent("critic", prompt="notes : {question}", latent_steps=latent_steps if middle is None else middle, **how),
        Agent("solver", "question : {question} answer :", reads=select and [{"agent": "planner", "select": select}, "critic"]),
    ]


def system(
    latent_steps: int = 2, middle: int | None = None, lora: bool = True, seed: int = 0, adapter_scope="shared",
    alpha: int = 4, base=None, passes: int | None = None, parallel: bool = False, select: dict | None = None, **options,
):  # fmt: skip
    """A system of three agents around the same weights every time; LoRA has a B that is not zero. base: a model that others
    may share; LoRA's A is then drawn here too, since PEFT draws each process's part as if it were the whole."""
    from diffmas.training import add_lora, lora_config

    drawn = "lora_B" if base is None else "lora_"
    base, crew = model(seed) if base is None else base, agents(latent_steps, middle, passes, parallel, select)
    if lora:
        base = add_lora(base, crew, adapter_scope, lora_config(r=2, alpha=alpha))
        generator = torch.Generator().manual_seed(1)
        weights = {name: p for name, p in base.named_parameters() if drawn in name}
        with torch.no_grad(), gathered([*weights.values()], True):
            for p in weights.values():
                p.copy_(spread_like(0.1 * torch.randn(p.shape, generator=generator), p))
    return MultiAgentSystem(base, tokenizer(), crew, adapter_scope=adapter_scope, **options)


def rows(count: int = 8):
    """Where a thing is, is told by the thing alone: there is something to learn. Answers differ in length."""
    places = [f"the {p}" if i % 2 else f"in the {p}" for i, p in enumerate(PLACES)]
    things = [THINGS[i % len(THINGS)] for i in range(count)]
    return [{"question": f"where is the {t}", "answer": places[THINGS.index(t) % len(places)]} for t in things]


def write_jsonl(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def trainable(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
