"""Rows that a reader chooses from what an agent hands on, against a plain loop that leaves out the others."""

import json
from dataclasses import replace

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import check_greedy_tokens
from models import assert_close, body, gradients, tiny
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer
from test_graph import TIGHT, Loop, agent, exact

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents import board
from diffmas.agents.card import contents
from diffmas.agents.selection import within
from diffmas.trace.views import rows_of

LATENT = dict(trace_content="latent_only")
REINDEX = dict(**LATENT, sinks=2, positions="reindex")


def of(name, positions=None, **select):
    return {"agent": name, "positions": positions, "select": select or None}


def solver(*reads, **options):
    return agent("solver", 0, list(reads), **options)


FIRST = [agent("a", 4, []), agent("b", 3, [])]
SHAPES = {
    "latent": [*FIRST, solver(of("b", kind="latent"), of("a", kind="prompt"))],
    "last": [*FIRST, solver(of("b", rows=2), of("a", "keep", rows=3, by="last"))],
    "every": [*FIRST, solver(of("a", every=2), of("b", "same_branch", every=3))],
    "together": [
        FIRST[0], agent("b", 3, [of("a", kind="latent", every=2)]), agent("c", 2, [of("a", "reindex", every=2, rows=1), "b"]),
        solver(of("c", kind="latent", rows=1), of("b", "keep", every=2), of("a", rows=20)),
    ],
    "similar": [*FIRST, solver(of("b", rows=2, by="similarity"), of("a", "keep", every=2, rows=1, by="similarity"))],
    "attended": [
        FIRST[0], agent("b", 3, [of("a", rows=2, by="attention")]),
        solver(of("b", "reindex", kind="latent", rows=2, by="attention"), of("a", rows=3, by="attention")),
    ],
    "budgets": [
        *FIRST, agent("c", 2, ["a", of("b", "reindex")], max_rows=7),
        solver("c", of("a", every=2), max_rows=6, max_rows_by="similarity"),
    ],
    "budget and best": [
        agent("a", 4, None), agent("b", 3, None, max_rows=6, max_rows_by="attention"),
        solver(of("a", rows=4, by="similarity"), "b", max_rows=8, max_rows_by="attention"),
    ],
    "in line": [
        agent("a", 4, None), agent("b", 3, None, max_rows=5, max_rows_by="every"),
        agent("solver", 0, None, max_rows=7, max_rows_by="attention"),
    ],
    "some layers": [*FIRST, solver(of("a", layers=[2]), of("b", every=2, layers=[0, 2]))],
    "some layers in turns": [
        FIRST[0], agent("b", 3, [of("a", layers=[1])]), agent("c", 2, [of("a", layers=[0, 2]), of("b", rows=2, layers=[1])]),
        solver(of("c", "keep", layers=[0]), of("b", "reindex", layers=[0, 1]), of("a", kind="latent", layers=[1]),
               max_rows=14, max_rows_by="latent"),
    ],
    "passes": [agent("a", 4, [], passes=2), agent("b", 4, [of("a", every=2)], passes=2), solver("a", of("b", rows=2))],
}  # fmt: skip


# ---- the oracle ------------------------------------------------------------------------------------------------------


def sees(seen_by, layer, head):
    layers, heads = seen_by or (None, None)
    if layers and layer not in layers:
        return False
    if heads and not isinstance(heads[0], int):
        heads = heads[list(layers).index(layer)]
    return not heads or head in heads


