"""Agents that write text: against a plain loop that decodes and recomputes; in batches, in files, and who refuses them."""

import math
from dataclasses import replace

import pytest
import test_graph
import torch
from loops import check_checkpointing, check_compiled, check_greedy_tokens, check_loss, loop_loss
from models import assert_close, body, gradients
from systems import ANSWERS, QUESTIONS, roles_model, system, tokenizer
from test_graph import TIGHT, agent, at, exact

from diffmas import MultiAgentSystem, Trace
from diffmas.agents.board import Board
from diffmas.agents.latent_check import unlike_tokens
from diffmas.agents.meter import measuring
from diffmas.agents.sampling import Sampling
from diffmas.evaluation import audit, evaluate
from diffmas.evaluation.baselines import Latent, TextAgents
from diffmas.evaluation.causal_audit import conditions_of
from diffmas.evaluation.look import look_at
from diffmas.models.parts import causal_lm_of

TEXT, BOTH = dict(max_message_tokens=5), dict(max_message_tokens=4)
SHAPES = {
    "chain": [agent("a", 0, None, **TEXT), agent("b", 2, None, **BOTH), agent("c", 2, None), agent("solver", 0, None)],
    "parallel": [agent("a", 0, [], **TEXT), agent("b", 2, [], **BOTH), agent("solver", 0, ["b", "a"])],
    "tree": [
        agent("a", 2, []), agent("b", 0, [], **TEXT), agent("c", 1, [at("b", "keep"), at("a", "keep")], **BOTH),
        agent("solver", 0, ["c", at("b", "reindex")]),
    ],
    "passes": [agent("a", 4, [], passes=2, **BOTH), agent("b", 2, ["a"]), agent("solver", 0, ["b", "a"])],
}  # fmt: skip
LATENT = dict(trace_content="latent_only")
CONTENTS = [{}, LATENT, dict(trace_content="latent_only", sinks=2, positions="reindex")]


class Loop(test_graph.Loop):
    """A message's tokens are decoded anew for whoever asks, by the whole model over the agent's whole turn."""

    def __init__(self, s, question):
        super().__init__(s, question)
        self.said = {}

    def reads(self, i):
        if all(a.reads is None for a in self.s.agents) and self.s.positions == "keep":
            return [(j, "keep") for j in range(i)]
        return super().reads(i)

    @torch.no_grad()
    def message(self, j):
        """Greedy token ids, the end included."""
        who, lm = self.s.agents[j], causal_lm_of(self.s.model)
        if j not in self.said:
            self.said[j] = []
            for _ in range(who.max_message_tokens or 0):
                x = self.inputs(j, 0)
                out, _ = self.forward(self.s.model, self.rows(j, 0), x, self.layout(j)[1])
                self.said[j].append(int(out.logits[0, -1].argmax()))
                if self.said[j][-1] in torch.tensor(lm.generation_config.eos_token_id).flatten():
                    break
        return self.said[j]

    def wrote(self, j):
        _, first = self.layout(j)
        who = self.s.agents[j]
        n = len(self.s.prompt_ids(who, self.fields)) + who.latent_steps + len(self.message(j))
        return [(j, t, first + t) for t in range(n)], first + n

    def handed(self, j):
        before, (own, _) = self.layout(j)[0], self.wrote(j)
        sinks = (before + own)[: self.s.sinks]
        if self.s.trace_content == "latent_only":
            own = own[len(self.s.prompt_ids(self.s.agents[j], self.fields)) :]
        return sinks + [x for x in own if x not in sinks]

    def inputs(self, i, move):
        """Embeddings of agent i's prompt, latent steps and message so far."""
        s, who, kv = self.s, self.s.agents[i], self.rows(i, move)
        first, embed = self.layout(i)[1] + move, s.model.get_input_embeddings()
        prompt, T = embed(torch.tensor(s.prompt_ids(who, self.fields))), who.latent_steps
        last = lambda x: self.forward(body(s.model), kv, x, first)[0].last_hidden_state[0]  # noqa: E731
        x = prompt
        if who.passes:
            h0 = last(x)[-1:]
            h = h0.expand(T, -1)
            for _ in range(who.passes):
                x = torch.cat((prompt, s.realign(torch.cat((h0, h[:-1])))))
                h = last(x)[-T:]
        else:
            for _ in range(T):
                x = torch.cat((x, s.realign(last(x)[-1:])))
        return torch.cat((x, embed(torch.tensor(self.said.get(i, []), dtype=torch.long))))

    def turn(self, i, move):
        self.message(i)
        kv = self.rows(i, move)
        past = kv[0][0].shape[2] if kv else 0
        _, new = self.forward(body(self.s.model), kv, self.inputs(i, move), self.layout(i)[1] + move)
        return [(k[:, :, past:], v[:, :, past:]) for k, v in new]


