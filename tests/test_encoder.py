"""What another model has encoded as latent rows, against a plain loop, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loops import check_checkpointing, check_compiled, check_loss, loop_loss
from models import assert_close, build, make_config, with_lora
from systems import ANSWERS, QUESTIONS, exact_norms, tokenizer
from test_other_models import TIGHT, Loop, greedy, randomized
from tiny_systems import model as tiny_model
from transformers import BertConfig, BertModel
from two_models import exact_rotary, pieces

from diffmas import Agent, MultiAgentSystem
from diffmas.agents import Encoder
from diffmas.cli.build import other_of
from diffmas.cli.config import Config, OtherModel
from diffmas.cli.plain_data import parsed
from diffmas.evaluation import TextAgents

READER, SOLVER = Agent("reader", "w5 {question}", model="bert"), Agent("solver", "w9 {question}")
SHAPES = {
    "chain": [READER, SOLVER],
    "thinks on": [Agent("own", "w8", 1), Agent("reader", "w5 {question}", 2, model="bert"), SOLVER],
    "graph": [
        Agent("own", "w8 w7", 1, reads=[]), Agent("reader", "w5 {question}", 1, model="bert", reads=["own"]),
        Agent("other", "{question} w4", model="bert", reads=[]), Agent("solver", "w9 {question}", reads=["other", "reader"]),
    ],
}  # fmt: skip


def bert(seed=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=80, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).double().eval()


def receiver():
    return exact_rotary(exact_norms(build(make_config("qwen3"))))


def team(agents=SHAPES["chain"], encodes=None, hidden=None, **options):
    model = with_lora(receiver())
    encoder = Encoder(encodes or bert(), pieces(), model, hidden).double()
    randomized(encoder.map)
    return MultiAgentSystem(model, tokenizer(), agents, others={"bert": encoder}, **{"sinks": 0, **options})


class Encoded(Loop):
    def inputs(self, agent):
        ids, encoder = super().inputs(agent), self.s.member(agent)
        if encoder is self.s:
            return ids
        x = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].detach()
        x = x @ encoder.map[0].weight.T + encoder.map[0].bias
        return x if encoder.hidden is None else F.gelu(x) @ encoder.map[2].weight.T + encoder.map[2].bias


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("shape, content", [*((shape, "all") for shape in SHAPES), ("graph", "latent_only")])
def test_loss_and_every_gradient_equal_the_loop(shape, content, hidden):
    s = team(SHAPES[shape], hidden=hidden, trace_content=content)
    _, got = check_loss(s, Encoded)
    assert all(name.startswith(("others.bert.map.", "model.")) for name in got) and len(got) > 2


def test_greedy_tokens_and_single_runs():
    s = team(SHAPES["graph"])
    with torch.no_grad():
        want = [greedy(s, question, 5, Encoded) for question in QUESTIONS]
    got = s.generate_tokens(QUESTIONS, max_new_tokens=5, temperature=0)
    assert [tokens for (tokens,) in got] == want
    for question, tokens in zip(QUESTIONS, got):
        assert s.generate_tokens([question], max_new_tokens=5, temperature=0) == [tokens]


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(team(SHAPES["graph"]).train())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(team(SHAPES["graph"]))


def test_its_rows_are_latent_ones_and_where_the_prompt_was_planned():
    """They are handed on where prompts are not; an agent without latent steps has its turn for them."""
    agents = [Agent("own", "w8 w7", 2), *SHAPES["chain"]]
    for options in (dict(positions="reindex"), dict(no_latents="skip"), dict(sinks=1, positions="reindex")):
        s = team(agents, trace_content="latent_only", **options)
        fields = s.fields_of(QUESTIONS)
        trace = s.communicate(fields)
        rows = [x for x in trace.segments if x.agent == "reader"]
        assert {x.kind for x in rows} == {"latent"} and [x.length for x in rows] == [5, 9, 3]
        turns = s.tokenize(fields, [1] * 3)
        s.model.config.max_position_embeddings = max(trace.next_positions) + len(turns[-1][1].ids) + 1
        s.tokenize(fields, [1] * 3)
        with pytest.raises(ValueError, match=r"questions\[1\], agent 'solver': expected its prompt to fit"):
            s.tokenize(fields, [2] * 3)


def test_a_causal_lm_gives_soft_tokens(tmp_path):
    """Its body is what is kept, and what is saved tells it from another."""
    small = tiny_model(1, torch.float64, vocab_size=80).eval()
    s = team(encodes=small, hidden=5)
    assert s.others["bert"].model is small.model
    loss = s(QUESTIONS, ANSWERS).loss
    assert_close(loss, loop_loss(s, Encoded), 1e-6)  # its norms are transformers' own, in float32
    s.save_pretrained(tmp_path)
    again = tiny_model(1, torch.float64, vocab_size=80).eval()
    loaded = MultiAgentSystem.from_pretrained(tmp_path, receiver(), others={"bert": again})
    assert loaded.describe() == s.describe()
    assert_close(loaded(QUESTIONS, ANSWERS).loss, loss, TIGHT)
    with torch.no_grad():
        s.others["bert"].map[0].weight.add_(1.0)
    s.load_weights(tmp_path)
    assert_close(s(QUESTIONS, ANSWERS).loss, loss, TIGHT)
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(tmp_path, receiver(), others={"bert": tiny_model(2, torch.float64, vocab_size=80)})


def test_an_encoder_by_config(tmp_path):
    bert().float().save_pretrained(tmp_path / "bert")
    pieces().save_pretrained(tmp_path / "bert")
    agents = [{"name": "reader", "prompt": "w5", "model": "bert"}, {"name": "solver", "prompt": "w9"}]
    others = {"bert": {"model": str(tmp_path / "bert"), "projector": {"kind": "encoder", "hidden": 6}}}
    settings = parsed(Config, {"model": "x", "agents": agents, "others": others})
    model = build(make_config("qwen3"), torch.float32)
    encoder = other_of(settings.others["bert"], settings, model)
    s = MultiAgentSystem(model, tokenizer(), settings.agents, others={"bert": encoder})
    s.save_pretrained(tmp_path / "team")
    loaded = MultiAgentSystem.from_pretrained(tmp_path / "team", build(make_config("qwen3"), torch.float32))
    assert_close(loaded(["w3"], ["w4"]).loss, s(["w3"], ["w4"]).loss, 1e-6)
    for option in ({"lora": True}, {"realign": "norm"}):
        described = OtherModel(**{**others["bert"], **option})
        with pytest.raises(ValueError, match=f"others: {next(iter(option))}: expected none with an encoder"):
            other_of(described, settings, model)


def test_the_frozen_model_has_no_dropout():
    encodes = bert().train()
    assert encodes.config.hidden_dropout_prob > 0
    s = team(encodes=encodes)
    with torch.no_grad():
        wanted = s.eval()(QUESTIONS, ANSWERS).loss
        assert torch.equal(s.train()(QUESTIONS, ANSWERS).loss, wanted)  # the receiver has none
        fresh = team(encodes=bert().train())  # as it was constructed
        assert torch.equal(fresh(QUESTIONS, ANSWERS).loss, wanted)
    encoder = s.others["bert"]
    assert encoder.training and encoder.map.training and not any(m.training for m in encoder.model.modules())


def test_text_agents_write_with_the_systems_model():
    """An encoder writes nothing: its agent reads and writes as one of the system's own."""
    s = team(SHAPES["graph"])
    alone = MultiAgentSystem(s.model, tokenizer(), [replace(agent, model=None) for agent in s.agents])
    turns, answers = TextAgents(s, 4).write(QUESTIONS, max_new_tokens=3, temperature=0, seed=0)
    wanted, same = TextAgents(alone, 4).write(QUESTIONS, max_new_tokens=3, temperature=0, seed=0)
    assert [turn.texts for turn in turns] == [turn.texts for turn in wanted] and answers.texts == same.texts
    assert all(any(turn.texts) for turn in turns)


def test_what_does_not_fit_is_refused():
    s = team()
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1 or None, got 0"):
        Encoder(bert(), pieces(), s.model, 0)
    narrow = Encoder(bert(), pieces(), tiny_model())
    with pytest.raises(ValueError, match="others, 'bert': encoder: expected one that maps to 32 values, .* got 16"):
        MultiAgentSystem(s.model, tokenizer(), SHAPES["chain"], others={"bert": narrow})
    with pytest.raises(ValueError, match="agent 'reader': model: expected None for who answers, got 'bert'"):
        MultiAgentSystem(s.model, tokenizer(), [READER], others={"bert": s.others["bert"]})
    s.others["bert"].model.config.max_position_embeddings = 2
    message = r"questions\[0\], agent 'reader': expected its prompt to fit in the 2 positions of 'bert', got 5 tokens"
    with pytest.raises(ValueError, match=message):
        s(QUESTIONS, ANSWERS)