class Choosing(Loop):
    def __init__(self, *args):
        super().__init__(*args)
        self.layers, self.seen = {}, {}  # by reader and token: the layers and heads that see it; by K and V: of each row

    def rows(self, i, move):
        kv = super().rows(i, move)
        self.seen[id(kv)] = kv, [self.layers.get((i, *x[:2])) for x in self.layout(i)[0]]
        return kv

    def forward(self, module, kv, x, first, **options):
        """Where some layers or heads see less, each has a mask of its own."""
        seen = self.seen.get(id(kv), (kv, []))[1]
        if not any(seen):
            return super().forward(module, kv, x, first, **options)
        hooks, config = [], self.s.model.config
        for n, layer in enumerate(body(self.s.model).layers):
            mask = torch.zeros(config.num_attention_heads, len(x), len(seen) + len(x), dtype=x.dtype)
            for q in range(len(mask)):
                head = q // (config.num_attention_heads // config.num_key_value_heads)
                mask[q, :, : len(seen)].masked_fill_(torch.tensor([not sees(x, n, head) for x in seen]), -torch.inf)
            mask[..., len(seen) :] = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
            change = lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask[None]})
            hooks.append(layer.self_attn.register_forward_pre_hook(change, with_kwargs=True))
        try:
            return super().forward(module, kv, x, first, **options)
        finally:
            for hook in hooks:
                hook.remove()

    def chosen(self, i, j):
        edge = next((r for r in self.s.agents[i].reads or () if self.number[r.agent] == j), None)
        handed = self.handed(j)
        if edge is None or edge.select is None:
            return handed
        sinks, rest, said = handed[: self.s.sinks], handed[self.s.sinks :], edge.select
        self.layers |= {(i, *x[:2]): (said.layers, said.heads) for x in rest if said.layers or said.heads}
        if said.kind:
            rest = [x for x in rest if self.is_latent(x) == (said.kind == "latent")]
        if said.every:
            rest = rest[::-1][:: said.every][::-1]
        return sinks + self.best(i, rest, said.rows, said.by)

    def layout(self, i):
        out, end = super().layout(i)
        who, sinks = self.s.agents[i], self.s.sinks
        if who.max_rows and self.measuring != i:
            out = out[:sinks] + self.best(i, out[sinks:], who.max_rows - sinks, who.max_rows_by)
        return out, end

    def reads(self, i):
        """Agents in a line keep the places of those that they do not see."""
        in_line = all(a.reads is None for a in self.s.agents) and self.s.positions == "keep"
        return [(j, "keep" if in_line else how) for j, how in super().reads(i)]

    def is_latent(self, token):
        w, n, _ = token
        return n >= len(self.s.prompt_ids(self.s.agents[w], self.fields))

    def best(self, i, tokens, rows, by):
        if rows is None or (by in ("similarity", "attention") and self.measuring == i):
            return tokens
        if by in (None, "last"):
            return tokens[-rows:]
        if by == "every":
            back = [(k * len(tokens)) // rows for k in range(rows)]
            return [x for k, x in enumerate(tokens[::-1]) if k in back or len(tokens) <= rows][::-1]
        latents_first = lambda x: len(tokens) * self.is_latent(x) + tokens.index(x)
        score = latents_first if by == "latent" else getattr(self, by)(i)
        good = sorted(tokens, key=lambda x: -score(x))[:rows]
        return [x for x in tokens if x in good]

    measuring = None  # the agent whose prompt reads all that there is to choose from

    @torch.no_grad()
    def similarity(self, i):
        """Of values, which transformers' cache holds."""
        _, own = self.forward(body(self.s.model), [], self.prompt(i), 5)
        question = [v.mean(2).flatten() for _, v in own]

        def score(token):
            w, n, _ = token
            with torch.no_grad():
                rows = [v[0, :, n].flatten() for _, v in self.turn(w, 0)]
            return sum(float(F.cosine_similarity(x, y, 0)) for x, y in zip(rows, question))

        return score

    @torch.no_grad()
    def attentions(self, i, heads=False):
        """As transformers' eager attention tells it: what agent i may read, and by layer the mean over heads and tokens, or
        over tokens alone."""
        self.measuring, before = i, self.measuring
        layout, at = self.layout(i)
        rows = self.rows(i, 0)
        self.measuring = before
        config, before = self.s.model.config, self.s.model.config._attn_implementation
        config._attn_implementation = "eager"
        out, _ = self.forward(body(self.s.model), rows, self.prompt(i), at, output_attentions=True)
        config._attn_implementation = before
        return layout, [x.mean((0, 2) if heads else (0, 1, 2)) for x in out.attentions]

    def attention(self, i):
        layout, by_layer = self.attentions(i)
        found = {x[:2]: float(m) for x, m in zip(layout, sum(by_layer))}
        return lambda token: found[token[:2]]

    def prompt(self, i):
        ids = self.s.prompt_ids(self.s.agents[i], self.fields)
        return self.s.model.get_input_embeddings()(torch.tensor(ids))


def check_loss(s):
    out, got = loops.check_loss(s, Choosing)
    assert max(g.abs().max() for g in got.values()) > 1e-4
    return out


# ---- loss, gradients, tokens, batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LATENT, REINDEX], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_loop(shape, options):
    agents = SHAPES[shape]
    if shape == "latent" and options:
        agents = [*FIRST, solver(of("b", kind="latent"), "a")]  # nobody gets prompts
    check_loss(exact(system(agents=agents, **options)))


@pytest.mark.parametrize("shape", ["together", "similar", "some layers in turns"])
def test_generated_tokens(shape):
    s = system(agents=SHAPES[shape], **LATENT)
    check_greedy_tokens(s, Choosing)


@pytest.mark.parametrize("options", [{}, LATENT, REINDEX], ids=str)
def test_a_budget_that_is_never_reached_changes_nothing(options):
    """Of agents in a line, whose rows stay where they are; and no prompt runs to measure rows."""
    chain = system(**options)
    for i in range(3):
        agents = [replace(a, max_rows=1000, max_rows_by="attention") if j == i else a for j, a in enumerate(AGENTS)]
        s = system(agents=agents, **options)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(board, "scores", None)
            got, want = s(QUESTIONS), chain(QUESTIONS)
        assert not s.graph.chain
        assert_close(got.logits, want.logits, 1e-12)
        assert got.trace.lengths == want.trace.lengths and got.trace.next_positions == want.trace.next_positions
        assert all(got.trace.positions(b).tolist() == want.trace.positions(b).tolist() for b in range(3))


def test_a_budget_holds_for_what_is_on_the_trace_before():
    """The sinks stay, and the last rows; where the others go on nothing changes."""
    s = system(agents=[agent("a", 2, None), agent("solver", 0, None, max_rows=7)], sinks=3)
    with torch.no_grad():
        memory = s.think(Agent("memory", "w30 w31 w32 w33 w34", 2), s.fields_of(QUESTIONS), Trace(s.model, 3))
        first = [rows_of([x for x in memory.segments if x.sequence == b]).tolist() for b in range(3)]
        trace = s.communicate(s.fields_of(QUESTIONS), memory.fork(1)[0])
    assert trace.lengths == [7] * 3
    for b in range(3):
        rows, places = rows_of([x for x in trace.segments if x.sequence == b]).tolist(), trace.positions(b).tolist()
        assert rows[:3] == first[b][:3] and places[:3] == [0, 1, 2]
        assert places[3:] == list(range(trace.next_positions[b] - 4, trace.next_positions[b]))


@pytest.mark.parametrize("learns", [False, True], ids=["given", "learned"])  # whether the trace before has a gradient
def test_whoever_reads_an_agent_with_a_budget_has_what_all_see(learns):
    """It leaves out rows of the trace before in its own turn alone."""
    a, b = agent("a", 2, None), agent("b", 2, None, max_rows=7)
    s = system(agents=[a, b, agent("solver", 0, None)], sinks=3)
    fields = s.fields_of(QUESTIONS)

    def remembered():
        with torch.set_grad_enabled(learns):
            return s.think(Agent("memory", "w30 w31 w32 w33 w34 w35 w36 w37", 2), fields, Trace(s.model, 3))

    def loss():
        return s(QUESTIONS, ANSWERS, trace=s.communicate(fields, remembered() if learns else memory.fork(1)[0])).loss

    memory = remembered()
    got = s.communicate(fields, memory.fork(1)[0])
    before = system(agents=[a, s.agents[2]], sinks=3).communicate(fields, memory.fork(1)[0])
    by_sequence = [[x for x in before.segments if x.sequence == q] for q in range(3)]
    view = before.reading([within(row, 3, 7, None, {}) for row in by_sequence])
    want = s.think(b, fields, view)
    for q, n in enumerate(before.lengths):
        own = got.lengths[q] - n
        assert own == want.lengths[q] - 7 > 2
        assert got.positions(q).tolist() == [*before.positions(q).tolist(), *want.positions(q)[-own:].tolist()]
        for x, y, z in zip(*(t.keys_values(1, q) for t in (got, before, want))):
            assert_close(x, torch.cat((y, z[-own:])), 1e-12)
    loss().backward()
    slopes = gradients(s)
    step = {name: torch.randn_like(g) for name, g in slopes.items()}
    params, ends = dict(s.named_parameters()), []
    with torch.no_grad():
        for by in (1e-5, -2e-5):
            for name, x in step.items():
                params[name] += by * x
            ends.append(float(loss()))
    want = sum(float((g * step[name]).sum()) for name, g in slopes.items())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(want, rel=1e-5)


def check_single_runs(s, rows):
    """A batch is what its questions are one by one: rows and gradients."""
    out = s(rows, ANSWERS)
    out.loss.backward()
    got, total = gradients(s), 0.0
    for b, (row, answer) in enumerate(zip(rows, ANSWERS)):
        alone = s([row], [answer], num_items_in_batch=1)
        total = total + alone.loss
        assert out.trace.positions(b).tolist() == alone.trace.positions(0).tolist()
        assert out.trace.next_positions[b] == alone.trace.next_positions[0]
        for x, y in zip(out.trace.keys_values(1, b), alone.trace.keys_values(1, 0)):
            assert_close(x, y, 1e-12)
    (total / int((out.labels != -100).sum())).backward()
    assert_close(got, gradients(s), TIGHT)


RAGGED = [{"question": q, "a": a, "b": b} for q, a, b in zip(QUESTIONS, (4, 0, 1), (0, 3, 1))]


def ragged(agents):
    """Each question with its own T."""
    return [replace(agents[0], latent_steps="a"), replace(agents[1], latent_steps="b"), *agents[2:]]


@pytest.mark.parametrize("options", [{}, dict(**LATENT, no_latents="skip")], ids=str)
def test_ragged_batches_equal_single_runs(options):
    check_single_runs(system(agents=ragged(SHAPES["together"]), **options), RAGGED)


@pytest.mark.parametrize("shape", ["similar", "attended", "budgets", "some layers in turns"])
def test_more_ragged_batches_equal_single_runs(shape):
    """Though agents of a level share their forwards, and some questions leave nothing to choose."""
    check_single_runs(system(agents=ragged(SHAPES[shape]), **LATENT, no_latents="skip", sinks=1), RAGGED)


def test_checkpointing_gives_the_same_gradients():
    s = system(agents=SHAPES["attended"]).train()
    s(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(s)
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    s(QUESTIONS, ANSWERS).loss.backward()
    assert_close(gradients(s), want, TIGHT)
    assert s.model.training


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_a_selection_is_saved_and_loaded(tmp_path):
    agents = SHAPES["together"]
    s = system(agents=agents, dtype=torch.float32)
    s.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "agents.json").read_text())
    assert described["agents"][3]["reads"][:2] == [
        {"agent": "c", "positions": None, "select": {"kind": "latent", "rows": 1}},
        {"agent": "b", "positions": "keep", "select": {"every": 2}},
    ]
    assert "reads c (kind latent, rows 1), b (keep, every 2), a (rows 20)" in contents(described, "team")[1]
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents
    s.load_weights(tmp_path)
    described["agents"][3]["reads"][0]["select"]["rows"] = 0
    (tmp_path / "agents.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="agents.json: agent 'solver': reads: c: select: rows: expected an integer >= 1"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())


@pytest.mark.parametrize(
    "select, message",
    [
        ("latent", "expected a dict with some of .*'every'.* or None, got 'latent'"),
        ({}, "expected some of .*'every'.*, got none of them"),
        ({"last": 2}, "expected some of .*'rows'.*, got 'last'"),
        ({"kind": "image"}, r"kind: expected one of \('prompt', 'latent', 'text'\) or None, got 'image'"),
        ({"rows": 0}, "rows: expected an integer >= 1 or None, got 0"),
        ({"rows": True}, "rows: expected an integer >= 1 or None, got True"),
        ({"every": 1.5}, "every: expected an integer >= 1 or None, got 1.5"),
        ({"by": "last"}, "by: expected None without rows, got 'last'"),
        ({"layers": []}, "layers: expected numbers of layers, from 0, at least one and each once, got \\[\\]"),
        ({"layers": 1}, "layers: expected numbers of layers, .* got 1"),
        ({"layers": [1, 1]}, "layers: expected numbers of layers, .* got \\[1, 1\\]"),
        ({"layers": [-1]}, "layers: expected numbers of layers, .* got \\[-1\\]"),
        ({"rows": 2, "by": "luck"}, r"by: expected one of \('last'.*\) or None, got 'luck'"),
    ],
)
def test_selections_that_are_none(select, message):
    with pytest.raises(ValueError, match=f"agent 'b': reads: a: select: {message}"):
        Agent("b", "x", reads=[{"agent": "a", "select": select}])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_rows=0), "max_rows: expected an integer >= 1 or None, got 0"),
        (dict(max_rows=7.0), "max_rows: expected an integer >= 1 or None, got 7.0"),
        (dict(max_rows=4), "max_rows: expected more than the 4 sinks, got 4"),
        (dict(max_rows_by="last"), "max_rows_by: expected None without max_rows, got 'last'"),
        (dict(max_rows=9, max_rows_by="luck"), r"max_rows_by: expected one of \('last'.*\) or None, got 'luck'"),
    ],
)
def test_budgets_that_are_none(options, message):
    with pytest.raises(ValueError, match=f"agent 'solver': {message}"):
        system(agents=[AGENTS[0], replace(AGENTS[2], **options)])


