"""What is shown of a team, against plain PyTorch and transformers' own eager attention over the whole sequence."""

import copy
import math

import pytest
import systems
import tiny_systems as tiny
import torch
from models import assert_close, body, prefill, tokens
from models import tiny as tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffmas import Agent, MultiAgentSystem, unpatch_model
from diffmas.agents.gradient_report import norm_of
from diffmas.evaluation import TextAgents
from diffmas.evaluation.look import Block, Lane, Look, Step, look_at
from diffmas.evaluation.look.figures import rounded
from diffmas.evaluation.look.lens import lens, rows_with, texts_of
from diffmas.evaluation.look.watch import Watch
from diffmas.models.forward import forward
from diffmas.models.head import logits_of
from diffmas.models.patch import patch_of

QUESTION = systems.QUESTIONS[1]
OPTIONS = [
    {}, {"trace_content": "latent_only"}, {"realign": "soft_token", "trace_content": "latent_only", "sinks": 0},
    {"agents": [systems.Agent(a.name, a.prompt, a.latent_steps, reads=[] if i < 2 else None)
                for i, a in enumerate(systems.AGENTS)]},
    {"agents": [systems.Agent(a.name, a.prompt, a.latent_steps, passes=2 if i < 2 else None)
                for i, a in enumerate(systems.AGENTS)]},
]  # fmt: skip
IDS = ["all", "latent_only", "soft_token", "parallel", "passes"]


def eager(system):
    """A model of the same weights that transformers itself runs."""
    plain = copy.deepcopy(system.model)
    unpatch_model(plain)
    plain.get_base_model().set_attn_implementation("eager")
    return plain


