"""Agents that take turns in rounds: written out as whoever describes a team without rounds would, and against a plain loop."""

import json
from dataclasses import replace

import pytest
import torch
from loops import check_checkpointing, check_compiled, check_loss, check_ragged, loop_loss
from models import assert_close, body, gradients, tiny, with_lora
from systems import ANSWERS, QUESTIONS, roles_model, system, tokenizer
from test_graph import TIGHT, exact
from transformers import DynamicCache

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents.board import Board
from diffmas.agents.graph import Read
from diffmas.agents.rounds import unrolled
from diffmas.cli.config import Config
from diffmas.cli.plain_data import parsed
from diffmas.models.parts import causal_lm_of
from diffmas.trace.cache import cache_argument
from diffmas.training import add_lora, lora_config

FIRST, LATER, JUDGE = "w5 {question} w6", "w7 w8 {question}", "w9 {question}"
DEBATE = [
    Agent("ann", FIRST, 2, reads=["ann", "bob"], rounds=3, later_prompt=LATER),
    Agent("bob", FIRST, 1, reads=["bob", "ann"], rounds=3, later_prompt=LATER),
    Agent("judge", JUDGE, reads=["bob", "ann"]),
]
LOOP = [
    Agent("planner", "w4 {question}", 1, reads=[]),
    Agent("writer", FIRST, 2, reads=["planner", "critic"], rounds=2),
    Agent("critic", LATER, 1, reads=[Read("writer", "keep", round="same")], rounds=2),
    Agent("judge", JUDGE, reads=["writer@1", "writer", "critic"]),
]


def shape(agents):
    return [(a.name, a.role, a.prompt, None if a.reads is None else [r.agent for r in a.reads]) for a in unrolled(agents)]


def test_a_debate_is_its_turns():
    want, before = [], []
    for r in (1, 2, 3):
        prompt = FIRST if r == 1 else LATER
        want += [(f"ann@{r}", "ann", prompt, before), (f"bob@{r}", "bob", prompt, before[::-1])]
        before = [f"ann@{r}", f"bob@{r}"]
    assert shape(DEBATE) == [*want, ("judge", None, JUDGE, ["bob@3", "ann@3"])]
    assert unrolled(unrolled(DEBATE)) == unrolled(DEBATE)
    s = system(agents=DEBATE)
    assert s.graph.levels == [[0, 1], [2, 3], [4, 5]] and Board(s, Trace(s.model)).groups == s.graph.levels


def test_a_loop_is_its_turns():
    assert shape(LOOP) == [
        ("planner", None, "w4 {question}", []),
        ("writer@1", "writer", FIRST, ["planner"]), ("critic@1", "critic", LATER, ["writer@1"]),
        ("writer@2", "writer", FIRST, ["planner", "critic@1"]), ("critic@2", "critic", LATER, ["writer@2"]),
        ("judge", None, JUDGE, ["writer@1", "writer@2", "critic@2"]),
    ]  # fmt: skip
    assert [r for a in unrolled(LOOP) if a.name == "critic@2" for r in a.reads] == [Read("writer@2", "keep")]
    chain = [Agent("a", FIRST, 1, rounds=2), Agent("b", LATER, 1, rounds=2), Agent("solver", JUDGE)]
    assert shape(chain)[:4] == [("a@1", "a", FIRST, None), ("b@1", "b", LATER, None), ("a@2", "a", FIRST, None),
                                ("b@2", "b", LATER, None)]  # fmt: skip
    assert system(agents=chain).graph.chain
    refining = [Agent("solver", FIRST, 2, rounds=3, reads=["solver"])]
    assert [a[0] for a in shape(refining)] == ["solver@1", "solver@2", "solver@3"]
    apart = [Agent("a", FIRST, 1, rounds=2, reads=["a"]), Agent("b", FIRST, 1, rounds=3, reads=["b", "a"])]
    assert [a[3] for a in shape(apart)] == [[], ["a@1"], ["a@2"], ["b@1", "a@2"], ["b@2", "a@2"]]


def test_two_blocks_of_as_many_rounds_are_kept_apart():
    debate = [replace(a, rounds=2) for a in DEBATE[:2]]
    loop = [replace(LOOP[1], reads=["ann", "bob", "critic"]), LOOP[2], replace(LOOP[3], reads=["writer", "critic"])]
    written = unrolled([*debate, DEBATE[2]])[:4]  # as a config would have them
    assert [a.role for a in written] == ["ann", "bob", "ann", "bob"]
    loop[0] = replace(loop[0], reads=["ann@2", "bob@2", "critic"])
    apart = {name: reads for name, _, _, reads in shape([*written, *loop])}
    between = [*debate, replace(DEBATE[2], latent_steps=1), replace(loop[0], reads=["judge", "critic"]), loop[1]]
    assert apart["writer@1"] == ["ann@2", "bob@2"] and apart["ann@2"] == ["ann@1", "bob@1"]
    assert [a[0] for a in shape([*written, *loop])][4:8] == ["writer@1", "critic@1", "writer@2", "critic@2"]
    last = replace(loop[2], name="solver")
    assert [a[0] for a in shape([*between, last])][4:7] == ["judge", "writer@1", "critic@1"]
    system(agents=[*written, *loop]), system(agents=[*between, last])