def test_a_budget_is_saved_and_loaded(tmp_path):
    s = system(agents=SHAPES["in line"], dtype=torch.float32)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == s.agents
    described = json.loads((tmp_path / "agents.json").read_text())
    assert "### b: T = 3, at most 5 rows\n" in contents(described, "team")[1]
    for x in described["agents"]:
        del x["max_rows"], x["max_rows_by"]  # as a directory from before there were any
    (tmp_path / "agents.json").write_text(json.dumps(described))
    plain = [replace(a, max_rows=None, max_rows_by=None) for a in s.agents]
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer()).agents == plain


def test_layers_that_the_model_has_not():
    message = "agent 'solver': reads: a: select: layers: expected some of the model's, 0 to 2, got 3"
    with pytest.raises(ValueError, match=message):
        system(agents=[FIRST[0], solver(of("a", layers=[0, 3]))])


def test_selections_that_leave_nothing():
    for kind, T, options, why in (
        ("latent", 0, {}, "which takes no latent steps"),
        ("prompt", 2, LATENT, "whose prompt nobody gets with trace_content='latent_only'"),
    ):
        agents = [agent("a", T, []), solver(of("a", kind=kind))]
        message = f"agent 'solver': reads: a: select: kind: expected one that leaves rows, got '{kind}' of an agent {why}"
        with pytest.raises(ValueError, match=message):
            system(agents=agents, **options)