def ending(s):
    """Of the same system, with an end that cuts some messages short: a token that a greedy message has."""
    told = Loop(s, QUESTIONS[0])
    j = next(j for j, a in enumerate(s.agents) if a.max_message_tokens)
    causal_lm_of(s.model).generation_config.eos_token_id = [63, told.message(j)[1]]
    return s


def team(shape, **options):
    return ending(exact(system(agents=SHAPES[shape], **options)))


def written(s, questions=QUESTIONS, **options):
    """Of each question, what each agent has said: token ids by agent."""
    with torch.no_grad():
        board = Board(s, Trace(s.model, len(questions)), **options)
        for group in board.groups:
            board.write(group, s.fields_of(questions))
    found = []
    for b in range(len(questions)):
        said = {}
        for i, who in enumerate(s.agents[:-1]):
            trace = board.written(i)
            kinds = [(x.agent, x.kind) for x in trace.segments if x.sequence == b for _ in range(x.length)]
            said[who.name] = [t for t, k in zip(trace.token_ids(b).tolist(), kinds) if k == (who.name, "text")]
        found.append(said)
    return found


# ---- against the loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_gradients_and_messages_equal_the_loop(shape, options):
    s = team(shape, **options)
    check_loss(s, Loop)
    said = written(s)
    for b, question in enumerate(QUESTIONS):
        loop = Loop(s, question)
        assert list(said[b].values()) == [loop.message(j) for j in range(len(s.agents) - 1)]
    if options == {} and shape in ("chain", "parallel"):
        lengths = [len(ids) for row in said for ids in row.values() if ids]
        assert len(set(lengths)) > 1  # some ended early


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_generated_tokens(shape):
    check_greedy_tokens(team(shape, trace_content="latent_only"), Loop)


def test_prompts_with_text_are_what_text_agents_write():
    """An agent that reads nobody writes what it does as a text agent."""
    s = ending(system(agents=SHAPES["parallel"], lora=False))
    turns, _ = TextAgents(s, 64).write(QUESTIONS, max_new_tokens=1, temperature=0)
    want = [s.text_of(row["a"]) for row in written(s)]
    assert turns[0].texts == want and turns[0].most == 5


def test_the_rows_of_a_message_learn():
    """They have a gradient; the choice has none, and neither has what is dropped."""
    s = MultiAgentSystem(roles_model(("a", "b", "solver")), tokenizer(), SHAPES["parallel"], adapter_scope="per_role",
                         trace_content="latent_only", sinks=0)  # fmt: skip
    s(QUESTIONS, ANSWERS).loss.backward()
    learns = [name for name, g in gradients(s).items() if g.abs().max() > 0]
    assert all(any(f".{role}." in name for name in learns) for role in ("a", "b"))


