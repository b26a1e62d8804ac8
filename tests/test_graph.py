"""Teams of any shape against a plain loop that recomputes the whole graph: agent by agent, its rows anew for every reader."""

from dataclasses import replace

import pytest
import torch
from loops import TIGHT, check_checkpointing, check_compiled, check_greedy_tokens, check_loss
from models import assert_close, body, gradients, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, roles_model, system, tokenizer, unrolled_loss
from transformers import DynamicCache

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents import prompts
from diffmas.agents.board import Board
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument

PROMPTS = {"a": "w5 {question} w6", "b": "w7 w8 {question}", "c": "{question} w4"}


def agent(name, steps, reads, **options):
    return Agent(name, PROMPTS.get(name, "w9 {question}"), steps, reads=reads, **options)


def at(name, positions):
    return {"agent": name, "positions": positions}


SHAPES = {
    "parallel": [agent("a", 3, []), agent("b", 2, []), agent("solver", 0, None)],
    "tree": [
        *(agent(name, T, []) for name, T in (("a", 2), ("b", 1), ("c", 2))),
        agent("d", 2, ["b", "a"]), agent("solver", 0, ["d", "c"]),
    ],
    "diamond": [agent("a", 2, []), agent("b", 2, ["a"]), agent("c", 3, ["a"]), agent("solver", 0, ["c", "a", "b"])],
    "some of many": [agent("a", 2, []), agent("b", 1, ["a"]), agent("c", 2, None), agent("solver", 0, ["c", "b"])],
    "where they were": [agent("a", 3, []), agent("b", 2, []), agent("solver", 0, [at("b", "keep"), at("a", "keep")])],
    "behind a prompt": [agent("a", 2, []), agent("b", 0, []), agent("solver", 0, [at("b", "keep"), at("a", "reindex")])],
    "unlike": [
        agent("a", 3, [], passes=2), agent("b", 2, []), agent("c", 2, ["b"]), agent("d", 1, ["a"]),
        agent("solver", 0, ["d", "c"]),
    ],
    "each its own place": [
        agent("a", 3, []), agent("b", 2, []), agent("c", 1, [at("a", "same_branch")]),
        agent("solver", 0, [at("c", "reindex"), at("b", "keep"), at("a", "shift")]),
    ],
    "passes": [agent("a", 4, [], passes=2), agent("b", 3, [], passes=2), agent("c", 2, []), agent("solver", 0, None)],
}  # fmt: skip
CONTENTS = [
    {}, dict(trace_content="latent_only"), dict(trace_content="latent_only", sinks=0, realign="soft_token"),
    dict(trace_content="latent_only", sinks=2, positions="reindex"),
]  # fmt: skip


