"""Rows that are fused with those of another model (C2C), against the published formulas in a plain loop, in float64."""

import math

import pytest
import test_other_models
import torch
from loops import check_checkpointing, check_compiled, check_ragged, loop_loss
from models import assert_close, gradients
from systems import ANSWERS, QUESTIONS, tokenizer
from test_other_models import TIGHT, greedy, moved, randomized, team
from two_models import pair, turn

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.alignment import aligned, partners
from diffmas.agents.member import Other
from diffmas.agents.projector import Fuser, Projector
from diffmas.evaluation.c2c_baseline import C2C

SIZES = dict(kind=Fuser, hidden=12, inner=9, depth=2, dropout=0.0)
AGENTS = [
    Agent("sharer", "w5 {question} w6", model="small"), Agent("receiver", "w5 {question} w6", reads=["sharer"]),
    Agent("solver", "w9", reads=["receiver"]),
]  # fmt: skip
# What a receiver and a sharer have read stands before them, at each question's own positions.
AMONG = [
    Agent("before", "w4", "before", reads=[]), Agent("theirs", "w7 {question}", "theirs", model="small", reads=[]),
    Agent("sharer", "w5 {question} w6", 1, model="small", reads=["theirs"]),
    Agent("receiver", "w5 {question} w6", reads=["before", "sharer"]), Agent("thinker", "w8", "think", reads=["receiver"]),
    Agent("solver", "w9", reads=["before", "receiver", "thinker"]),
]  # fmt: skip
TURNS = [{"question": q, "before": 1, "theirs": t, "think": n} for q, t, n in zip(QUESTIONS, (0, 2, 1), (2, 0, 3))]


def fusing(agents=AGENTS, projector=None, models=None, gate=1.0, **options):
    s = team(agents, {**SIZES, **(projector or {})}, models, **options)
    for name, p in s.others["small"].projector.named_parameters():
        if name.endswith("gate"):
            p.data.fill_(gate)
    return s


# ---- the oracle ------------------------------------------------------------------------------------------------------


def block(x, module):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * module.norm.weight
    y = y @ module.up.weight.T
    return x + (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))) @ module.down.weight.T


def fusion(module, theirs, own, temperature=None):
    """own [n, H, D] with what C2C adds; temperature: of training."""
    linear = lambda x, m: x @ m.weight.T + m.bias  # noqa: E731
    x = block(linear(torch.cat((theirs.flatten(1), own.flatten(1)), -1), module.enter[0]), module.enter[1])
    y = x
    for one in module.project[:-1]:
        y = block(y, one)
    y = linear(y, module.project[-1]).view(own.shape)
    weight = 1 / (1 + torch.exp(-linear(block(x, module.weigh[0]), module.weigh[1])))
    if temperature is None:
        gate = float(module.gate > 0)
    else:
        u = torch.rand(weight.shape, dtype=weight.dtype)
        gate = 1 / (1 + torch.exp(-(module.gate - torch.log(-torch.log(u))) / temperature))
    return own + (gate * weight)[..., None] * y


class Loop(test_other_models.Loop):
    """Who reads an agent whose rows are fused has its own forward's rows, and hands on others."""

    def fuses(self, i):
        """The agent whose rows are fused with those of agent i, if there is one."""
        agents = {a.name: a for a in self.s.agents}
        theirs = [name for name in super().names(i) if agents[name].model != self.s.agents[i].model]
        return agents[theirs[0]] if theirs else None

    def names(self, i):
        return [name for name in super().names(i) if self.fuses(i) is None or name != self.fuses(i).name]

    def turn(self, i):
        own, at = super().turn(i)
        sharer, agent, small = self.fuses(i), self.s.agents[i], self.s.others["small"]
        if sharer is None:
            return own, at
        theirs, written = self.handed[sharer.name]
        of = partners(self.s, agent, sharer, self.fields)[: len(at)]
        here, there = torch.tensor([(t, j) for t, j in enumerate(of) if j >= 0]).T
        made = []
        for n, layer in enumerate(small.projector.layers):
            k, v = own[n]
            if layer is not None:
                moved_k = turn(theirs[layer][0][:, :, there], at[here] - written[there], small.model)
                pairs = (
                    (small.projector.keys[str(n)], moved_k, k),
                    (small.projector.values[str(n)], theirs[layer][1][:, :, there], v),
                )
                flat = lambda x: x[0].transpose(0, 1)  # noqa: E731
                k, v = (
                    x.index_copy(2, here, fusion(f, flat(y), flat(x[:, :, here])).transpose(0, 1)[None]) for f, y, x in pairs
                )
            made.append((k, v))
        return made, at