def oracle(system, plain, question: str, answer: list[int]):
    """The whole episode as one sequence, recomputed for each step -> [(agent, kind, rows)], the states that went into latent
    steps, last hidden states, attention by layer [heads, n, n]."""
    embedding, x, owner, handed, spans, fed = body(plain).get_input_embeddings(), None, [], [], [], []
    parallel = system.agents[0].reads == ()

    def forward():
        n, who = len(owner), torch.tensor(owner)
        others = torch.tensor(handed)[None] & (torch.tensor([not parallel or w == 2 for w in owner])[:, None])
        sees = ((who[:, None] == who) | others).tril()
        mask = torch.zeros(n, n, dtype=x.dtype).masked_fill(~sees, torch.finfo(x.dtype).min)[None, None]
        places = torch.arange(n)[None]
        out = body(plain)(
            inputs_embeds=x[None], attention_mask=mask, position_ids=places, use_cache=False, output_attentions=True
        )  # fmt: skip
        return out.last_hidden_state[0], [a[0] for a in out.attentions]

    fields = system.fields_of([question])[0]
    for i, agent in enumerate(system.agents):
        last = i == len(system.agents) - 1
        prompt = system.prompt_ids(agent, fields)
        new = embedding(torch.tensor(prompt + (answer if last else [])))
        x = new if x is None else torch.cat((x, new))
        free = system.sinks - sum(handed)
        owner += [i] * len(new)
        handed += [system.trace_content == "all" or j < free for j in range(len(new))]
        spans.append((agent.name, "prompt", len(prompt)))
        if last:
            spans.append((agent.name, "answer", len(answer)))
            break
        T, states, start = agent.latent_steps, [], len(x)
        if agent.passes:
            h0 = forward()[0][-1:]
            owner += [i] * T
            handed += [True] * T
            h, before = h0.expand(T, -1), x
            for _ in range(agent.passes):
                states = torch.cat((h0, h[:-1])) if _ else h
                x = torch.cat((before, system.realign(states)))
                h = forward()[0][start:]
            states = list(states)
        for _ in range(0 if agent.passes else T):
            states.append(forward()[0][-1])
            x = torch.cat((x, system.realign(states[-1][None])))
            owner.append(i)
            handed.append(True)
        fed += states
        spans.append((agent.name, "latent", T))
    return spans, fed, *forward()


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "float32"])  # fused, generic, layers of few rows as one op
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_attention_and_states_against_eager_attention(family, options):
    if family == "float32":
        model = systems.with_lora(tiny_model("qwen3", torch.float32, patch=False))
        system = MultiAgentSystem(model, systems.tokenizer(), **{"agents": systems.AGENTS, **options})
    else:
        system = systems.system(family, **options)
    look = look_at(system, QUESTION, max_new_tokens=4)
    ids = system.generate_tokens([QUESTION], max_new_tokens=4, temperature=0.0, seed=0)[0][0]
    plain = eager(system)
    with torch.no_grad():
        spans, fed, h, attention = oracle(system, plain, QUESTION, ids)
    assert [(look.lanes[b.agent].name, b.kind, b.rows) for b in look.blocks] == spans
    # Attention: softmax rows, the mean over heads, summed over the rows of each block; the first row that is seen apart.
    start, unit, firsts, blocks = 0, 0, [], []
    for _, _, rows in spans:
        firsts.append(start)
        blocks += [len(firsts) - 1] * rows
        start += rows
    for b, (_, kind, rows) in enumerate(spans):
        part = range(firsts[b], firsts[b] + rows)
        for some in [[t] for t in part] if kind != "prompt" else [list(part)]:
            by_row = torch.stack([a.mean(0)[some].mean(0) for a in attention])  # [layers, n]
            torch.testing.assert_close(look.rows[unit].to(by_row), by_row.mean(0), rtol=0, atol=2e-5)
            first = int((by_row[0] > 0).nonzero()[0])
            want = torch.zeros(look.layers, 1 + len(spans), dtype=by_row.dtype)
            want.index_add_(1, 1 + torch.tensor(blocks), by_row)
            want[:, 1 + blocks[first]] -= by_row[:, first]
            want[:, 0] = by_row[:, first]
            torch.testing.assert_close(look.attention[unit].to(want), want, rtol=0, atol=2e-5)
            unit += 1
    assert unit == len(look.attention) == len(look.rows)
    # What latent steps and answers say.
    steps = [s for b in look.blocks if b.kind == "latent" for s in b.steps]
    answers = look.blocks[-1].steps
    head = plain.get_output_embeddings().weight
    states = [*fed, *h[-len(ids) - 1 : -1]]
    for step, state, token in zip([*steps, *answers], states, [None] * len(steps) + ids):
        p = (head @ state).softmax(-1)
        best = p.argsort(descending=True)[:8]
        assert [x for _, x in step.nearest] == pytest.approx(p[best].tolist(), abs=1e-4)
        assert step.nearest[0][0] == system.tokenizer.decode([int(best[0])])
        assert step.entropy == pytest.approx(float(torch.distributions.Categorical(p).entropy()), abs=1e-3)
        assert step.norm == pytest.approx(float(state.norm()), rel=1e-4)
        assert step.p == pytest.approx(float(p[best[0] if token is None else token]), abs=1e-4)
        assert step.text.strip() == system.tokenizer.decode([int(best[0]) if token is None else token])
        if token is None:
            assert step.embedding == pytest.approx(float(system.realign(state[None]).norm()), rel=1e-4)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, options", [
    ("qwen3", {}), ("cohere", {}), ("granite", {"logits_scaling": 4.0}),
    ("gemma2", dict(query_pre_attn_scalar=8, final_logit_softcapping=5.0)),
])  # fmt: skip
def test_the_lens_is_the_models_own_head(family, options):
    model = tiny_model(family, patch=False, **options)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    out = model(ids, output_hidden_states=True, use_cache=False)  # the last of these is after the norm
    assert_close(logits_of(model, out.hidden_states[-1][0]), out.logits[0])
    seen, log_p = lens(model, out.hidden_states[-1][0], 3, ids[0]), out.logits[0].log_softmax(-1)
    assert_close(seen.chosen.double(), log_p.exp().gather(1, ids.T)[:, 0])
    assert torch.equal(seen.ids, log_p.topk(3).indices)
    assert_close(seen.entropy.double(), -(log_p.exp() * log_p).sum(-1))


def test_the_lens_of_a_certain_state():
    """A probability of 0 adds nothing to the entropy."""

    class Head(torch.nn.Module):
        config = tiny.model().config

        def get_output_embeddings(self):
            return torch.nn.Linear(2, 3).requires_grad_(False)

    head = Head()
    layer = head.get_output_embeddings()
    layer.weight.copy_(torch.tensor([[0.0, 0], [-torch.inf, 0], [0, 0]]))
    layer.bias.zero_()
    head.get_output_embeddings = lambda: layer
    assert float(lens(head, torch.tensor([[1.0, 0.0]]), 5).entropy) == pytest.approx(math.log(2))