def exact(s):
    """transformers computes angles in float32, which are others for a row that is read elsewhere; here in float64."""
    rotary = body(s.model).rotary_emb

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    rotary.forward = forward
    return s


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Loop:
    """One question. A token is (layer -> k, v), who wrote it, its kind, the position that it has where it is read."""

    def __init__(self, s, question):
        self.s, self.fields = s, s.fields_of([question])[0]
        self.number = {a.name: i for i, a in enumerate(s.agents)}

    def reads(self, i):
        own, default = self.s.agents[i].reads, "reindex" if self.s.positions == "reindex" else "shift"
        if own is None:
            return [(j, default) for j in range(i)]
        return [(self.number[r.agent], r.positions or default) for r in own]

    def layout(self, i):
        """What agent i reads, and where: [(who wrote it, its how-manieth token, position)], and the next position."""
        seen, out, end = set(), [], 0
        for j, how in self.reads(i):
            own = [x for x in self.chosen(i, j) if x[:2] not in seen]
            after = self.wrote(j)[1]
            if own:
                low = min(p for *_, p in own)
                move = {"keep": 0, "shift": end - low, "same_branch": -low, "reindex": None}[how]
                own = [(w, n, end + t if move is None else p + move) for t, (w, n, p) in enumerate(own)]
                out, seen = out + own, seen | {x[:2] for x in own}
                end = max([end, *(p + 1 for *_, p in own)])
            end = max(end, after) if how == "keep" else end
        return out, end

    def wrote(self, j):
        """Tokens of agent j's prompt and latent steps with their positions, and the next one."""
        _, first = self.layout(j)
        n = len(self.s.prompt_ids(self.s.agents[j], self.fields)) + self.s.agents[j].latent_steps
        return [(j, t, first + t) for t in range(n)], first + n

    def handed(self, j):
        """What agent j hands on."""
        before, (own, _) = self.layout(j)[0], self.wrote(j)
        prompt = len(own) - self.s.agents[j].latent_steps
        sinks = (before + own)[: self.s.sinks]
        if self.s.trace_content == "latent_only":
            own = own[prompt:]
        return sinks + [x for x in own if x not in sinks]

    def chosen(self, i, j):
        """What agent i has of what agent j hands on."""
        return self.handed(j)

    def rows(self, i, move):
        """K and V [layer] of what agent i reads, all of it `move` positions further; every row made anew."""
        layout, _ = self.layout(i)
        made, parts = {}, []
        for w, n, position in layout:
            by = position - self.wrote(w)[0][n][2] + move
            if (w, by) not in made:
                made[w, by] = self.turn(w, by)
            parts.append([(k[:, :, n : n + 1], v[:, :, n : n + 1]) for k, v in made[w, by]])
        return [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(*parts)]

    def forward(self, module, kv, x, first, **options):
        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k, v, layer)
        past = kv[0][0].shape[2] if kv else 0
        mask = torch.ones(1, past + len(x), dtype=torch.long)
        positions = torch.arange(first, first + len(x))[None]
        out = module(inputs_embeds=x[None], attention_mask=mask, position_ids=positions, use_cache=True,
                     **{cache_argument(causal_lm_of(self.s.model)): cache}, **options)  # fmt: skip
        return out, [(layer.keys, layer.values) for layer in cache.layers]

    def turn(self, i, move):
        """K and V of what agent i writes, all positions `move` further."""
        s, who, kv = self.s, self.s.agents[i], self.rows(i, move)
        past, first = (kv[0][0].shape[2] if kv else 0), self.layout(i)[1] + move
        base, embed = body(s.model), s.model.get_input_embeddings()
        prompt = embed(torch.tensor(s.prompt_ids(who, self.fields)))
        T, x = who.latent_steps, prompt
        out, new = self.forward(base, kv, x, first)
        h0 = h = out.last_hidden_state[0, -1:]
        if who.passes:
            h = h0.expand(T, -1)
            for _ in range(who.passes):
                x = torch.cat((prompt, s.realign(torch.cat((h0, h[:-1])))))
                out, new = self.forward(base, kv, x, first)
                h = out.last_hidden_state[0, -T:]
        else:
            for _ in range(T):
                x = torch.cat((x, s.realign(h)))
                out, new = self.forward(base, kv, x, first)
                h = out.last_hidden_state[0, -1:]
        return [(k[:, :, past:], v[:, :, past:]) for k, v in new]

    def logits(self, ids):
        i = len(self.s.agents) - 1
        x = self.s.model.get_input_embeddings()(torch.tensor(self.s.prompt_ids(self.s.agents[i], self.fields) + ids))
        return self.forward(self.s.model, self.rows(i, 0), x, self.layout(i)[1])[0].logits[0][-len(ids) - 1 :]


# ---- loss, gradients, tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_loop(shape, options):
    s = exact(system(agents=SHAPES[shape], **options))
    check_loss(s, Loop)


@pytest.mark.parametrize("shape", ["parallel", "tree"])
def test_generated_tokens(shape):
    s = system(agents=SHAPES[shape], trace_content="latent_only")
    check_greedy_tokens(s, Loop)


@pytest.mark.parametrize(
    "options", [{}, dict(trace_content="latent_only"), dict(trace_content="latent_only", positions="reindex")]
)
def test_a_chain_by_name_is_the_chain(options):
    """Its rows too, in the order and at the positions of the default."""
    place = {"all": "shift", "latent_only": "keep"}[options.get("trace_content", "all")]
    place = "reindex" if "positions" in options else place
    named = [replace(a, reads=[at(b.name, place) for b in AGENTS[:i]]) for i, a in enumerate(AGENTS)]
    chain, s = system(**options), system(agents=named, **options)
    want, got = chain(QUESTIONS, ANSWERS), s(QUESTIONS, ANSWERS)
    assert_close(got.logits, want.logits, 1e-12)
    assert got.trace.lengths == want.trace.lengths and got.trace.next_positions == want.trace.next_positions
    assert all(got.trace.positions(b).tolist() == want.trace.positions(b).tolist() for b in range(3))
    got.loss.backward()
    if "positions" not in options:
        mine = gradients(s)
        unrolled_loss(chain, QUESTIONS, ANSWERS).backward()
        assert_close(mine, gradients(chain), TIGHT)


# ---- batches ---------------------------------------------------------------------------------------------------------