# ---- a loop that knows rounds, and no graph ----------------------------------------------------------------------------


class Debate:
    """One question of DEBATE, round by round: who has read what is in plain caches, and every row is made anew where it is
    read at another position."""

    def __init__(self, s, question):
        self.s, self.fields = s, s.fields_of([question])[0]
        self.names, self.order = ["ann", "bob"], {"ann": ["ann", "bob"], "bob": ["bob", "ann"]}

    def ids(self, text):
        return self.s.tokenizer(text.format_map(self.fields))["input_ids"]

    def length(self, name, r):
        return len(self.ids(FIRST if r == 1 else LATER)) + {"ann": 2, "bob": 1}[name]

    def forward(self, module, kv, x, first):
        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k, v, layer)
        past = kv[0][0].shape[2] if kv else 0
        options = {cache_argument(causal_lm_of(self.s.model)): cache, "use_cache": True}
        mask, at = torch.ones(1, past + len(x), dtype=torch.long), torch.arange(first, first + len(x))[None]
        return module(inputs_embeds=x[None], attention_mask=mask, position_ids=at, **options), cache, past

    def read(self, names, r, start):
        """K and V of what some have written in round r, one block behind the other from `start` on, and where that ends."""
        blocks, at = [], start
        for name in names if r else []:
            blocks.append(self.turn(name, r, at - self.first(name, r)))
            at += self.length(name, r)
        return [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(*blocks)], at

    def first(self, name, r):
        return sum(self.length(n, r - 1) for n in self.order[name]) if r > 1 else 0

    def turn(self, name, r, move):
        """K and V of a turn, all of it `move` positions further."""
        kv, at = self.read(self.order[name], r - 1, move)
        x = self.s.model.get_input_embeddings()(torch.tensor(self.ids(FIRST if r == 1 else LATER)))
        out, cache, past = self.forward(body(self.s.model), kv, x, at)
        for _ in range({"ann": 2, "bob": 1}[name]):
            x = torch.cat((x, self.s.realign(out.last_hidden_state[0, -1:])))
            out, cache, past = self.forward(body(self.s.model), kv, x, at)
        return [(layer.keys[:, :, past:], layer.values[:, :, past:]) for layer in cache.layers]

    def logits(self, ids):
        kv, at = self.read(["bob", "ann"], 3, 0)
        x = self.s.model.get_input_embeddings()(torch.tensor(self.ids(JUDGE) + ids))
        return self.forward(self.s.model, kv, x, at)[0].logits[0][-len(ids) - 1 :]


def test_loss_and_gradients_equal_the_loop():
    s = exact(system(agents=DEBATE, sinks=0))
    check_loss(s, Debate)
    tokens = s.generate_tokens(QUESTIONS, max_new_tokens=2, temperature=0)
    for question, (row,) in zip(QUESTIONS, tokens):
        with torch.no_grad():
            first = int(Debate(s, question).logits([])[-1].argmax())
            assert row == [first, *([int(Debate(s, question).logits([first])[-1].argmax())] if len(row) > 1 else [])]


def test_branches_of_which_one_is_detached():
    """Of a turn that one branch has read and learns through, and that a reader of both has as a constant."""
    s = exact(system(agents=DEBATE, sinks=0))
    board = Board(s, Trace(s.model, len(QUESTIONS)))
    for group in board.groups:
        board.write(group, s.fields_of(QUESTIONS))
    names = [a.name for a in s.agents]
    learning, constant = (board.written(names.index(name)) for name in ("bob@3", "ann@2"))
    found = {}
    for detached in (True, False):
        joined = Trace.join([learning, constant.detach() if detached else constant])
        out = s(QUESTIONS, ANSWERS, trace=joined)
        out.loss.backward(retain_graph=True)
        found[detached] = gradients(s)

    class Joined(Debate):
        def logits(self, ids):
            first = self.turn("bob", 3, -self.first("bob", 3))
            second = self.turn("ann", 2, self.length("bob", 3) - self.first("ann", 2))
            kv = [tuple(torch.cat((a, b.detach()), 2) for a, b in zip(*layer)) for layer in zip(first, second)]
            x = self.s.model.get_input_embeddings()(torch.tensor(self.ids(JUDGE) + ids))
            at = self.length("bob", 3) + self.length("ann", 2)
            return self.forward(self.s.model, kv, x, at)[0].logits[0][-len(ids) - 1 :]

    want = loop_loss(s, Joined)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(found[True], gradients(s), TIGHT)
    assert any((found[True][n] - g).abs().max() > 1e-3 * g.abs().max() for n, g in found[False].items())