# ---- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_published_formulas(training):
    s = fusing()
    fuser = s.others["small"].projector.train(training)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, shape: torch.randn(n, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    theirs, own = ([(draw(5, x), draw(5, x)) for x in shapes] for shapes in (fuser.sharer_rows, fuser.receiver_rows))
    positions = torch.arange(5)
    fuser.anneal(0.5)
    torch.manual_seed(3)
    got = fuser(theirs, own, positions, positions)
    torch.manual_seed(3)
    assert fuser.layers == [None, 0, 1] and fuser.temperature == pytest.approx(math.sqrt(1e-3))
    for i, layer in enumerate(fuser.layers):
        for maps, x, y, z in zip((fuser.keys, fuser.values), got[i], own[i], theirs[layer or 0]):
            want = y if layer is None else fusion(maps[str(i)], z, y, fuser.temperature if training else None)
            assert_close(x, want, TIGHT)


def test_the_gate_is_closed_until_it_has_learned():
    s = fusing(gate=0.0)
    alone = MultiAgentSystem(s.model, s.tokenizer, [Agent("one", "w5 {question} w6 w9")], sinks=0)
    assert_close(s(QUESTIONS, ANSWERS).loss, alone(QUESTIONS, ANSWERS).loss, TIGHT)
    assert (s.train()(QUESTIONS, ANSWERS).loss - alone(QUESTIONS, ANSWERS).loss).abs() > 1e-3


def test_the_temperature_falls():
    fuser = fusing().others["small"].projector
    temperatures = []
    for share in (0.0, 0.5, 1.0):
        fuser.anneal(share)
        temperatures.append(fuser.temperature)
    assert temperatures == pytest.approx([1.0, 0.001**0.5, 0.001])


# ---- which token goes with which -------------------------------------------------------------------------------------


def test_tokens_are_aligned_by_their_characters():
    assert aligned([(0, 2), (3, 6)], [(0, 2), (3, 5), (5, 6)]) == [0, 1]
    assert aligned([(0, 2), (3, 6)], [(0, 1), (1, 2), (3, 6)]) == [1, 2]  # as long: the last
    assert aligned([(0, 0), (0, 2), (2, 6)], [(0, 0), (0, 6)]) == [-1, 1, 1]  # what is no part of the prompt
    assert aligned([(2, 2), (3, 4)], [(0, 2)]) == [-1, -1]


def test_partners_of_two_tokenizers():
    s, fields = fusing(), {"question": "w10 w11"}
    assert s.prompt_ids(s.agents[1], fields) == [5, 10, 11, 6]
    theirs = s.others["small"].tokenizer.convert_ids_to_tokens(s.prompt_ids(s.agents[0], fields))
    assert theirs == ["w5", "w1", "##0", "w1", "##1", "w6"]
    assert partners(s, s.agents[1], s.agents[0], fields) == [0, 1, 3, 5]


def test_partners_behind_a_chat_template():
    s = fusing()
    for member in (s, s.others["small"]):
        member.tokenizer.chat_template = "w2 {{ messages[0].content }} w3"
    s.others["small"].chat_template = True
    assert partners(s, s.agents[1], s.agents[0], {"question": "w7"}) == [1, 2, 3]
    s.chat_template = True
    assert partners(s, s.agents[1], s.agents[0], {"question": "w7"}) == [-1, 1, 2, 3, -1]
    s.others["small"].tokenizer = s.tokenizer
    assert partners(s, s.agents[1], s.agents[0], {"question": "w7"}) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prompt", ["w5 {question}\n", "  w5 {question}", "\n w5 {question} \n"], ids=repr)
def test_partners_where_a_chat_template_strips_the_prompt(prompt):
    s = fusing([Agent("sharer", prompt, model="small"), Agent("receiver", prompt, reads=["sharer"]), AGENTS[2]])
    fields = {"question": "w10 w11"}
    for member, front in ((s, "w2 w3"), (s.others["small"], "w2")):  # of different length
        member.tokenizer.chat_template = front + " {{ messages[0].content | trim }} w4"
        member.chat_template = True
    receiver, sharer = s.agents[1], s.agents[0]
    assert s.prompt_ids(receiver, fields) == [2, 3, 5, 10, 11, 4]
    assert len(s.prompt_ids(sharer, fields)) == 7  # w2 w5 w1 ##0 w1 ##1 w4
    assert partners(s, receiver, sharer, fields) == [-1, -1, 1, 2, 4, -1]
    s.tokenizer.chat_template = "{{ messages[0].content | upper }}"
    message = "agent 'receiver': chat_template: expected it to keep the prompt .*w10 w11.*, got '.*W10 W11"
    with pytest.raises(ValueError, match=message):
        partners(s, receiver, sharer, fields)


# ---- in a team -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [False, True], ids=["two tokenizers", "one tokenizer"])
@pytest.mark.parametrize("layers", ["terminal", "depth", [1, None, 0]], ids=str)
def test_loss_and_every_gradient_equal_the_loop(equal, layers):
    s = fusing(projector={"layers": layers})
    if equal:
        s.others["small"].tokenizer = s.tokenizer
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = loop_loss(s, Loop)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    want = gradients(s)
    got = {name: x for name, x in got.items() if name in want or x.any()}
    assert_close(got, want, TIGHT)
    for part in ("others.small.model.", "others.small.projector.keys.2.", "model."):
        assert any(name.startswith(part) for name in got)


def test_greedy_tokens_and_single_runs():
    s = fusing()
    with torch.no_grad():
        want = [greedy(s, question, 5, Loop) for question in QUESTIONS]
    got = s.generate_tokens(QUESTIONS, max_new_tokens=5, temperature=0)
    assert [tokens for (tokens,) in got] == want
    for question, tokens in zip(QUESTIONS, got):
        assert s.generate_tokens([question], max_new_tokens=5, temperature=0) == [tokens]


def test_fused_rows_among_others():
    """What the receiver itself has read stays before its fused rows; a second reader takes latent steps on them."""
    s = fusing(AMONG)
    trace = s.communicate(s.fields_of(TURNS))
    assert [x.agent for x in trace.segments if x.sequence == 0] == ["before", "before", "receiver", "thinker", "thinker"]
    s(TURNS, ANSWERS).loss.backward()
    got = gradients(s)
    want = loop_loss(s, Loop, TURNS)
    want.backward()
    assert_close(s(TURNS, ANSWERS).loss, want, TIGHT)
    want = gradients(s)
    got = {name: x for name, x in got.items() if name in want or x.any()}
    assert_close(got, want, TIGHT)
    assert max(x.abs().max() for name, x in got.items() if name.startswith("others.small.model.")) > 1e-6
    with torch.no_grad():
        tokens = [greedy(s, row, 3, Loop) for row in TURNS]
    assert [row[0] for row in s.generate_tokens(TURNS, max_new_tokens=3, temperature=0)] == tokens


def test_ragged_batches_equal_single_runs():
    check_ragged(fusing(AMONG), TURNS)


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(fusing(AMONG).train(), TURNS)


def test_compiled_layers_give_the_same_gradients():
    check_compiled(fusing().train())


def test_a_fused_team_is_saved_and_loaded(tmp_path):
    s = fusing()
    s.save_pretrained(tmp_path)
    base = [model.unload() for model in pair()]
    loaded = MultiAgentSystem.from_pretrained(tmp_path, base[1], others={"small": base[0]})
    assert loaded.describe() == s.describe()
    assert_close(loaded(QUESTIONS, ANSWERS).loss, s(QUESTIONS, ANSWERS).loss, TIGHT)


def test_what_does_not_fit_is_refused():
    sharer, receiver, solver = AGENTS
    models = fusing()
    models = models.others["small"].model, models.model

    def refused(message, agents=AGENTS, **options):
        with pytest.raises(ValueError, match=message):
            fusing(agents, models=models, **options)(QUESTIONS, ANSWERS)

    where = "agent 'receiver', whose rows are fused with those of 'sharer': "
    thinks = Agent("receiver", "w5 {question} w6", 1, reads=["sharer"])
    refused(where + "latent_steps: expected 0, got 1; who reads it can take some", [sharer, thinks, solver])
    refused(where + "expected another agent that reads it and answers, got the last agent", [sharer, receiver])
    refused(where + "trace_content: expected 'all', got 'latent_only'", trace_content="latent_only")
    refused(where + "no_latents: expected 'prompt', got 'skip'", no_latents="skip")
    second = Agent("second", "w5", model="small")
    both = Agent("receiver", "w5", reads=["sharer", "second"])
    message = "agent 'receiver': reads: expected one agent at most whose rows are fused with its own, got 'sharer' and 'second'"
    refused(message, [sharer, second, both, solver])
    moved_there = Agent("receiver", "w5 {question} w6", reads=[{"agent": "sharer", "positions": "keep"}])
    message = "agent 'receiver': reads: sharer: expected neither positions nor select of rows that are fused with its own"
    refused(message, [sharer, moved_there, solver])
    other = Agent("receiver", "w5 {question}", reads=["sharer"])
    refused(r"questions\[0\], agent 'receiver': expected the prompt of 'sharer', .* 'w5 w10 w11 w6', got 'w5 w10 w11'",
            [sharer, other, solver])  # fmt: skip
    slow = fusing(models=models).others["small"]
    slow.tokenizer = type("Slow", (), {"is_fast": False, "get_vocab": lambda self: {}, "chat_template": None})()
    with pytest.raises(ValueError, match="others, 'small': tokenizer: expected one of the system's vocabulary, or two fast"):
        MultiAgentSystem(models[1], tokenizer(), AGENTS, others={"small": slow})


# ---- the baseline ----------------------------------------------------------------------------------------------------


def baseline(gate=1.0, **options):
    s = fusing(gate=gate)
    return C2C(s.model, s.tokenizer, [Agent("one", "w5 {question} w6")], others=dict(s.others), realign="none", **options)


def test_all_but_the_last_token_of_the_prompt_are_fused():
    s = baseline()
    out = s(QUESTIONS, ANSWERS)
    want = loop_loss(s, Loop)
    assert_close(out.loss, want, TIGHT)
    fields = {"question": "w10 w11"}
    assert [s.prompt_ids(agent, fields) for agent in s.agents[1:]] == [[5, 10, 11], [6]]
    got = s.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0)
    with torch.no_grad():
        assert [tokens for (tokens,) in got] == [greedy(s, question, 4, Loop) for question in QUESTIONS]