def test_branches_of_which_one_is_detached():
    """A message that one branch has read and learns through, and that a reader of both has as a constant."""
    s = team("tree", sinks=0)
    board = Board(s, Trace(s.model, len(QUESTIONS)))
    for group in board.groups:
        board.write(group, s.fields_of(QUESTIONS))
    constant, learning = board.written(1), board.written(2)
    found = {}
    for detached in (True, False):
        joined = Trace.join([learning, constant.detach() if detached else constant], ["shift", "reindex"])
        out = s(QUESTIONS, ANSWERS, trace=joined)
        out.loss.backward(retain_graph=True)
        found[detached] = gradients(s)

    class Joined(Loop):
        """The last agent reads them so, too."""

        def rows(self, i, move):
            layers = super().rows(i, move)
            if i < len(self.s.agents) - 1:
                return layers
            keep = torch.tensor([float(w != 1) for w, *_ in self.layout(i)[0]], dtype=torch.float64)[:, None]
            return [tuple(keep * x + (1 - keep) * x.detach() for x in layer) for layer in layers]

    want = loop_loss(s, Joined)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(found[True], gradients(s), TIGHT)
    assert any((found[True][n] - g).abs().max() > 1e-3 * g.abs().max() for n, g in found[False].items())


# ---- batches, modes --------------------------------------------------------------------------------------------------


def test_ragged_batches_equal_single_runs():
    """Each with its own T, agents without a turn, messages of other lengths; sampled ones too, by the question's seed."""
    agents = [replace(SHAPES["parallel"][0], latent_steps="a"), agent("b", "b", ["a"]), agent("solver", 0, ["b", "a"])]
    rows = [{"question": q, "a": a, "b": b} for q, a, b in zip(QUESTIONS, (2, 0, 1), (0, 3, 1))]
    for options in (dict(no_latents="skip"), dict(trace_content="latent_only")):
        s = system(agents=agents, **options)
        out = s(rows, ANSWERS)
        out.loss.backward()
        got, total = gradients(s), 0.0
        for b, (row, answer) in enumerate(zip(rows, ANSWERS)):
            alone = s([row], [answer], num_items_in_batch=1)
            total = total + alone.loss
            assert out.trace.positions(b).tolist() == alone.trace.positions(0).tolist()
        (total / int((out.labels != -100).sum())).backward()
        assert_close(got, gradients(s), TIGHT)
    sampled = [replace(a, message_temperature=1.5 if a.max_message_tokens else None) for a in SHAPES["parallel"]]
    s = system(agents=sampled)
    tokens = s.generate_tokens(QUESTIONS, max_new_tokens=3, temperature=0, seed=5)
    assert tokens == s.generate_tokens(QUESTIONS, max_new_tokens=3, temperature=0, seed=5, batch_size=1)
    seeds = [7, 8, 9]
    said = written(s, seeds=seeds)
    assert said == [written(s, [q], seeds=[seed])[0] for q, seed in zip(QUESTIONS, seeds)]
    assert said != written(s, seeds=[8, 9, 10]) and said != written(system(agents=SHAPES["parallel"]))
    assert written(s, [QUESTIONS[0]] * 2, seeds=[1, 2])[0] != written(s, [QUESTIONS[0]] * 2, seeds=[1, 2])[1]