def test_a_role_has_one_adapter_for_its_turns():
    s = MultiAgentSystem(roles_model(("ann", "bob", "judge")), tokenizer(), DEBATE, adapter_scope="per_role")
    s(QUESTIONS, ANSWERS).loss.backward()
    got = gradients(s)
    shared = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), DEBATE)
    shared(QUESTIONS, ANSWERS).loss.backward()
    for name, g in gradients(shared).items():  # roles of equal weights: parts of the shared one's
        assert_close(sum(got[name.replace("default", role)] for role in ("ann", "bob", "judge")), g, TIGHT)
    model = add_lora(tiny("qwen3", patch=False), DEBATE, "per_role", lora_config(r=2, alpha=4))
    assert set(model.peft_config) == {"ann", "bob", "judge"}


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(system(agents=LOOP, trace_content="latent_only").train())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(system(agents=LOOP, trace_content="latent_only"))


def test_ragged_batches_equal_single_runs():
    agents = [replace(LOOP[0]), replace(LOOP[1], latent_steps="a", max_message_tokens=2), *LOOP[2:]]
    rows = [{"question": q, "a": a} for q, a in zip(QUESTIONS, (2, 0, 1))]
    check_ragged(system(agents=agents, trace_content="latent_only"), rows)


def test_saved_loaded_and_configured(tmp_path):
    s = system(agents=LOOP, dtype=torch.float32)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == s.agents == unrolled(LOOP)
    described = [
        {"name": a.name, "prompt": a.prompt, "latent_steps": a.latent_steps, "rounds": a.rounds,
         "reads": [r.described() for r in a.reads]}
        for a in LOOP
    ]  # fmt: skip
    assert json.loads(json.dumps(described))[2]["reads"] == [{"agent": "writer", "positions": "keep", "round": "same"}]
    assert parsed(Config, {"model": "base", "agents": described}).agents == unrolled(LOOP)


@pytest.mark.parametrize(
    "agents, message",
    [
        ([replace(a, rounds=None, later_prompt=None) for a in DEBATE], "agent 'ann': reads: .*got 'ann', which is not before"),
        ([replace(DEBATE[0], rounds=2), DEBATE[1], DEBATE[2]],
         r"agent 'ann': reads: expected some of \['ann'\], each once, got 'bob', which is not before it"),
        ([replace(DEBATE[0], reads=["zz"]), *DEBATE[1:]],
         r"agent 'ann': reads: expected some of \['ann', 'bob'\], each once, got 'zz', no agent"),
        ([replace(DEBATE[0], reads=["bob", "bob"]), *DEBATE[1:]], "agent 'ann': reads: .* got 'bob', a second time"),
        ([*DEBATE[:2], replace(DEBATE[2], reads=["bob", "zz"])],
         r"agent 'judge': reads: expected some of \['ann', 'bob'\], each once, got 'zz', no agent"),
        ([*DEBATE[:2], Agent("ann@2", "x", 1), DEBATE[2]], "agents: expected distinct names, got "),
        ([*DEBATE[:2], replace(DEBATE[2], reads=["ann"])], "agents: expected somebody who reads 'bob@3', got nobody"),
        ([*(replace(a, rounds=2) for a in DEBATE[:2]), *LOOP[1:3], replace(LOOP[3], reads=["writer", "critic"])],
         "agent 'writer': reads: .* got 'planner', no agent"),
        ([*(replace(a, rounds=2) for a in DEBATE[:2]), replace(LOOP[1], reads=["ann", "bob", "critic"]), LOOP[2],
          replace(LOOP[3], reads=["writer", "critic"])],
         "who reads 'ann@2', .* neighbours with as many rounds take them together, unless an agent stands between"),
        ([*DEBATE[:2], replace(DEBATE[2], reads=[Read("ann", round="same"), "bob"])],
         "agent 'judge': reads: ann: round: expected None of an agent that has no rounds with it, got 'same'"),
        ([replace(DEBATE[0], reads=[Read("bob", round="same")]), DEBATE[1], DEBATE[2]],
         "agent 'ann': reads: bob: round: expected None of an agent that is not before it, got 'same'"),
    ],
)  # fmt: skip
def test_rounds_that_are_refused(agents, message):
    with pytest.raises(ValueError, match=message):
        system(agents=agents)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rounds=0), "rounds: expected an integer >= 1 or None, got 0"),
        (dict(later_prompt="y"), "later_prompt: expected None without rounds, got 'y'"),
        (dict(later_prompt=3, rounds=2), "later_prompt: expected a format string or None, got 3"),
        (dict(quantized=["int8"]), r"quantized: expected one of .* or None, got \['int8'\]"),
        (dict(reads=[{"agent": "b", "round": "last"}]), "reads: b: round: expected 'same' or None, got 'last'"),
    ],
)
def test_descriptions_that_are_none(options, message):
    with pytest.raises(ValueError, match=f"agent 'a': {message}"):
        Agent("a", "x", **options)