def test_a_closed_gate_is_the_agent_alone():
    s = baseline(gate=-1.0)
    alone = MultiAgentSystem(s.model, s.tokenizer, [Agent("one", "w5 {question} w6")], realign="none")
    assert_close(s(QUESTIONS, ANSWERS).loss, alone(QUESTIONS, ANSWERS).loss, TIGHT)


def test_the_baseline_is_saved_and_loaded(tmp_path):
    s = baseline()
    s.save_pretrained(tmp_path)
    base = [model.unload() for model in pair()]
    loaded = C2C.from_pretrained(tmp_path, base[1], others={"small": base[0]})
    assert loaded.describe() == s.describe() and type(loaded) is C2C
    assert_close(loaded(QUESTIONS, ANSWERS).loss, s(QUESTIONS, ANSWERS).loss, TIGHT)
    moved(s).load_weights(tmp_path)
    assert_close(loaded(QUESTIONS, ANSWERS).loss, s(QUESTIONS, ANSWERS).loss, TIGHT)


def test_a_baseline_needs_one_model_that_fuses():
    s = fusing()
    with pytest.raises(ValueError, match=r"others: expected one model whose projector fuses, got \['small'\]"):
        small = s.others["small"]
        other = Other(small.model, small.tokenizer, randomized(Projector(small.model, s.model)))
        C2C(s.model, s.tokenizer, [AGENTS[-1]], others={"small": other})