def forwards_of(s, monkeypatch):
    """[sequences with a new token, kind] of every forward over a trace."""
    planned, plan = [], Trace.plan

    def watched(self, lengths, kind, *args, **kwargs):
        planned.append((sum(n > 0 for n in lengths), kind))
        return plan(self, lengths, kind, *args, **kwargs)

    monkeypatch.setattr(Trace, "plan", watched)
    return planned


@pytest.mark.parametrize("options", CONTENTS[:2], ids=str)
def test_agents_of_a_level_share_their_forwards(options, monkeypatch):
    """And are what they are one by one."""
    s = system(agents=SHAPES["diamond"], **options)
    planned = forwards_of(s, monkeypatch)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    assert planned == [(3, "prompt"), *[(3, "latent")] * 2, (6, "prompt"), *[(6, "latent")] * 2, (3, "latent"), (3, "prompt")]
    planned.clear()
    s.together = False
    apart = s(QUESTIONS, ANSWERS)
    apart.loss.backward()
    assert len(planned) == 1 + 2 + (1 + 2) + (1 + 3) + 1
    assert_close(out.logits, apart.logits, 1e-12)
    assert_close(got, gradients(s), TIGHT)


@pytest.mark.parametrize("shape", ["diamond", "passes"])
def test_each_sequence_of_a_shared_forward_is_clipped(shape):
    """By its question's answer, whoever's turn it is."""
    found = []
    for clip, together in ((0.05, True), (0.05, False), (None, True)):
        s = system(agents=SHAPES[shape], latent_grad_clip=clip)
        s.together = together
        s(QUESTIONS, ANSWERS).loss.backward()
        found.append(gradients(s))
    assert_close(found[0], found[1], TIGHT)
    assert any((found[2][n] - g).abs().max() > 1e-2 * g.abs().max() for n, g in found[0].items())


def test_who_cannot_share_a_forward():
    """Agents of which some learn, and that take their steps in another way; those of other adapters can (test_adapter_rows)."""
    four = [agent(name, 1, []) for name in ("a", "b", "c", "d")] + [agent("solver", 0, None)]
    groups = lambda s: Board(s, Trace(s.model)).groups  # noqa: E731
    assert groups(system(agents=four)) == [[0, 1, 2, 3]]
    assert groups(system(agents=four, grad_scope="last_k", last_k=3)) == [[0, 1], [2, 3]]
    mixed = [replace(four[0], passes=2), replace(four[1], stop_change=0.1), *four[2:]]
    assert groups(system(agents=mixed)) == [[0], [1], [2, 3]]
    roles = [replace(a, role="x" if a.name in "ac" else "y") for a in four]
    s = MultiAgentSystem(roles_model(("x", "y")), tokenizer(), roles, adapter_scope="per_role")
    assert groups(s) == [[0, 1, 2, 3]]
    s(QUESTIONS, ANSWERS).loss.backward()
    grads = gradients(s)
    shared = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), four)
    shared(QUESTIONS, ANSWERS).loss.backward()
    norms = [sum(float(g.square().sum()) for n, g in grads.items() if f".{role}." in n) for role in "xy"]
    assert min(norms) > 0
    for name, g in gradients(shared).items():  # roles of equal weights: their gradients are parts of the shared one's
        assert_close(grads[name.replace("default", "x")] + grads[name.replace("default", "y")], g, TIGHT)


@pytest.mark.parametrize("scope, learns", [("full", "abc"), ("detach_trace", ""), ("last_k", "c")])
def test_grad_scope(scope, learns):
    """The loss does not know it; who is left out gets no gradient."""
    agents = [*SHAPES["diamond"][:3], agent("solver", 0, ["b", "c"])]
    last = dict(last_k=2) if scope == "last_k" else {}
    s = MultiAgentSystem(roles_model(("a", "b", "c", "solver")), tokenizer(), agents, adapter_scope="per_role",
                         grad_scope=scope, trace_content="latent_only", **last)  # fmt: skip
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = {name: g for name, g in gradients(s).items() if g.abs().max() > 0}
    assert {r for r in ("a", "b", "c", "solver") if any(f".{r}." in n for n in got)} == {*learns, "solver"}