def test_sampled_messages_of_training_follow_torchs_seed():
    s = system(agents=[replace(a, message_temperature=2.0 if a.max_message_tokens else None) for a in SHAPES["parallel"]])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(s(QUESTIONS, ANSWERS).loss.item())
    assert found[0] == found[1] != found[2]
    greedy = system(agents=SHAPES["parallel"])
    state = torch.get_rng_state()
    greedy(QUESTIONS, ANSWERS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", CONTENTS[:2], ids=str)
def test_agents_of_a_level_write_together(options):
    s = system(agents=SHAPES["parallel"], **options)
    assert Board(s, Trace(s.model)).groups == [[0, 1]]
    found = []
    for together in (True, False):
        s.together = together
        out = s(QUESTIONS, ANSWERS)
        out.loss.backward()
        found.append((out.loss, gradients(s)))
    assert_close(found[0][0], found[1][0], TIGHT)
    assert_close(found[0][1], found[1][1], TIGHT)
    apart = [SHAPES["parallel"][0], replace(SHAPES["parallel"][1], message_temperature=1.0), SHAPES["parallel"][2]]
    other = system(agents=apart)
    assert Board(other, Trace(other.model)).groups == [[0], [1]]


def test_checkpointing_gives_the_same_gradients():
    s = team("tree", trace_content="latent_only").train()
    check_checkpointing(s)
    assert all(m.training for m in s.modules())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(team("tree", trace_content="latent_only"))


def test_messages_that_are_given_back_their_rows():
    """What decoding has written is free when the message is on the trace."""
    s = system(agents=SHAPES["chain"])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    spare = sum(end - first for first, end in trace.held()[1])
    assert trace.rows == sum(trace.lengths) + spare


def test_where_agents_end_up_is_at_most_what_is_checked():
    s = team("tree")
    limit = causal_lm_of(s.model).config
    turns = s.tokenize(s.fields_of(QUESTIONS), [3] * 3)
    assert [[t.message for t in row] for row in turns] == [[0] * 3, [5] * 3, [4] * 3, [0] * 3]
    most = max(sum(row[b].most for row in turns) + 3 for b in range(3))
    limit.max_position_embeddings = most
    s.tokenize(s.fields_of(QUESTIONS), [3] * 3)
    limit.max_position_embeddings = 8
    with pytest.raises(ValueError, match="agent 'b': expected its prompt and 0 latent steps and a message of 5 tokens to fit"):
        s.tokenize(s.fields_of(QUESTIONS), [3] * 3)


def test_who_writes_has_a_turn_without_latent_steps():
    agents = [replace(SHAPES["chain"][2], latent_steps=0), *SHAPES["chain"][:2], SHAPES["chain"][3]]
    s = system(agents=agents, no_latents="skip")
    assert [bool(row[0].ids) for row in s.tokenize(s.fields_of(QUESTIONS), [0] * 3)] == [False, True, True, True]
    with torch.no_grad():
        assert {x.agent for x in s.communicate(s.fields_of(QUESTIONS)).segments} == {"a", "b"}


def test_a_reader_has_the_text_alone():
    """By kind; and a reader of the latent steps does not have it."""
    first = agent("a", 2, [], **TEXT)
    for kind, rows in (("text", 5), ("latent", 2)):
        s = system(agents=[first, agent("solver", 0, [{"agent": "a", "select": {"kind": kind}}])], sinks=0)
        with torch.no_grad():
            assert s.communicate(s.fields_of(QUESTIONS)).lengths == [rows] * 3


# ---- what is told of them --------------------------------------------------------------------------------------------


def test_costs():
    s = team("chain")
    tokens = sum(len(ids) for row in written(s) for ids in row.values())
    answers = Latent(s).answer(QUESTIONS, samples=2, max_new_tokens=2, temperature=0)
    decoded = s.generate_tokens(QUESTIONS, max_new_tokens=2, temperature=0, samples=2)
    assert answers.tokens == tokens + sum(len(x) for row in decoded for x in row)
    assert sum(answers.decoding.counts) == answers.tokens - tokens and answers.cost.rows["latent"] == 3 * (2 + 2)
    with measuring(s.device) as meter:
        s(QUESTIONS, ANSWERS)
    assert meter.cost.rows["decode"] == tokens and meter.cost.seconds["decode"] > 0


def test_a_gradient_report_and_a_look_tell_the_message():
    s = system(agents=[replace(a, message_temperature=1.0 if a.name == "a" else None) for a in SHAPES["chain"]])
    report = s.gradient_report(QUESTIONS, ANSWERS)
    kinds = [(p.agent, p.kind) for p in report.passes]
    assert kinds[:5] == [("a", "prompt"), ("a", "text"), ("b", "prompt"), ("b", "latent"), ("b", "latent")]
    assert kinds[5] == ("b", "text") and str(report.passes[5]) == "b, text"
    text = next(p for p in report.passes if p.kind == "text")
    assert sum(text.rows) > 0 and text.parameters is not None
    look = look_at(s, QUESTIONS[0], ANSWERS[0], max_new_tokens=3, seed=4)
    blocks = [(look.lanes[b.agent].name, b.kind, b.rows) for b in look.blocks]
    assert blocks[1][:2] == ("a", "text") and blocks[4] == ("b", "text", 4) and look.blocks[4].gradient is not None
    (said,) = written(s, QUESTIONS[:1], seeds=[4 * 1_000_003])
    assert "".join(look.blocks[1].texts).split() == s.tokenizer.decode(said["a"]).split()


def test_who_writes_is_not_silent():
    told = [unlike_tokens(system(agents=[replace(SHAPES["chain"][0], max_message_tokens=n), *SHAPES["chain"][2:]], **LATENT),
                          {"question": "w10"}) for n in (None, 5)]  # fmt: skip
    assert [any("nobody reads a" in line for line in lines) for lines in told] == [True, False]


def test_an_audit_exchanges_messages():
    s = team("parallel", trace_content="latent_only", sinks=0)
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    views = dict(conditions_of(trace, [1, 2, 0], "text", 0, 0, [0, 1, 2]))
    assert views["none", "a"].lengths < trace.lengths and ("other", "b") in views


SAMPLED = [replace(a, message_temperature=1.5 if a.max_message_tokens else None) for a in SHAPES["parallel"]]


def test_perplexity_and_audit_are_of_the_messages_that_the_seed_says():
    s, rows = system(agents=SAMPLED), [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS)]
    sampling = Sampling.of(s, seed=5)
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS), seeds=[sampling.seed_of(b) for b in range(3)])  # as generate does
        want = float(s(QUESTIONS, ANSWERS, 1, trace).loss)
    method = Latent(s)
    assert method.loss(QUESTIONS, ANSWERS, seed=5)[0] == pytest.approx(want, rel=1e-9)
    assert method.loss(QUESTIONS, ANSWERS, 1, 5)[0] == pytest.approx(want, rel=1e-9)
    assert method.loss(QUESTIONS, ANSWERS, seed=6)[0] != pytest.approx(want, rel=1e-6)
    options = dict(max_new_tokens=2, temperature=0.0, seed=5)
    (result,) = evaluate({"ours": method}, rows, **options)
    assert result.perplexity == pytest.approx(math.exp(want / sum(len(s.answer_ids(a)) for a in ANSWERS)), rel=1e-9)
    first, again = audit(s, rows, **options), audit(s, rows, batch_size=2, **options)
    assert [c.nlls for c in first] == [pytest.approx(c.nlls, rel=1e-6) for c in again]
    assert sum(first[0].nlls) == pytest.approx(want, rel=1e-5)


def test_text_agents_choose_words_as_in_their_team():
    """At the temperature of an agent's messages, greedily where it has none, and not at that of the answers."""
    said = lambda agents, seed, **options: [
        turn.texts for turn in TextAgents(system(agents=agents), 5).write(QUESTIONS, seed=seed, top_p=1.0, **options)[0][:2]
    ]
    hot, cold = dict(max_new_tokens=2, temperature=3.0), dict(max_new_tokens=2, temperature=0.0)
    assert said(SHAPES["parallel"], 1, **hot) == said(SHAPES["parallel"], 2, **hot) == said(SHAPES["parallel"], 1, **cold)
    assert said(SAMPLED, 1, **cold) == said(SAMPLED, 1, **hot) != said(SAMPLED, 2, **cold)
    method = TextAgents(system(agents=SAMPLED), 5)
    assert method.loss(QUESTIONS, ANSWERS, seed=1) == method.loss(QUESTIONS, ANSWERS, seed=1)
    assert method.loss(QUESTIONS, ANSWERS, seed=1) != method.loss(QUESTIONS, ANSWERS, seed=2)
