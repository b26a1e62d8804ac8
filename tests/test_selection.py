"""Rows that a reader chooses from what an agent hands on, against a plain loop that leaves out the others."""

import json
from dataclasses import replace

import loops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import check_greedy_tokens
from models import assert_close, body, gradients, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, roles_model, system, tokenizer
from test_graph import TIGHT, Loop, agent, exact

from diffmas import Agent, MultiAgentSystem, Segment, Trace
from diffmas.agents import board, prompts
from diffmas.agents.board import Board
from diffmas.agents.card import contents
from diffmas.agents.meter import measuring
from diffmas.agents.scores import attention_by_layer, scores
from diffmas.agents.selection import MEASURED, selected, within
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace.attention_mass import AttentionMass
from diffmas.trace.views import places, rows_of

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
        agent("a", 4, None), agent("b", 3, None, max_rows=5), agent("solver", 0, None, max_rows=7, max_rows_by="attention")
    ],
    "some layers": [*FIRST, solver(of("a", layers=[2]), of("b", every=2, layers=[0, 2]))],
    "some layers in turns": [
        FIRST[0], agent("b", 3, [of("a", layers=[1])]), agent("c", 2, [of("a", layers=[0, 2]), of("b", rows=2, layers=[1])]),
        solver(of("c", "keep", layers=[0]), of("b", "reindex", layers=[0, 1]), of("a", kind="latent", layers=[1]), max_rows=14),
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
        score = getattr(self, by)(i)
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


# ---- what rows are worth ---------------------------------------------------------------------------------------------


def test_attention_mass_of_more_sequences_than_a_head_has_lanes():
    """All see the same rows, and their prompts are not the same: each has its own mass, which is that of it alone."""
    s = system()
    with torch.no_grad():
        trace = s.think(Agent("memory", "w30 w31 {question}", 2), s.fields_of(QUESTIONS[:1]), Trace(s.model, 1))
        lanes = trace.keys_values(0, 0)[0].shape[2]
        prompts = [[5 + b % 40, *range(7, 8 + b % 3)] for b in range(lanes + 2)]

        def mass(prompts):
            reader = trace.select([0] * len(prompts))
            forward_pass = reader.plan(list(map(len, prompts)), "prompt")
            found = AttentionMass(forward_pass)
            forward(patch_of(s.model), reader, forward_pass, input_ids=s.pack(prompts))
            return found.by_layer

        together = mass(prompts)
        for b in (0, 1, lanes - 1, lanes, lanes + 1):
            for layer, rows in mass(prompts[b : b + 1]).items():
                assert_close(together[layer][b], rows[0], 1e-12)
                assert float(rows[0].sum()) == pytest.approx(1) and (rows[0] > 0).all()


@pytest.mark.parametrize("options", [{}, LATENT], ids=str)
def test_attention_by_layer(options):
    s = exact(system(agents=SHAPES["last"], **options))
    want = torch.zeros(3, dtype=torch.float64)
    for question in QUESTIONS:
        loop = Choosing(s, question)
        layout, by_layer = loop.attentions(2)
        want += torch.stack([x[s.sinks : len(layout)].sum() for x in by_layer]) / 3
    got = attention_by_layer(s, QUESTIONS)
    assert_close(torch.tensor(got, dtype=torch.float64), want, 1e-6)  # eager softmax is in float32
    assert 0 < min(got) and max(got) < 1 and len(set(got)) == 3


def test_a_choice_does_not_depend_on_dropout():
    """Nor draws random numbers; and the model is in its mode again."""
    chosen = []
    for mode in (True, False):
        agents = [*FIRST, solver(of("a", rows=2, by="attention"), of("b", rows=2, by="similarity"))]
        s = MultiAgentSystem(with_lora(tiny("qwen3", patch=False), lora_dropout=0.9), tokenizer(), agents)
        with torch.no_grad():
            turns = Board(s, Trace(s.model, 3))
            turns.write(turns.groups[0], s.fields_of(QUESTIONS))  # in eval mode
            s.train(mode)
            state = torch.get_rng_state()
            chosen.append(turns.read(2, s.fields_of(QUESTIONS)).segments)
        assert torch.equal(torch.get_rng_state(), state) and s.model.training is mode
    assert chosen[0] == chosen[1]


def test_a_choice_is_by_the_readers_adapter():
    agents = [FIRST[0], solver(of("a", rows=1, by="similarity"))]
    s = MultiAgentSystem(roles_model(("a", "solver")), tokenizer(), agents, adapter_scope="per_role")
    read, values = Trace(s.model, 3), {}
    with torch.no_grad():
        s.think(agents[0], s.fields_of(QUESTIONS), read)
        for name in ("nobody", "a", "solver"):
            for n, p in s.named_parameters():
                if f"lora_B.{name}." in n:
                    p.mul_(-30)
            found, *_ = scores(s, 1, s.fields_of(QUESTIONS), read, {"similarity"})
            values[name] = found["similarity"](rows_of([x for x in read.segments if x.sequence == 0]))
    assert np.allclose(values["a"], values["nobody"], atol=0, rtol=1e-12)
    assert not np.allclose(values["solver"], values["nobody"], atol=1e-3)


def test_a_gradient_report_does_not_know_of_it():
    s = system(agents=SHAPES["attended"])
    report = s.gradient_report(QUESTIONS, ANSWERS)
    assert [(p.agent, p.kind) for p in report.passes if p.kind != "latent"] == [
        ("a", "prompt"), ("b", "prompt"), ("solver", "answer")
    ]  # fmt: skip
    s(QUESTIONS, ANSWERS).loss.backward()
    assert report.norm == pytest.approx(sum(float(g.square().sum()) for g in gradients(s).values()) ** 0.5)


@pytest.mark.parametrize("options", [{}, LATENT, REINDEX], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_checked_is_no_less_than_where_agents_end_up(shape, options, monkeypatch):
    """And just that where nothing is measured, or gaps are closed."""
    agents = SHAPES[shape] if shape != "latent" else SHAPES["last"]
    s, asked, checked = system(agents=agents, **options), None, {}
    asked, fits = s.fields_of(QUESTIONS), prompts.prompt_that_fits
    monkeypatch.setattr(prompts, "prompt_that_fits", lambda system, agent, b, fields, at, *rest: (
        checked.setdefault((agent.name, b), at), fits(system, agent, b, fields, at, *rest))[1])  # fmt: skip
    s.tokenize(asked, [0] * 3)
    turns, found = Board(s, Trace(s.model, 3)), {}
    with torch.no_grad():
        for group in [*turns.groups, [len(agents) - 1]]:
            found |= {(agents[i].name, b): at for i in group for b, at in enumerate(turns.read(i, asked).next_positions)}
            if group != [len(agents) - 1]:
                turns.write(group, asked)
    assert found.keys() == checked.keys() and all(checked[key] >= at for key, at in found.items())
    if not any(measure in str(agents) for measure in MEASURED):
        assert checked == found


# ---- views -----------------------------------------------------------------------------------------------------------


def test_places_of_a_view():
    view = [Segment(0, "a", "prompt", 10, 3, 0), Segment(0, "b", "latent", 5, 4, 7, 2), Segment(0, None, "text", 20, 1, 0)]
    for chosen in ([], [0], [2, 3], [0, 1, 2, 4, 6, 7], list(range(8))):
        got = places(view, np.array(chosen, dtype=np.int64))
        assert rows_of(got).tolist() == rows_of(view)[chosen].tolist()
        where = np.concatenate([np.arange(s.position, s.position + s.length) + s.offset for s in view])
        assert [p for s in got for p in range(s.position + s.offset, s.next_position)] == where[chosen].tolist()
    assert places(view, np.arange(8)) == view
    seen, new = view[1]._replace(layers=(0,)), Segment(0, "b", "latent", 9, 1, 11, 2)
    assert seen.extended_by(new) is None and view[1].extended_by(new).length == 5


def test_rows_that_stay_do_not_count():
    """Neither among the best rows nor among every k-th, though they may be of another kind."""
    select = Agent("x", "y", reads=[of("a", kind="latent", every=2, rows=2)]).reads[0].select
    row = [Segment(0, "a", "prompt", 0, 6, 0), Segment(0, "a", "latent", 6, 7, 6)]
    assert rows_of(selected(row, 2, select, {})).tolist() == [0, 1, 10, 12]
    assert rows_of(selected(row, 0, select, {})).tolist() == [10, 12]
    assert rows_of(selected(row[:1], 2, select, {})).tolist() == [0, 1]


def test_nothing_is_copied():
    """The rows are those of a team that selects nothing, and the others are free."""
    held = {}
    for name, edges in (("all", ["a", "b"]), ("some", [of("a", rows=1), of("b", every=2)])):
        s = system(agents=[*FIRST, solver(*edges)], **LATENT, sinks=0)
        with torch.no_grad():
            trace = s.communicate(s.fields_of(QUESTIONS))
        held[name] = [rows_of([x for x in trace.segments if x.sequence == b]).tolist() for b in range(3)]
        assert trace.rows == sum(trace.lengths)
    for every, some in zip(held["all"], held["some"]):
        assert some == [every[3], every[4], every[6]]


def test_sizes_of_what_agents_read():
    """Rows, each of them once, and their bytes in all layers: of float64, with K and V."""
    s = system(agents=SHAPES["budgets"])
    with torch.no_grad(), measuring(s.device) as meter:
        out = s(QUESTIONS, ANSWERS)
        s(QUESTIONS, ANSWERS)
    layers, heads, D = len(out.trace), *out.trace.keys_values(0, 0)[0].shape[1:]
    sizes = out.trace.sizes
    assert sum(size.rows for size in sizes.values()) == sum(out.trace.lengths)
    for name, size in sizes.items():
        assert size.rows == sum(x.length for x in out.trace.segments if x.agent == name) > 0
        assert size.bytes == size.rows * layers * heads * D * 2 * 8
    assert out.trace.select([0, 0]).sizes == out.trace.select([0]).sizes
    assert {name: size.rows for name, size in meter.cost.read.items()} == {"c": 2 * 3 * 7, "solver": 2 * 3 * 6}
    chain = system()
    with torch.no_grad(), measuring(chain.device) as meter:
        chain.generate_tokens(QUESTIONS, max_new_tokens=2)
        written = chain.communicate(chain.fields_of(QUESTIONS)).sizes
    both = 2 * written["planner"].rows, 2 * sum(size.rows for size in written.values())
    assert {name: size.rows for name, size in meter.cost.read.items()} == dict(zip(("critic", "solver"), both))


def test_rows_that_some_layers_see(tmp_path):
    """Count in these; are saved and loaded so, and go on the same."""
    s = system(agents=SHAPES["some layers"])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    fixed, size = len(QUESTIONS) * s.sinks, trace.sizes["a"]
    row = size.bytes // (3 * fixed + (size.rows - fixed))
    assert size.bytes == row * (3 * fixed + (size.rows - fixed))  # sinks in all layers, the rest in one
    assert trace.sizes["b"].bytes % row == 0 < trace.sizes["b"].rows
    assert {x.layers for x in trace.segments} == {None, (2,), (0, 2)}
    trace.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace", s.model)
    assert [x.layers for x in loaded.segments] == [x.layers for x in trace.segments]
    for other in (loaded, trace.repack(), trace.fork(1)[0]):
        assert_close(s(QUESTIONS, ANSWERS, trace=other).logits, s(QUESTIONS, ANSWERS).logits, 1e-9)
    everywhere = system(agents=[*FIRST, solver("a", of("b", every=2))])
    assert (everywhere(QUESTIONS, ANSWERS).logits - s(QUESTIONS, ANSWERS).logits).abs().max() > 1e-3


def test_rows_that_some_layers_see_on_the_host():
    losses = []
    for offload in (None, "cpu"):
        s = system(agents=SHAPES["some layers in turns"], dtype=torch.float32)
        s.zero_grad()
        asked = s.fields_of(QUESTIONS)
        trace = s.communicate(asked, Trace(s.model, 3, offload=offload))
        s(QUESTIONS, ANSWERS, trace=trace).loss.backward()
        losses.append(gradients(s))
    assert losses[0].keys() == losses[1].keys() and all(torch.equal(losses[1][n], g) for n, g in losses[0].items())


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