def test_ragged_batches_equal_single_runs():
    """Each question with its own T, and agents that have no turn."""
    agents = [
        replace(SHAPES["diamond"][0], latent_steps="a"),
        replace(SHAPES["diamond"][1], latent_steps="b"),
        *SHAPES["diamond"][2:],
    ]
    rows = [{"question": q, "a": a, "b": b} for q, a, b in zip(QUESTIONS, (2, 0, 1), (0, 3, 1))]
    for options in (dict(no_latents="skip"), dict(trace_content="latent_only")):
        s = system(agents=agents, **options)
        out = s(rows, ANSWERS)
        out.loss.backward()
        got, total = gradients(s), 0.0
        for b, (row, answer) in enumerate(zip(rows, ANSWERS)):
            alone = s([row], [answer], num_items_in_batch=1)
            total = total + alone.loss
            assert out.trace.next_positions[b] == alone.trace.next_positions[0]
            assert out.trace.positions(b).tolist() == alone.trace.positions(0).tolist()
        (total / int((out.labels != -100).sum())).backward()
        assert_close(got, gradients(s), TIGHT)


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(system(agents=SHAPES["tree"], trace_content="latent_only").train())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(system(agents=SHAPES["unlike"], trace_content="latent_only"))


def test_a_gradient_report_tells_agents_apart():
    s = system(agents=SHAPES["parallel"])
    report = s.gradient_report(QUESTIONS, ANSWERS)
    assert s.together
    assert [(p.agent, p.step) for p in report.passes if p.kind == "latent"] == [
        (n, t) for n, T in (("a", 3), ("b", 2)) for t in range(1, T + 1)
    ]
    s(QUESTIONS, ANSWERS).loss.backward()
    assert report.norm == pytest.approx(sum(float(g.square().sum()) for g in gradients(s).values()) ** 0.5)


# ---- positions, and what is on a trace -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_checked_is_where_agents_end_up(shape, options, monkeypatch):
    s = system(agents=SHAPES[shape], **options)
    starts, fits = [], prompts.prompt_that_fits
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "prompt_that_fits", lambda system, agent, b, fields, at, *rest: (
            starts.append((agent.name, b, at)), fits(system, agent, b, fields, at, *rest))[1])  # fmt: skip
        s.tokenize(s.fields_of(QUESTIONS), [0] * 3)
    board, found, asked = Board(s, Trace(s.model, 3)), [], s.fields_of(QUESTIONS)
    with torch.no_grad():
        for group in board.groups:
            found += [(s.agents[i].name, b, at) for i in group for b, at in enumerate(board.read(i, asked).next_positions)]
            board.write(group, asked)
    found += [("solver", b, at) for b, at in enumerate(board.read(len(s.agents) - 1, asked).next_positions)]
    assert sorted(starts) == sorted(found)


def test_a_memory_that_everybody_reads():
    """What is on the trace already stands before all, whole."""
    s = system(agents=SHAPES["parallel"], trace_content="latent_only")
    memory = s.think(Agent("memory", "w30 w31 w32 w33 w34 w35", 2), s.fields_of(QUESTIONS), Trace(s.model, 3))
    first = [x._replace(sequence=0) for x in memory.segments if x.sequence == 0]
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS), memory.fork(1)[0])
    row = [x for x in trace.segments if x.sequence == 0]
    assert row[: len(first)] == first
    assert [(x.agent, x.kind, x.length) for x in row[len(first) :]] == [("a", "latent", 3), ("b", "latent", 2)]
    at_b = memory.next_positions[0] + len(s.prompt_ids(s.agents[1], {"question": QUESTIONS[0]}))
    assert row[-1].position == at_b and trace.positions(0)[-1] + 1 == trace.next_positions[0]


def test_questions_that_leave():
    """Between two turns; the others go on as they would have."""
    for shape in ("diamond", "tree"):
        s, stay = system(agents=SHAPES[shape], trace_content="latent_only"), [2, 0]
        found = []
        for leaving in (True, False):
            questions = s.fields_of(QUESTIONS if leaving else [QUESTIONS[b] for b in stay])
            board = Board(s, Trace(s.model, len(questions)))
            with torch.no_grad():
                for n, group in enumerate(board.groups):
                    board.write(group, questions)
                    if leaving and n == 0:
                        board.select(stay)
                        questions = [questions[b] for b in stay]
                trace = board.read(len(s.agents) - 1, questions)
            found.append([trace.keys_values(1, b)[0] for b in range(2)])
            assert board.written(0).lengths == [2 + 3, 2 + 4]  # latent steps, and as many sinks as there are tokens
        for got, want in zip(*found):
            assert_close(got, want, 1e-12)


def test_rows_that_nobody_reads_are_free():
    s = system(agents=SHAPES["parallel"], trace_content="latent_only", sinks=0)
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    assert trace.lengths == [5] * 3 and trace.rows == 15
    assert len(patch_of(s.model).layers) == len(trace)
