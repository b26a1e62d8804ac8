"""Rows that a reader has learned to choose, against a plain loop that chooses and gates them."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import check_compiled, check_greedy_tokens, check_loss
from models import assert_close, body, gradients, tiny
from systems import ANSWERS, QUESTIONS, system, tokenizer
from test_graph import TIGHT, agent, exact
from test_selection import FIRST, LATENT, RAGGED, REINDEX, Choosing, check_single_runs, of, ragged, solver

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.file import CHOICES_FILE
from diffmas.evaluation.baselines import Stitched
from diffmas.serving.export import export
from diffmas.trace.views import rows_of


def learned(name, rows, positions=None, **select):
    return of(name, positions, rows=rows, by="learned", **select)


SHAPES = {
    "one": [*FIRST, solver(learned("a", 2), "b")],
    "two": [*FIRST, solver(learned("b", 2, "keep", every=2), learned("a", 3, "reindex"))],
    "in turns": [
        FIRST[0], agent("b", 3, [learned("a", 3, kind="latent")]),
        agent("c", 2, [learned("a", 2, layers=[0, 2]), of("b", heads=[1])], max_rows=10),
        solver(learned("b", 1, "same_branch"), learned("c", 2, heads=[0]), of("a", rows=1, by="attention")),
    ],
    "budget": [*FIRST, solver(learned("a", 4), "b", max_rows=9, max_rows_by="attention")],
    "all": [*FIRST, solver(learned("a", 1000), "b")],
    "asked": [*FIRST, solver(learned("a", 2, of="question"), learned("b", 1))],
    "asked in turns": [
        FIRST[0], agent("b", 3, [learned("a", 3, of="question")]),
        solver(learned("b", 2, "reindex", of="question"), learned("a", 2, kind="latent", of="question")),
    ],
}  # fmt: skip


def chosen_by(agents, **options):
    """A team whose edges have learned something; in eval mode, without noise."""
    s = exact(system(agents=agents, **options)).eval()
    s.choices.double()
    generator = torch.Generator().manual_seed(3)
    for w in s.choices.parameters():
        scale = 1 if w.dim() == 1 else 0.25  # a gate that is shut or open has no gradient
        w.data.copy_(scale * torch.randn(w.shape, generator=generator, dtype=w.dtype))
    return s


def once(method):
    """Asked again, a loop knows: it would have to go through all agents before for each row."""

    def known(self, *args):
        key = method.__name__, args, self.measuring, torch.is_grad_enabled()
        if key not in self.known:
            self.known[key] = method(self, *args)
        return self.known[key]

    return known


class Learned(Choosing):
    """The gate of a row: as if it had multiplied its values, which it does not change."""

    layout, handed, turn, attention = map(once, (Choosing.layout, Choosing.handed, Choosing.turn, Choosing.attention))

    def __init__(self, *args):
        super().__init__(*args)
        self.known = {}

    def logit(self, i, j, values):
        """values: by layer, [Hkv, D]."""
        choices, name = self.s.choices, f"{i}_reads_{j}"
        v = torch.cat([v.flatten() / v.norm() for v in values])
        logit = choices.weights[name] @ v
        if name in choices.of_questions:
            logit = logit + (choices.of_questions[name] @ self.asked(i)) @ (choices.of_rows[name] @ v)
        return logit

    @torch.no_grad()
    def asked(self, i):
        _, own = self.forward(body(self.s.model), [], self.prompt(i), 5)
        return torch.cat([F.normalize(v[0].sum(1).flatten(), dim=0) for _, v in own])

    def chosen(self, i, j):
        self.handed(j)  # which asks for other edges
        self.edge = i, j
        return super().chosen(i, j)

    def best(self, i, tokens, rows, by):
        if by != "learned":
            return super().best(i, tokens, rows, by)
        if self.measuring == i:
            return tokens
        edge = self.edge
        with torch.no_grad():
            logits = {x: float(self.logit(*edge, [v[0, :, x[1]] for _, v in self.turn(x[0], 0)])) for x in tokens}
            good = sorted(tokens, key=lambda x: -logits[x])[:rows]
        return [x for x in tokens if x in good]

    def rows(self, i, move):
        """The loop's, but with gates on the rows of edges that have learned."""
        layers = super().rows(i, move)
        seen = self.seen.pop(id(layers))[1] if id(layers) in self.seen else []
        layout = self.layout(i)[0]
        factors = []
        for t, token in enumerate(layout):
            j = self.owner(i, token)
            if j is None:
                factors.append(torch.ones((), dtype=torch.float64))
            else:
                g = self.logit(i, j, [v[0, :, t] for _, v in layers]).sigmoid()
                factors.append(1 + (g - g.detach()))
        if factors:
            by_row = torch.stack(factors)[:, None]
            layers = [(k, v * by_row) for k, v in layers]
        self.seen[id(layers)] = layers, seen
        return layers

    def owner(self, i, token):
        for read in self.s.agents[i].reads or ():
            j = self.number[read.agent]
            if read.select and read.select.by == "learned" and token[:2] in [x[:2] for x in self.handed(j)[self.s.sinks :]]:
                return j


