"""A word tokenizer, tiny systems, and the oracle of the system tests: a cache-free unroll with plain autograd."""

import types

import torch
from models import VOCAB, body, tiny, with_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffmas import Agent, MultiAgentSystem

AGENTS = [
    Agent("planner", "w5 {question} w6", latent_steps=3),
    Agent("critic", "w7 w8 {question}", latent_steps=2),
    Agent("solver", "w9 {question}"),
]
QUESTIONS = ["w10 w11", "w12 w13 w14 w15", "w16"]
ANSWERS = ["w20 w21 w22", "w23", "w24 w25"]


def tokenizer():
    """One word, one token; ids 0 pad, 1 unk, 63 eos."""
    words = {f"w{i}": i for i in range(2, VOCAB - 1)} | {"<pad>": 0, "<unk>": 1, "<eos>": VOCAB - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def exact_norms(model):
    """transformers' norms compute in float32 even in float64 models; here in float64, so that tests can be tight."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if "LayerNorm" in type(self).__name__ else x
        eps = getattr(self, "variance_epsilon", None)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "CohereLayerNorm")):
            module.forward = types.MethodType(forward, module)
    return model


def system(family="qwen3", agents=AGENTS, lora=True, dtype=torch.float64, **options) -> MultiAgentSystem:
    model = exact_norms(tiny(family, dtype, patch=False))
    made = MultiAgentSystem(with_lora(model) if lora else model, tokenizer(), agents, **options)
    made.realign.to(dtype)
    return made


def roles_model(names=("planner", "critic", "solver")):
    """One LoRA per role, all of the same weights."""
    from peft import LoraConfig

    model = with_lora(tiny("qwen3", patch=False))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    weights = {n: p.data.clone() for n, p in model.named_parameters() if "lora_" in n}
    for name in names:
        model.add_adapter(name, config)
        own = dict(model.named_parameters())
        for n, w in weights.items():
            own[n.replace("default", name)].data.copy_(w)
    model.delete_adapter("default")
    return model


def unroll(system, question, answer: str | None = None, generated: list[int] = ()):
    """Solver logits of one question, recomputing the whole prefix for every latent step; differentiable.

    [A, V] that predict the answer's tokens, or [1, V] for the token after the `generated` ones.

    Who sees what is one mask over all tokens of the episode: a token sees its own agent's earlier tokens, and of earlier
    agents everything (trace_content all), or latents and the first `sinks` tokens that were there to see.
    """
    base, model = body(system.model), system.model
    fields = system.fields_of([question])[0]
    x = base.get_input_embeddings().weight.new_zeros(0, base.config.get_text_config().hidden_size)
    agent_of, handed = [], []  # by token; whether later agents see it

    def forward(module):
        n = len(agent_of)
        owner = torch.tensor(agent_of)
        sees = ((owner[:, None] == owner) | torch.tensor(handed)[None]).tril()
        mask = torch.zeros(n, n, dtype=x.dtype).masked_fill(~sees, torch.finfo(x.dtype).min)
        positions = torch.arange(n)[None]
        return module(inputs_embeds=x[None], attention_mask=mask[None, None], position_ids=positions, use_cache=False)

    for i, agent in enumerate(system.agents):
        last = i == len(system.agents) - 1
        T = 0 if last else agent.steps(fields)
        if not last and T == 0 and system.no_latents == "skip":
            continue
        ids = system.prompt_ids(agent, fields)
        if last:
            ids = ids + (system.answer_ids(answer) if answer is not None else list(generated))
        x = torch.cat((x, base.get_input_embeddings()(torch.tensor(ids))))
        agent_of += [i] * len(ids)
        free = system.sinks - sum(handed)
        handed += [system.trace_content == "all" or j < free for j in range(len(ids))]
        if agent.passes and T:
            prompt, h0 = x, forward(base).last_hidden_state[0, -1:]
            agent_of, handed, h = agent_of + [i] * T, handed + [True] * T, h0.expand(T, -1)
            for j in range(agent.passes):
                h = h.detach() if j and agent.passes - j == agent.grad_passes else h
                x = torch.cat((prompt, system.realign(torch.cat((h0, h[:-1])))))
                h = forward(base).last_hidden_state[0, -T:]
            continue
        before = None
        for _ in range(T):
            h = forward(base).last_hidden_state[0, -1:]
            if before is not None and agent.stop_change and (h - before).norm() < agent.stop_change * before.norm():
                break
            x, before = torch.cat((x, system.realign(h))), h
            agent_of.append(i)
            handed.append(True)
    logits = forward(model).logits[0]
    count = len(system.answer_ids(answer)) if answer is not None else 1
    return logits[-count - 1 : -1] if answer is not None else logits[-1:]


def unrolled_loss(system, questions, answers):
    """The loss of a batch, one question at a time."""
    total, count = 0.0, 0
    for question, answer in zip(questions, answers):
        labels = torch.tensor(system.answer_ids(answer))
        total = total + torch.nn.functional.cross_entropy(unroll(system, question, answer), labels, reduction="sum")
        count += len(labels)
    return total / count
