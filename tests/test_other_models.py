"""Teams with agents of another model, against a plain loop with transformers' caches, in float64."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from loops import check_checkpointing, check_compiled, loop_loss
from models import assert_close, gradients
from systems import ANSWERS, QUESTIONS, tokenizer
from two_models import forward, pair, pieces, projected, think, turn

import diffmas
from diffmas import Agent, MultiAgentSystem
from diffmas.agents.member import Other
from diffmas.agents.projector import Fuser, Projector
from diffmas.training import Trainer, default_arguments

TIGHT = 1e-9
EXPERT = Agent("expert", "w5 {question} w6", 3, model="small")
SOLVER = Agent("solver", "w9 {question}")
SHAPES = {
    "one": [EXPERT, SOLVER],
    "prompts": [Agent("expert", "w5 {question}", 0, model="small"), SOLVER],
    "two and an own": [
        Agent("a", "w5 {question}", 2, model="small", reads=[]), Agent("b", "{question} w7", 1, model="small", reads=[]),
        Agent("own", "w8 {question}", 2, reads=["b"]), Agent("solver", "w9 {question}", reads=["a", "own", "b"]),
    ],
    "a chain of theirs": [
        Agent("a", "w5 {question}", 2, model="small", reads=[]), Agent("b", "{question} w7", 2, model="small", reads=["a"]),
        Agent("solver", "w9 {question}", reads=["b"]),
    ],
    "own first": [Agent("own", "w8", 1), EXPERT, SOLVER],
}  # fmt: skip


def randomized(module, seed=11):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return module


def others_of(sharer, receiver, kind=Projector, realign="ridge", **options):
    for model in (sharer, receiver):
        diffmas.patch_model(model)
    projector = kind(sharer, receiver, **options)
    projector = projector.double() if receiver.dtype == torch.float64 else projector
    return {"small": Other(sharer, pieces(), randomized(projector), realign)}


def team(agents=SHAPES["one"], projector=None, models=None, **options):
    sharer, receiver = models or pair()
    others = others_of(sharer, receiver, **(projector or {}))
    return MultiAgentSystem(receiver, tokenizer(), agents, others=others, **{"sinks": 0, **options})


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Loop:
    """One question: what each agent hands on is kv by layer, [1, H, n, D], and the positions that its keys are turned to."""

    def __init__(self, s, question):
        self.s, self.fields, self.handed = s, s.fields_of([question])[0], {}
        for i, agent in enumerate(s.agents[:-1]):
            self.handed[agent.name] = self.turn(i)

    def turn(self, i):
        s, agent = self.s, self.s.agents[i]
        member, (kv, at) = s.writer(agent), self.read(i)
        past, ids = (kv[0][0].shape[2] if kv else 0), self.inputs(agent)
        steps = agent.steps(self.fields)
        kv = think(member.model, ids, steps, member.realign, kv, at)
        keep = torch.arange(len(ids) + steps)
        if s.trace_content == "latent_only" and not torch.is_tensor(ids):
            keep = keep[(keep >= len(ids)) | (keep < s.sinks)]
        return [tuple(x[:, :, past:][:, :, keep] for x in layer) for layer in kv], keep + at

    def inputs(self, agent):
        """The ids of a prompt, or what stands for its tokens, [n, hidden]."""
        return self.s.prompt_ids(agent, self.fields)

    def names(self, i):
        """Of those whose rows agent i reads."""
        agent, s = self.s.agents[i], self.s
        if agent.reads is not None:
            return [read.agent for read in agent.reads]
        return [a.name for a in s.agents[:i] if s.writer(agent) in (s, s.writer(a))]

    def read(self, i):
        """kv of what agent i reads, each behind the one before, and the next position."""
        agent, s, units, end = self.s.agents[i], self.s, [], 0
        writers = {a.name: s.writer(a) for a in s.agents}
        for name in self.names(i):
            kv, positions = self.handed[name]
            if writers[name] is not s.writer(agent):
                other = writers[name]
                kv = projected(other.projector, other.model, s.model, kv, positions)
            move = end - int(positions.min())
            units.append([(turn(k, [move] * k.shape[2], s.writer(agent).model), v) for k, v in kv])
            end = int(positions.max()) + move + 1
        return [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(*units)], end

    def logits(self, ids):
        s = self.s
        kv, at = self.read(len(s.agents) - 1)
        x = s.model.get_input_embeddings()(torch.tensor(s.prompt_ids(s.agents[-1], self.fields) + ids))
        return forward(s.model, s.model, kv, x, at)[0].logits[0][-len(ids) - 1 :]


# ---- loss, gradients, tokens -----------------------------------------------------------------------------------------


# Not of "prompts", which would hand on nothing; sinks where nobody has some of what it read, which the loop does not know.
LATENT = dict(trace_content="latent_only")
LOSSES = [(shape, {}) for shape in SHAPES] + [(shape, LATENT) for shape in SHAPES if shape != "prompts"]
LOSSES += [(shape, {**LATENT, "sinks": 2}) for shape in ("one", "own first")]


@pytest.mark.parametrize(("shape", "options"), LOSSES, ids=str)
def test_loss_and_every_gradient_equal_the_loop(shape, options):
    s = team(SHAPES[shape], {"hidden": 9} if shape == "one" else None, **options)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = loop_loss(s, Loop)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    want = gradients(s)
    # What nobody uses has zeros in one and no gradient in the other, as a last layer's queries without latent steps.
    got = {name: x for name, x in got.items() if name in want or x.any()}
    assert_close(got, want, TIGHT)
    for part in ("others.small.model.", "others.small.projector.", "model."):
        assert any(name.startswith(part) for name in got)


def greedy(s, question, count, loop=Loop):
    ids, end = [], s.tokenizer.eos_token_id
    while len(ids) < count and ids[-1:] != [end]:
        ids.append(int(loop(s, question).logits(ids)[-1].argmax()))
    return ids


@pytest.mark.parametrize("shape", ["one", "two and an own"])
def test_greedy_tokens_and_single_runs(shape):
    s = team(SHAPES[shape])
    with torch.no_grad():
        want = [greedy(s, question, 5) for question in QUESTIONS]
    got = s.generate_tokens(QUESTIONS, max_new_tokens=5, temperature=0)
    assert [tokens for (tokens,) in got] == want
    for question, answer, tokens in zip(QUESTIONS, ANSWERS, got):
        assert s.generate_tokens([question], max_new_tokens=5, temperature=0) == [tokens]
        assert_close(s([question], [answer]).loss, loop_loss(s, Loop, [question], [answer]), TIGHT)


def test_answers_to_one_question_share_the_rows():
    s = team()
    questions, answers = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]], ANSWERS
    s(questions, answers, share=True).loss.backward()
    got = gradients(s)
    s(questions, answers).loss.backward()
    assert_close(got, gradients(s), TIGHT)


def test_some_of_their_rows():
    """Selected as an own agent's; by what is in them, as the reader's model has them."""
    latents = [EXPERT, Agent("solver", "w9 {question}", reads=[{"agent": "expert", "select": {"kind": "latent"}}])]
    s, want = team(latents), team(trace_content="latent_only")
    s(QUESTIONS, ANSWERS).loss.backward()
    want(QUESTIONS, ANSWERS).loss.backward()
    assert_close(gradients(s), gradients(want), TIGHT)
    for by in ("similarity", "attention"):
        some = [EXPERT, Agent("solver", "w9 {question}", reads=[{"agent": "expert", "select": {"rows": 2, "by": by}}])]
        trace = (s := team(some)).communicate(s.fields_of(QUESTIONS))
        assert trace.lengths == [2, 2, 2] and {x.agent for x in trace.segments} == {"expert"}
    budget = team([EXPERT, Agent("solver", "w9 {question}", max_rows=3)])
    assert budget.communicate(budget.fields_of(QUESTIONS)).lengths == [3, 3, 3]


def test_an_agent_without_a_turn_is_read_as_nothing():
    agents = [Agent("expert", "w5 {question}", "T", model="small"), SOLVER]
    s = team(agents, no_latents="skip")
    out = s([{"question": QUESTIONS[0], "T": 0}, {"question": QUESTIONS[1], "T": 2}], ANSWERS[:2])
    alone = MultiAgentSystem(s.model, s.tokenizer, [SOLVER], sinks=0)([QUESTIONS[0]], ANSWERS[:1])
    assert_close(out.logits[0, : alone.logits.shape[1]], alone.logits[0], TIGHT)
    nobody = s([{"question": QUESTIONS[0], "T": 0}], ANSWERS[:1])
    assert_close(nobody.loss, alone.loss, TIGHT)


@pytest.mark.parametrize("scope", [dict(grad_scope="detach_trace"), dict(grad_scope="last_k", last_k=1)], ids=str)
def test_the_projector_learns_where_agents_do_not(scope):
    s = team(**scope)
    s(QUESTIONS, ANSWERS).loss.backward()
    got = gradients(s)
    loop_loss(s, Loop).backward()
    want = {name: x for name, x in gradients(s).items() if not name.startswith("others.small.model.")}
    assert_close(got, want, TIGHT)


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(team().train())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(team(SHAPES["two and an own"]))


def test_rows_have_the_dtype_of_the_receivers_layers():
    """Under autocast, and with a projector of another dtype than the models."""
    s = team(models=pair("llama", dtype=torch.bfloat16))
    assert s.others["small"].projector.keys[0][0].weight.dtype == torch.float32
    assert s(QUESTIONS, ANSWERS).loss.isfinite()
    s = team(models=pair(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        s(QUESTIONS, ANSWERS).loss.backward()
    assert all(x.isfinite().all() for x in gradients(s).values())


# ---- files, training -------------------------------------------------------------------------------------------------


def moved(s):
    with torch.no_grad():
        for p in s.parameters():
            if p.requires_grad:
                p.add_(0.05)
    return s


@pytest.mark.parametrize("projector", [{}, {"hidden": 5, "layers": "depth"}], ids=str)
def test_a_team_is_saved_and_loaded(projector, tmp_path):
    s = team(projector={**projector, "realign": "learned"})
    s.save_pretrained(tmp_path)
    base = [model.unload() for model in pair()]
    loaded = MultiAgentSystem.from_pretrained(
        tmp_path, base[1], others={"small": base[0]}, trainable=True
    )  # fmt: skip
    assert loaded.describe() == s.describe() and loaded.others["small"].projector.layers == s.others["small"].projector.layers
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in s.state_dict().items())
    moved(s)(QUESTIONS, ANSWERS).loss.backward()
    s.zero_grad()
    assert not torch.equal(s(QUESTIONS, ANSWERS).loss, loaded(QUESTIONS, ANSWERS).loss)
    s.load_weights(tmp_path)
    assert_close(s(QUESTIONS, ANSWERS).loss, loaded(QUESTIONS, ANSWERS).loss, TIGHT)
    assert s.generate(QUESTIONS, max_new_tokens=4, temperature=0) == loaded.generate(QUESTIONS, max_new_tokens=4, temperature=0)


def test_damaged_files_change_nothing(tmp_path):
    s = team()
    s.save_pretrained(tmp_path / "good")
    moved(s)
    before = {name: x.clone() for name, x in s.state_dict().items()}
    small = "others/small/"
    for name, damage, message in (
        (small + "projector.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "expected a whole safetensors file"),
        (small + "projector.safetensors", lambda f: f.unlink(), "expected a file of weights, found none"),
        (small + "adapter_model.safetensors", lambda f: f.write_bytes(b"x"), "expected a whole safetensors file"),
        (small + "other.json", lambda f: f.unlink(), "expected this file, found none"),
        (small + "other.json", lambda f: f.write_text(f.read_text().replace('"tokenizer": "', '"tokenizer": "0')), "tokenizer"),
        (small + "other.json", lambda f: f.write_text(f.read_text().replace('print": "', 'print": "0')), "fingerprint"),
        (small + "other.json", lambda f: f.write_text("{}"), "expected the keys"),
        (
            "agents.json",
            lambda f: f.write_text(f.read_text().replace('"kind": "projector"', '"kind": "c2c"')),
            "expected others",
        ),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        damage(tmp_path / "bad" / name)
        with pytest.raises(ValueError, match=message):
            s.load_weights(tmp_path / "bad")
        state = s.state_dict()
        assert all(torch.equal(x, state[key]) for key, x in before.items())


def test_loading_refuses_what_does_not_fit(tmp_path):
    s = team()
    s.save_pretrained(tmp_path)
    base = [model.unload() for model in pair()]
    with pytest.raises(ValueError, match=r"others: expected some of \['small'\], got 'large'"):
        MultiAgentSystem.from_pretrained(tmp_path, base[1], others={"large": base[0]})
    base = [model.unload() for model in pair()]
    with pytest.raises(ValueError, match="names none"):
        MultiAgentSystem.from_pretrained(tmp_path, base[1])
    base = [model.unload() for model in pair()]
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(tmp_path, base[1], others={"small": pair()[1].unload()})
    described = json.loads((tmp_path / "agents.json").read_text())
    described["others"]["small"]["projector"]["layers"] = [0]
    (tmp_path / "agents.json").write_text(json.dumps(described))
    base = [model.unload() for model in pair()]
    with pytest.raises(ValueError, match="agents.json: others, 'small': layers: expected"):
        MultiAgentSystem.from_pretrained(tmp_path, base[1], others={"small": base[0]})


@pytest.mark.parametrize("lora", [True, False])
def test_a_trainer_trains_all_that_is_trained(lora, tmp_path):
    """Without adapters the projector alone; a run that was resumed ends as one that was not."""
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS)] * 4

    def trained(name, steps, resume=False):
        torch.manual_seed(0)
        s = team(models=pair(lora=lora, dtype=torch.float32))
        arguments = default_arguments(
            tmp_path / name, max_steps=steps, save_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=3,
            gradient_accumulation_steps=1, learning_rate=1e-2, warmup_steps=0, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(s, arguments, train_dataset=rows)
        before = {n: p.detach().clone() for n, p in s.named_parameters()}
        trainer.train(resume_from_checkpoint=resume or None)
        return s, {n for n, p in s.named_parameters() if not torch.equal(p, before[n])}

    s, changed = trained("whole", 4)
    parts = {"others.small.projector."} | ({"others.small.model.", "model."} if lora else set())
    assert {
        part for part in ("others.small.projector.", "others.small.model.", "model.") for n in changed if n.startswith(part)
    } == parts
    assert all("lora_" in n or ".projector." in n for n in changed)
    trained("cut", 2)
    again, _ = trained("cut", 4, resume=True)
    state = again.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in s.state_dict().items())


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    sharer, receiver = pair()
    others = others_of(sharer, receiver)

    def refused(message, agents=SHAPES["one"], others=others, model=receiver, **options):
        with pytest.raises(ValueError, match=message):
            MultiAgentSystem(model, tokenizer(), agents, others=others, **options)

    refused(r"agent 'expert': model: expected None or one of \[\], got 'small'", others={})
    refused("others: expected an agent whose model is 'small', got none", agents=[SOLVER])
    refused("agent 'expert': model: expected None for who answers, got 'small'", agents=[EXPERT])
    own = Agent("own", "w4", 1)
    refused(
        "agent 'expert': reads: expected agents of its own model 'small', got 'own' of None",
        agents=[own, Agent("expert", "w5", 1, model="small", reads=["own"]), SOLVER],
    )
    refused("others: expected names of letters, digits, - and _, got 'a.b'", others={**others, "a.b": others["small"]})
    refused("others: expected names of letters, digits, - and _, got 'keys'", others={**others, "keys": others["small"]})
    refused("others: expected 'small' as an Other or Encoder, got PeftModel", others={"small": sharer})
    message = "others, 'small': projector: expected one that was made for this receiver"
    refused(message, model=diffmas.patch_model(pair()[1]))
    refused("adapter_scope: 'per_role' needs an adapter for every role", adapter_scope="per_role")
    with pytest.raises(ValueError, match="agent 'x': model: expected the name of another model or None, got ''"):
        Agent("x", "w5", model="")
    chooses = Agent("b", "w5", 1, model="small", reads=[{"agent": "expert", "select": {"rows": 1}}])
    message = "agent 'b': expected no select and no max_rows with another model, got some"
    refused(message, agents=[EXPERT, chooses, SOLVER])
    message = "agent 'expert': max_message_tokens: expected None with another model, got 4"
    refused(message, agents=[replace(EXPERT, max_message_tokens=4), SOLVER])
    message = "agent 'expert': quantized: expected None with another model, got 'int8'"
    refused(message, agents=[replace(EXPERT, quantized="int8"), SOLVER])
    mine = Other(receiver, tokenizer(), Projector(receiver, receiver))
    refused("others, 'small': model: expected another than the system's, got the same", others={"small": mine})
    s = team(models=(sharer, receiver))
    with pytest.raises(ValueError, match="gradient_report: expected agents of one model"):
        s.gradient_report(QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="questions\\[0\\], agent 'expert': expected its prompt and 3 latent steps to fit"):
        s.others["small"].model.config.max_position_embeddings = 5
        s(QUESTIONS, ANSWERS)


def test_a_model_without_an_adapter_is_frozen():
    s = team(models=pair(lora=False))
    assert not any(p.requires_grad for p in s.others["small"].model.parameters())
    assert all(p.requires_grad for p in s.others["small"].projector.parameters())
    assert Fuser.fuses and not Projector.fuses