def bytes_tokenizer():
    """A token for each byte."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_texts_of_tokens_add_up():
    tokenizer, text = bytes_tokenizer(), "a naïve  汉字\n🔑."
    ids = tokenizer(text)["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert len(texts) == len(ids) > len(text) and "".join(texts) == text and "汉" in texts and "🔑" in texts
    assert "".join(texts_of(tokenizer, ids[:-2])).startswith(text[:-2])  # half a character at the end
    words = systems.tokenizer()
    assert "".join(texts_of(words, words("w3 w4 w5")["input_ids"])) == "w3 w4 w5"


def test_the_rows_of_a_part():
    texts = ["<s>", "user", "\n", "a b", "", " c", "</s>"]
    assert rows_with(texts, "a b c") == (3, 6) and rows_with(texts, "b") == (3, 4) and rows_with(texts, "<s>") == (0, 1)
    assert rows_with(texts, "x") is None and rows_with(texts, "") is None


def test_the_own_prompt_of_a_chat_template():
    system = tiny.system()
    tokenizer = system.tokenizer
    tokenizer.chat_template = "{% for m in messages %}key {{ m.content }} lamp{% endfor %}"
    system = MultiAgentSystem(system.model, tokenizer, tiny.agents())
    block = look_at(system, "where is the key", max_new_tokens=2).blocks[0]
    assert block.own == (1, 7) and "".join(block.texts[slice(*block.own)]).strip() == "plan : where is the key"
    assert look_at(tiny.system(), "where is the key", max_new_tokens=2).blocks[0].own is None


def test_who_attends_while_it_speaks():
    """The mean over what a lane says, step by step; over its prompt where it says nothing."""
    attention = torch.tensor([[[1.0, 0, 0, 0]], [[0.2, 0.8, 0, 0]], [[0.1, 0.4, 0.5, 0]], [[0, 0, 0.5, 0.5]]])
    blocks = [
        Block(0, "prompt", 0, 3, ["a", "b", "c"]), Block(1, "latent", 3, 2, ["", ""], [Step(), Step()]),
        Block(2, "prompt", 5, 1, ["d"]),
    ]  # fmt: skip
    look = Look("q", [], 1, [Lane(name) for name in "abcd"], blocks, attention)
    want = [[1, 0, 0, 0, 0], [0.15, 0.6, 0.25, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(look.between_lanes(), torch.tensor(want))
    torch.testing.assert_close(look.between_blocks(0)[1], torch.tensor([0.15, 0.6, 0.25, 0]))


def test_numbers_that_json_cannot_say():
    assert rounded({"a": [math.nan, math.inf, 1.23456, 3], "b": "x", "c": (None, 1e-9)}) == {
        "a": [None, None, 1.235, 3], "b": "x", "c": [None, 1e-9],
    }  # fmt: skip


# ---- a team ----------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_report():
    system = tiny.system()
    look = look_at(system, "where is the key", "in the garden", max_new_tokens=3)
    report = system.eval().gradient_report(["where is the key"], ["in the garden"])
    found = {(look.lanes[b.agent].name, b.kind): b for b in look.blocks}
    assert set(report.segments()) == {key for key, b in found.items() if b.gradient}
    for key, norm in report.segments().items():
        assert norm_of(found[key].gradient) == pytest.approx(norm) and norm > 0
    steps = [p for p in report.passes if (p.agent, p.kind) == ("planner", "latent")]
    assert [s.gradient for s in found["planner", "latent"].steps] == pytest.approx([norm_of(p.rows) for p in steps])
    facts = dict(look.facts)
    assert facts["right answer"] == "in the garden" and facts["its loss"] == f"{report.loss:.3g} nats a token"
    assert all(p.grad is None for p in system.parameters())
    system.requires_grad_(False)
    again = look_at(system, "where is the key", "in the garden", max_new_tokens=3)
    assert dict(again.facts)["gradient norm"].startswith("none") and not any(b.gradient for b in again.blocks)
    assert dict(again.facts)["its loss"] == facts["its loss"]


def test_text_agents_beside_latent_ones():
    system = tiny.system()
    look = look_at(system, "where is the key", text_agents=True, max_new_tokens=4)
    turns, answers = TextAgents(system, 4).write(["where is the key"], temperature=0.0, seed=0, max_new_tokens=4)
    assert [lane.message for lane in look.lanes] == [turn.texts[0].strip() for turn in turns]
    assert [lane.tokens for lane in look.lanes] == [turn.lengths[0] for turn in turns]
    assert dict(look.facts).get("answer of text agents", "") == answers.texts[0][0].strip()


def test_each_agent_speaks_by_its_own_head():
    """With adapters by role, LoRA on the head too: an agent that reads nobody first says what it alone would say next."""
    model = tiny_model("qwen3", torch.float32, patch=False, tie_word_embeddings=False)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    agents = OPTIONS[3]["agents"]
    model = get_peft_model(model, config, adapter_name=agents[0].name)
    for agent in agents[1:]:
        model.add_adapter(agent.name, config)
    system = MultiAgentSystem(model, systems.tokenizer(), agents, adapter_scope="per_role", realign="none").eval()
    blocks = look_at(system, QUESTION, max_new_tokens=2).blocks
    for agent, block in zip(agents[:2], (blocks[1], blocks[3])):
        model.set_adapter(agent.name)
        ids = torch.tensor([system.prompt_ids(agent, {"question": QUESTION})])
        best = model(ids, use_cache=False).logits[0, -1].softmax(-1).topk(3).values.tolist()
        assert [p for _, p in block.steps[0].nearest[:3]] == pytest.approx(best, rel=1e-3), agent.name


def test_attention_where_rows_are_let_go():
    """The prompts of agents that hand on latent rows alone are free for others after their turn: who reads nobody attends to
    itself, whatever lay in its rows before."""
    agents = [
        Agent("left", "plan : {question} in the garden , the cellar , the kitchen", 1, reads=[]),
        Agent("right", "notes : {question}", 1, reads=[]),
        Agent("solver", "question : {question} answer :", reads=["left", "right"]),
    ]  # fmt: skip
    system = MultiAgentSystem(tiny.model(), tiny.tokenizer(), agents, trace_content="latent_only", sinks=0)
    look = look_at(system, "where is the key", max_new_tokens=2)
    blocks = [(look.lanes[b.agent].name, b.kind) for b in look.blocks]
    own = {name: [b for b, (agent, _) in enumerate(blocks) if agent == name] for name, _ in blocks}
    own["solver"] += [blocks.index(("left", "latent")), blocks.index(("right", "latent"))]
    for (agent, _), shares in zip(blocks, look.between_blocks()):  # the first row apart
        elsewhere = [b for b in range(len(blocks)) if b not in own[agent]]
        assert float(shares[1:][elsewhere].sum()) == 0, agent


def test_agents_without_a_turn():
    system = tiny.system(latent_steps=0, middle=2, no_latents="skip")
    look = look_at(system, {"question": "where is the key"}, max_new_tokens=2)
    assert [(b.agent, b.kind) for b in look.blocks] == [(1, "prompt"), (1, "latent"), (2, "prompt"), (2, "answer")]
    assert look.between_lanes()[0].sum() == 0 and float(look.between_lanes()[1:].sum()) == pytest.approx(2, abs=1e-4)


def test_looking_changes_nothing():
    system = tiny.system().train()
    before = system.generate(["where is the key"], max_new_tokens=4, temperature=0)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in system.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    look_at(system, "where is the key", "in the garden", text_agents=True, max_new_tokens=4)
    assert torch.equal(state, torch.get_rng_state())
    assert system.training and system.model.training and system.together
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in system.modules()]
    assert system.generate(["where is the key"], max_new_tokens=4, temperature=0) == before
    with pytest.raises(ValueError, match="nearest: expected at least 1 token, got 0"):
        look_at(system, "where is the key", nearest=0)
    with pytest.raises(ZeroDivisionError), Watch(system):
        raise ZeroDivisionError
    assert system.together


@pytest.mark.parametrize("bits, most", [("int8", 0.008), ("fp8", 0.06), ("int4", 0.08)])
def test_attention_to_a_quantised_context(bits, most):
    """It is to the numbers that a reader has of its rows: shares of a whole, close to those of the rows as they were."""
    system = tiny.system().eval()
    with torch.no_grad():
        context = prefill(system.model, torch.tensor([3, 4, 5, 6]))
    fields, found = [{"question": "where is the key"}], []
    for trace in (context.fork(1)[0], context.quantize(bits)):
        with Watch(system) as watch:
            system.communicate(fields, trace=trace)
        found.append([p.weights[layer] for p in watch.passes for layer in (0, 1)])
    for plain, quantised in zip(*found, strict=True):
        assert plain.shape == quantised.shape and float((quantised.sum(-1) - 1).abs().max()) < 1e-5
        assert 0 < float((plain - quantised).abs().max()) < most


def test_attention_is_told_where_sequences_share_rows():
    """A pass that reads shared rows at once has no query that sees all of its view: it goes the other way when watched."""
    model = tiny_model("llama", torch.float32, max_position_embeddings=4096)
    trace = prefill(model, *tokens(2200)).select([0, 0])
    told = []
    forward_pass = trace.plan([1, 1], "text")
    assert forward_pass.on(torch.device("cpu")).as_written["shared"] is not None
    forward_pass.work.attended = lambda layer, q, o, lse, kv, parts, *rest: told.append((layer, q.shape[0], len(parts)))
    patch = patch_of(model)
    with torch.no_grad():
        forward(patch, trace, forward_pass, input_ids=torch.tensor([[3, 4]]))
    assert [layer for layer, _, _ in told] == [0, 1, 2] and {n for _, n, _ in told} == {2}


# ---- a saved trace ---------------------------------------------------------------------------------------------------


def saved(tmp_path):
    system = tiny.system()
    trace = system.eval().communicate([{"question": "where is the key"}, {"question": "where is the lamp"}]).detach()
    trace.save(tmp_path / "trace.safetensors")
    return trace, tmp_path / "trace.safetensors"
