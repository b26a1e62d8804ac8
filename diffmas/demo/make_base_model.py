"""Trains the demo's base model: a four-layer Qwen3 that answers questions over given facts, in 6 to 10 minutes on a CPU.

    python -m diffmas.demo.make_base_model --out base

The corpus is generated (`diffmas.evaluation.tasks.facts`): notes in another order, facts written as notes, questions about
facts and about notes. Values are drawn with replacement, so that no question in a text gives away another's answer by
elimination. The printed recall is over held-out facts with one random question each. Later questions in a text come without
facts, so that the model looks for them in the tokens before.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from diffmas.evaluation.tasks import facts as world

PAD, UNKNOWN, BEGIN, END = "<|pad|>", "<|unknown|>", "<|begin|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATE_WORDS = "Facts : . Question ? Notes Write notes in any order the to Where What did go take".split()
REORDER_PROMPT = "Facts: {facts} Write notes in any order."
HELD_OUT_SEED = 10_000
ROPE_THETA = 1_000_000.0

# (steps, kinds of text with their weights, fewest facts, most facts, questions per text)
STAGES = [
    (250, {"reorder notes": 1}, 4, 4, 1),
    (100, {"reorder notes": 1, "reorder facts": 3}, 3, 4, 1),
    (250, {"reorder facts": 2, "write": 2, "answer": 4, "answer from notes": 2}, 2, 6, 3),
    (250, {"write": 4, "answer": 5, "answer from notes": 3}, 2, 6, 3),
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark."""
    words = [PAD, UNKNOWN, BEGIN, END, *ROLES, *TEMPLATE_WORDS]
    words += world.NAMES + world.THINGS + world.PLACES + world.VERBS
    assert len(set(words)) == len(words)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
    )


@torch.no_grad()
def build_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=ROPE_THETA,
        initializer_range=0.08,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    embedding = model.get_input_embeddings().weight
    torch.nn.init.normal_(embedding, std=0.5)
    model.lm_head.weight.copy_(0.06 * embedding)
    embedding.add_(0.5 * torch.randn(config.hidden_size))
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        key, value = (
            projection.weight.view(-1, config.head_dim, config.hidden_size).repeat_interleave(repeats, 0).flatten(0, 1)
            for projection in (attention.k_proj, attention.v_proj)
        )
        attention.q_proj.weight.copy_(key)
        attention.o_proj.weight.copy_(0.5 * value.T)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def make_text(rng: random.Random, kind: str, count: int, questions: int) -> list[tuple[str, str]]:
    """(user, assistant) turns about `count` facts."""
    facts = world.make_facts(rng, count)
    sentences, notes = " ".join(world.sentence(fact) for fact in facts), world.notes(facts)
    if kind == "write":
        return [(world.READER_PROMPT.format(facts=sentences), notes)]
    if kind.startswith("reorder"):
        source = notes if kind == "reorder notes" else sentences
        return [(REORDER_PROMPT.format(facts=source), world.notes(rng.sample(facts, count)))]
    turns = []
    for number in range(questions):
        question, answer = world.ask(rng, rng.choice(facts))
        prompt = world.SOLVER_PROMPT
        if number == 0 and kind == "answer":
            prompt = world.ALL_FACTS_PROMPT
        elif number == 0 and kind == "answer from notes":
            prompt = world.NOTES_PROMPT
        turns.append((prompt.format(facts=sentences, notes=notes, question=question), answer))
    return turns


def encode(tokenizer, texts: list[list[tuple[str, str]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [rows, length] each, padded on the right; only the assistant's words have labels."""
    pieces = iter(tokenizer([part for turns in texts for turn in turns for part in turn])["input_ids"])
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for turns in texts:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for _ in turns:
            prompt, reply = [user, *next(pieces), end, assistant], [*next(pieces), end]
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    return input_ids, torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])


def make_batch(tokenizer, rng: random.Random, rows: int, kinds: dict, fewest: int, most: int, questions: int):
    chosen = rng.choices(list(kinds), weights=list(kinds.values()), k=rows)
    texts = [make_text(rng, kind, rng.randint(fewest, most), questions) for kind in chosen]
    input_ids, labels = encode(tokenizer, texts)
    reordered = torch.tensor([kind.startswith("reorder") for kind in chosen])
    names = torch.tensor(tokenizer.convert_tokens_to_ids(world.NAMES))
    labels[reordered[:, None] & torch.isin(labels, names)] = -100  # which name comes next is chance
    return input_ids, labels


@torch.no_grad()
def recall(model, tokenizer, seed: int, count: int) -> float:
    """Share of right answers to held-out questions, with all facts in the context."""
    prompt = world.ALL_FACTS_PROMPT
    texts = [
        [(prompt.format(facts=example["facts"], question=example["question"]), example["answer"])]
        for example in world.make_rows(count, seed)
    ]
    input_ids, _ = encode(tokenizer, texts)
    logits = model(input_ids=input_ids[:, :-2], logits_to_keep=1).logits  # the last two: the answer and <|end|>
    return (logits[:, -1].argmax(-1) == input_ids[:, -2]).float().mean().item()


def train(model, tokenizer, rows: int, rate: float, seed: int) -> None:
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    stages = [stage for steps, *stage in STAGES for _ in range(steps)]
    start = time.perf_counter()
    for step, stage in enumerate(stages):
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(stages)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * max(cosine, 0.02)
        input_ids, labels = make_batch(tokenizer, rng, rows, *stage)
        logits, labels = model(input_ids=input_ids).logits[:, :-1], labels[:, 1:]
        logits, labels = logits[labels != -100], labels[labels != -100]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            right = (logits.argmax(-1) == labels).float().mean().item()
            held_out = recall(model, tokenizer, HELD_OUT_SEED, 200)
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:4d}  loss {loss.item():.3f}  right {right:.3f}"
                f"  held-out recall {held_out:.3f}  {seconds:.0f} s",
                flush=True,
            )


def save(model, tokenizer, folder: Path) -> None:
    """Writes model and tokenizer in a form that both transformers 4.56 and 5 read; 5 has renamed some entries."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, entries in (
        ("config.json", {"rope_theta": ROPE_THETA, "torch_dtype": "float32"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ROLES}),
    ):
        config = {**json.loads((folder / name).read_text()), **entries}
        config.pop("extra_special_tokens", None)
        (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--rows", type=int, default=32, help="texts per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} words")
    train(model, tokenizer, args.rows, args.rate, args.seed)
    save(model, tokenizer, args.out)
    print(f"recall on 2000 held-out examples: {recall(model, tokenizer, HELD_OUT_SEED + 1, 2000):.4f}")


if __name__ == "__main__":
    main()
