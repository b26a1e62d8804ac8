"""What a system is asked: prompts, and bad input."""

import pytest
from models import tiny
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer
from transformers import GenerationConfig

from diffmas import Agent, MultiAgentSystem, Trace

# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_agents_can_see_different_fields():
    agents = [Agent("reader", "w5 {facts}", latent_steps=1), Agent("solver", "w9 {question}")]
    s = system(agents=agents)
    rows = [{"question": "w10", "facts": "w30 w31"}, {"question": "w11", "facts": "w32"}]
    assert s(rows, ["w20", "w21"]).trace.lengths == [3 + 1 + 4, 2 + 1 + 4]
    message = r"agent 'reader': its prompt needs the field \{facts\}, the question has \['question'\]"
    with pytest.raises(ValueError, match=message):
        s(["w10"], ["w20"])


def test_chat_template_and_system_message():
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ 'w2 ' if m.role == 'system' else 'w3 ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w4{% endif %}"
    )
    s = MultiAgentSystem(tiny("qwen3"), tok, [Agent("solver", "w9 {question}", system="w40")])
    assert s.prompt_ids(s.agents[0], {"question": "w10"}) == [2, 40, 3, 9, 10, 4]
    plain = MultiAgentSystem(tiny("qwen3"), tok, [Agent("solver", "w9 {question}")], chat_template=False)
    assert plain.prompt_ids(plain.agents[0], {"question": "w10"}) == [9, 10]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s([]), "questions: expected at least one question"),
        (lambda s: s("w10"), "questions: expected a list, got one str"),
        (lambda s: s([3]), "questions: expected strings or dicts"),
        (lambda s: s(QUESTIONS, ["w1"]), "answers: expected one for each of 3 questions, got 1"),
        (lambda s: s(["w10", "w11"], "ab"), "answers: expected a list, got one str"),
        (lambda s: s(["w10"], [None]), "answers: expected strings or lists of token ids, got NoneType"),
        (lambda s: s(["w10"], ["w20 " * 600]), "answer to fit in the context of 512 positions"),
        (lambda s: s(["w10 " * 600]), "'planner': expected its prompt and 3 latent steps to fit"),
        (lambda s: s.generate([]), "questions: expected at least one question"),
        (lambda s: s.generate(["w10"], max_new_tokens=600), "to fit in the context"),
        (lambda s: s.generate(["w10"], max_new_tokens=0), "max_new_tokens: expected at least 1"),
        (lambda s: s.generate(["w10"], temperature=-1), "temperature: expected 0 or more"),
        (lambda s: s.generate(["w10"], top_p=0), "top_p: expected a number in"),
        (lambda s: s.generate(["w10"], stop="x"), "stop: expected a list"),
        (lambda s: s.generate(["w10"], samples=0), "samples: expected at least 1"),
        (lambda s: s.generate(["w10"], tok_k=5), "options: expected names of .*, got 'tok_k'"),
        (lambda s: s.generate(["w10"], use_cache=False), "options: expected names of .*, got 'use_cache'"),
        (lambda s: s.generate(["w10"], assistant_model=s.model), "options: expected names of .*, got 'assistant_model'"),
        (lambda s: s.generate(["w10"], generation_config=GenerationConfig(output_scores=True)), "got 'output_scores'"),
        (lambda s: s.generate(["w10"], generation_config={}), "generation_config: expected a GenerationConfig, got dict"),
        (lambda s: s.generate(["w10"], max_length=9), "max_length: expected max_new_tokens"),
        (lambda s: s.generate(["w10"], stop=["x"], stop_strings=["y"]), "stop_strings: expected it under one name"),
        (lambda s: s.generate(["w10"], samples=2, num_return_sequences=2), "num_return_sequences: expected it under one"),
        (lambda s: s.generate(["w10"], temperature=1.0, top_k=-1), "top_k"),
        (lambda s: s.generate(["w10"], num_beams=2, samples=3), "num_return_sequences"),
        (lambda s: Agent("a", "x", latent_steps=True), "latent_steps: expected an integer >= 0, the name .*, got True"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, AGENTS, sinks=True), "sinks: expected an integer >= 0, got True"),
        (lambda s: Agent("a", "x", latent_steps=-1), "latent_steps: expected an integer >= 0, the name .*, got -1"),
        (lambda s: Agent("", "x"), "name: expected a name"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, []), "agents: expected at least one"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, [AGENTS[0]] * 2), "agents: expected distinct names"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, AGENTS, grad_scope="half"), "grad_scope: expected one of"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, AGENTS, grad_scope="last_k"), "last_k: expected 1 to 3"),
        (lambda s: MultiAgentSystem(s.model, s.tokenizer, AGENTS, adapter_scope="per_role"), "needs an adapter for every"),
        (lambda s: Trace(s.model, batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_bad_input(call, message):
    s = system()
    with pytest.raises(ValueError, match=message):
        call(s)
    assert s(QUESTIONS, ANSWERS).loss.isfinite()  # and nothing is broken afterwards
