"""A level of agents with an adapter each (`per_role`): a prompt and latent steps of all of them in one forward, each adapter
with its own rows; against one agent after the other, and PEFT's own batch of several adapters (`adapter_names`) on a
DynamicCache. "step": with the loss of an agent that reads them all, and its backward, which PEFT has no batch for.
"""

import torch
from transformers import DynamicCache

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.adapters import add_lora, lora_config
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.benchmarks.systems import DEVICE, end_to_end, make_model, make_smol, word_tokenizer
from diffmas.models.parts import causal_lm_of
from diffmas.trace.cache import cache_argument

__all__ = ["CASES", "PROVIDERS", "problem"]

PROMPT, T = 8, 8
SHAPE = dict(n=PROMPT, T=T, note="random weights, LoRA r = 8")

CASES = [
    *(end_to_end("roles", "a level", phase, agents=2, batch=1, quick=True, **SHAPE) for phase in ("forward", "step")),
    *(
        end_to_end("roles", "a level", phase, "135M", 30, agents=agents, batch=batch, **SHAPE)
        for phase in ("forward", "step")
        for agents, batch in ((2, 1), (4, 1), (2, 12))
    ),
]


def problem(case: Case) -> Problem:
    """agents: of the level; one more reads them."""
    model = make_smol(case, torch.float32).to(DEVICE) if case.model == "135M" else make_model(case)
    agents = [Agent(f"agent{i}", f"w{2 + i} " + "{question}", T, reads=[]) for i in range(case.agents)]
    agents.append(Agent("reader", "w99 {question}"))
    model = add_lora(model.requires_grad_(False), agents, "per_role", lora_config())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    system = MultiAgentSystem(model, word_tokenizer(), agents, adapter_scope="per_role", realign="none")
    questions = [" ".join(f"w{100 + 10 * b + i}" for i in range(PROMPT - 1)) for b in range(case.batch)]
    given = system.eval(), questions, ["w5 w6 w7"] * case.batch

    def answer(dtype: torch.dtype) -> dict:
        trial = one_by_one(found) if case.phase == "step" else batch_of_peft(found)
        return trial.read(trial.call())

    found = Problem(case, given, answer, tolerance=3e-4)
    return found


def _ours(together: bool):
    def provider(p: Problem) -> Trial:
        system, questions, answers = p.inputs

        def call():
            system.together = together
            if p.case.phase == "forward":
                with torch.no_grad():
                    return system.communicate(system.fields_of(questions))
            system.zero_grad(set_to_none=True)
            system(questions, answers).loss.backward()
            return None

        def read(trace) -> dict:
            if trace is not None:
                return {f"k{b}": trace.keys_values(p.case.layers - 1, b)[0] for b in range(p.case.batch)}
            return {name: x.grad for name, x in system.named_parameters() if x.grad is not None}

        return Trial(call, read)

    return provider


one_by_one = _ours(together=False)


def batch_of_peft(p: Problem) -> Trial:
    """Prompts of one length, so that nothing is padded."""
    if p.case.phase == "step":
        raise Senseless
    system, questions, _ = p.inputs
    fields, writers, lm = system.fields_of(questions), system.agents[:-1], system.model
    ids = torch.tensor([system.prompt_ids(agent, row) for agent in writers for row in fields], device=DEVICE)
    names = [agent.adapter for agent in writers for _ in fields]
    head = causal_lm_of(lm).get_output_embeddings()

    @torch.no_grad()
    def call():
        cache = DynamicCache()
        options = {cache_argument(causal_lm_of(lm)): cache, "use_cache": True, "adapter_names": names}
        causal_lm_of(lm).set_output_embeddings(torch.nn.Identity())  # nobody needs logits
        try:
            h = lm(input_ids=ids, **options).logits[:, -1:]
            for _ in range(T):
                h = lm(inputs_embeds=h, **options).logits
        finally:
            causal_lm_of(lm).set_output_embeddings(head)
        return cache

    def read(cache) -> dict:
        k = cache.layers[-1].keys.transpose(1, 2)  # [agents * questions, rows, heads, D]
        return {f"k{b}": k[b :: p.case.batch].flatten(0, 1) for b in range(p.case.batch)}

    return Trial(call, read)


PROVIDERS = {OURS: _ours(together=True), f"{OURS}, one by one": one_by_one, "PEFT's mixed batch": batch_of_peft}


def test_roles(bench, case):
    bench(case, problem, PROVIDERS)