# ---- loss, gradients, tokens, batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, options", [(x, LATENT) for x in SHAPES] + [("one", {}), ("two", REINDEX)], ids=str)
def test_loss_and_gradients_equal_the_loop(shape, options):
    s = chosen_by(SHAPES[shape], **options)
    _, got = check_loss(s, Learned)
    names = {name for name in got if name.startswith("choices.")}
    assert names == {f"choices.{name}" for name in s.choices.state_dict()} and names
    assert all(got[name].abs().max() > 1e-6 for name in names)


def test_generated_tokens():
    check_greedy_tokens(chosen_by(SHAPES["two"], **LATENT), Learned)


@pytest.mark.parametrize("shape", ["two", "asked in turns"])
def test_ragged_batches_equal_single_runs(shape):
    """Though some questions leave nothing to choose, or have nobody who asks."""
    agents = ragged(SHAPES[shape])
    check_single_runs(chosen_by(agents, **LATENT, no_latents="skip", sinks=1), RAGGED)


@pytest.mark.parametrize("shape", ["one", "asked"])
@pytest.mark.parametrize("how", ["detach_trace", "checkpointed"])
def test_ways_to_train(how, shape):
    """What is cut off from the agents before learns to choose all the same."""
    s = chosen_by(SHAPES[shape], grad_scope="detach_trace" if how == "detach_trace" else "full")
    s(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(s)
    if how == "checkpointed":
        s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        s.model.train()
        s(QUESTIONS, ANSWERS).loss.backward()
        assert_close(gradients(s), want, TIGHT)
    assert all(want[f"choices.{name}"].abs().max() > 1e-6 for name in s.choices.state_dict())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(chosen_by(SHAPES["asked in turns"], **LATENT).train())


# ---- what is chosen --------------------------------------------------------------------------------------------------


def rows_chosen(s):
    """Of the latent rows of agent a, by question, those that the solver reads."""
    trace = s.communicate(s.fields_of(QUESTIONS))
    first = {x.sequence: x.position for x in reversed(trace.segments) if x.agent == "a"}
    assert first
    return [
        tuple(p for x in trace.segments if x.sequence == b and x.agent == "a" and x.kind == "latent"
              for p in range(x.position, x.position + x.length))
        for b in range(len(QUESTIONS))
    ]  # fmt: skip


def test_noise_is_for_training_alone():
    """Then each pair of rows has its odds, those of a draw by softmax(logits / temperature) without replacement."""
    s = system(agents=[agent("a", 3, []), solver(learned("a", 1, temperature=0.5))], **LATENT)
    s.choices.double()
    s.choices.weights["1_reads_0"].data.copy_(torch.randn(48, generator=torch.Generator().manual_seed(5)) * 0.4)
    s.eval()
    want = rows_chosen(s)
    with torch.no_grad():
        assert rows_chosen(s.train()) == want
        unit = s.think(s.agents[0], s.fields_of(QUESTIONS[:1]), Trace(s.model, 1)).keep(kind="latent", sinks=0)
        rows = rows_of(unit.segments)
        logits = torch.from_numpy(s.choices.scores(1, 0, unit, 0.5)[0](rows))
    torch.manual_seed(0)
    draws = [int(np.argmax(s.choices.scores(1, 0, unit, 0.5)[0](rows))) for _ in range(4000)]
    odds = torch.bincount(torch.tensor(draws), minlength=3) / len(draws)
    assert (odds - (logits / 0.5).softmax(0)).abs().max() < 0.03 and odds.max() - odds.min() > 0.1
    assert len({rows_chosen(s)[1] for _ in range(30)}) > 1
    s.agents[1] = solver(learned("a", 1, temperature=0))
    assert rows_chosen(s) == want


def test_before_it_has_learned_the_last_rows_are_chosen():
    """And a choice leaves rows as views where nobody learns."""
    s = system(agents=[*FIRST, solver(learned("a", 2), learned("b", 1, of="question"))]).eval()
    last = system(agents=[*FIRST, solver(of("a", rows=2), of("b", rows=1))]).eval()
    with torch.no_grad():
        got, want = (x.communicate(x.fields_of(QUESTIONS)) for x in (s, last))
    assert got.segments == want.segments and got.rows == want.rows
    assert_close(s(QUESTIONS, ANSWERS).logits, last(QUESTIONS, ANSWERS).logits, 1e-12)  # copies of the same numbers


def test_a_gradient_report_leaves_the_random_state():
    s = system(agents=SHAPES["one"]).train()
    state = torch.get_rng_state()
    assert s.gradient_report(QUESTIONS, ANSWERS).norm > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_it_learns_which_rows_say_something():
    """One word of five is the answer, somewhere; the solver reads one row, and has 20 of 100 by chance. In a model of one layer
    a row holds its own word alone."""
    draw = random.Random(0)

    def questions(count):
        made = []
        for _ in range(count):
            words, at = [f"w{draw.randrange(30, 40)}" for _ in range(5)], draw.randrange(5)
            words[at] = f"w{draw.randrange(10, 16)}"
            made.append((" ".join(words), words[at], at))
        return zip(*made)

    def hits(count=100):
        asked, _, places = questions(count)
        with evaluating(s), torch.no_grad():
            trace = s.communicate(s.fields_of(list(asked)))
        assert trace.lengths == [1] * count
        return sum(x.position == at for x, at in zip(trace.segments, places))

    model = tiny("qwen3", torch.float32, patch=False, num_hidden_layers=1, head_dim=16)
    agents = [Agent("reader", "{question}", reads=[]), Agent("solver", "w9", reads=[learned("reader", 1)])]
    s = MultiAgentSystem(model, tokenizer(), agents, sinks=0).train()
    assert hits() < 40
    torch.manual_seed(0)
    own = {"params": s.choices.parameters(), "lr": 2e-2}
    optimizer = torch.optim.Adam([{"params": s.model.parameters()}, own], lr=5e-3)
    for _ in range(100):
        asked, answers, _ = questions(16)
        optimizer.zero_grad()
        s(list(asked), list(answers)).loss.backward()
        optimizer.step()
    assert hits() > 90


def kinds(draw, count):
    """Two words, one of each kind, and the kind that is asked for."""
    made = []
    for _ in range(count):
        words = [f"w{10 + 6 * kind + draw.randrange(6)}" for kind in range(2)]
        kind, order = draw.randrange(2), draw.sample(range(2), 2)
        asked = {"words": " ".join(words[k] for k in order), "kind": f"w{50 + kind}"}
        made.append((asked, words[kind], order.index(kind)))
    return zip(*made)


@pytest.mark.parametrize("asks", [True, False], ids=["of the question", "of rows alone"])
def test_which_row_says_something_may_be_up_to_the_question(asks):
    """Who writes the rows does not know what is asked. A choice by rows alone has every other one by chance."""
    draw = random.Random(0)
    model = tiny("qwen3", torch.float32, patch=False, num_hidden_layers=1, head_dim=16)
    read = learned("reader", 1, **({"of": "question"} if asks else {}))
    agents = [Agent("reader", "{words}", reads=[]), Agent("solver", "w9 {kind}", reads=[read])]
    torch.manual_seed(0)
    s = MultiAgentSystem(model, tokenizer(), agents, sinks=0).train()
    own = {"params": s.choices.parameters(), "lr": 2e-2}
    optimizer = torch.optim.Adam([{"params": s.model.parameters()}, own], lr=1e-2)
    for _ in range(100):
        asked, answers, _ = kinds(draw, 16)
        optimizer.zero_grad()
        s(list(asked), list(answers)).loss.backward()
        optimizer.step()
    asked, _, places = kinds(draw, 100)
    with evaluating(s), torch.no_grad():
        trace = s.communicate(list(asked))
    assert trace.lengths == [1] * 100
    hits = sum(x.position == at for x, at in zip(trace.segments, places))
    assert hits > 85 if asks else hits < 65


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_what_was_learned_is_saved_and_loaded(tmp_path):
    s = system(agents=SHAPES["asked"], dtype=torch.float32)
    for w in s.choices.parameters():
        w.data.normal_()
    s.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "agents.json").read_text())
    assert described["agents"][2]["reads"][0]["select"] == {"rows": 2, "by": "learned", "of": "question"}
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", torch.float32, patch=False), tokenizer())
    want = s.choices.state_dict()
    assert len(want) == 4 and all(torch.equal(x, want[name]) for name, x in loaded.choices.state_dict().items())
    for w in s.choices.parameters():
        w.data.zero_()
    s.load_weights(tmp_path)
    assert all(torch.equal(x, loaded.choices.state_dict()[name]) for name, x in s.choices.state_dict().items())
    out = export(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", base="base")
    assert (out / CHOICES_FILE).read_bytes() == (tmp_path / CHOICES_FILE).read_bytes()
    (tmp_path / CHOICES_FILE).unlink()
    with pytest.raises(ValueError, match="choices.safetensors: expected a file of weights, found none"):
        s.load_weights(tmp_path)
    plain = system(agents=FIRST + [solver("a", "b")], dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / CHOICES_FILE).exists() and not plain.choices.state_dict()


def test_stitched_agents_learn_the_edges_that_they_have(tmp_path):
    """Not those that their `reads` say."""
    team = system(agents=SHAPES["asked"], dtype=torch.float32)
    stitched = Stitched(team.model, team.tokenizer, team.agents)
    assert not stitched.choices.state_dict() and not list(stitched.choices.parameters())
    stitched.save_pretrained(tmp_path / "team")
    out = export(tmp_path / "team", tmp_path / "out", base="base")
    assert not (tmp_path / "team" / CHOICES_FILE).exists() and not (out / CHOICES_FILE).exists()
    loaded = Stitched.from_pretrained(out, tiny("qwen3", torch.float32, patch=False), tokenizer())
    assert loaded.agents == team.agents


@pytest.mark.parametrize(
    "select, message",
    [
        ({"by": "learned"}, "by: expected None without rows, got 'learned'"),
        ({"rows": 2, "temperature": 1.0}, "temperature: expected None but with by='learned', got 1.0"),
        ({"rows": 2, "of": "question"}, "of: expected None but with by='learned', got 'question'"),
        ({"rows": 2, "by": "learned", "of": "rows"}, "of: expected 'question' or None, got 'rows'"),
        ({"rows": 2, "by": "learned", "temperature": -1}, "temperature: expected a number >= 0 or None, got -1"),
        ({"rows": 2, "by": "learned", "temperature": "hot"}, "temperature: expected a number >= 0 or None, got 'hot'"),
    ],
)
def test_choices_that_are_none(select, message):
    with pytest.raises(ValueError, match=f"agent 'b': reads: a: select: {message}"):
        Agent("b", "x", reads=[{"agent": "a", "select": select}])


def test_choices_that_cannot_be_learned():
    with pytest.raises(ValueError, match="agent 'b': max_rows_by: expected one of .* got 'learned'"):
        Agent("b", "x", max_rows=9, max_rows_by="learned")
    agents = [agent("a", 2, [], quantized="int8"), solver(learned("a", 2))]
    message = "agent 'solver': reads: a: select: by: expected another choice than learned of quantised rows"
    with pytest.raises(ValueError, match=message):
        system(agents=agents)
