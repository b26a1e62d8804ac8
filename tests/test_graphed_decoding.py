"""Decoding whose forwards are replayed: the same logits, bit by bit, as by forwards one by one."""

import pytest
import torch
from failing_capture import check_a_capture_that_fails
from models import EOS, body
from systems import QUESTIONS, system

from diffmas import Agent, MultiAgentSystem
from diffmas.agents import decoding
from diffmas.models import next_tokens
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import views
from diffmas.trace.layer_work import LayerWork

AGENTS = [Agent("planner", "w5 {question} w6", 2), Agent("solver", "w9 {question}")]


@pytest.fixture(scope="module")
def s() -> MultiAgentSystem:
    return system(agents=AGENTS, dtype=torch.float32)


@pytest.fixture
def answers(s, monkeypatch):
    """(graphs, options) -> the tokens, and the logits that they came from."""
    patch_of(s.model).tries.clear()

    def run(graphs, questions=QUESTIONS, **options):
        patch_of(s.model).graphs, logits = graphs, []
        monkeypatch.setattr(decoding, "decoded", lambda t, x, tokens: logits.append(x))
        tokens = s.generate_tokens(questions, **{"max_new_tokens": 14, "temperature": 0, "eos_token_id": None, **options})
        return tokens, logits

    return run


def assert_as_eager(answers, **options):
    (got, logits), (want, plain) = (answers(graphs, **options) for graphs in (True, False))
    assert got == want and len(logits) == len(plain)
    assert all(map(torch.equal, logits, plain))
    return got


OPTIONS = {
    "greedy": {},
    "sampled": dict(temperature=1.5, top_p=0.9, seed=3),
    "samples": dict(temperature=1.5, seed=1, samples=3),
    "a rule that sees the text": dict(repetition_penalty=1.3, no_repeat_ngram_size=3),
    "one after the other": dict(batch_size=2),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_logits(options, answers, repeating):
    assert_as_eager(answers, **options)
    # Of 14 tokens the first comes from the prompt; four forwards show that the sequences stay together.
    assert [g.replays for g in repeating] == [14 - 1 - 3] * (2 if "batch_size" in options else 1)


def test_no_layer_runs_on_the_host(answers, repeating, monkeypatch):
    ran, attend = [], LayerWork.attend
    monkeypatch.setattr(LayerWork, "attend", lambda *args: ran.append(1) or attend(*args))
    counts = {n: answers(True, max_new_tokens=n) and (len(ran), ran.clear())[0] for n in (10, 40)}
    assert counts[10] == counts[40] and repeating[1].replays == 36


def test_sequences_that_leave(answers, repeating):
    """Those that stay are captured anew, when they have gone on for a while."""
    plain, _ = answers(False, max_new_tokens=30)
    ends = next([row[0][i]] for row in plain for i in range(9, 20) if sum(row[0][i] in other[0] for other in plain) == 1)
    tokens = assert_as_eager(answers, max_new_tokens=30, eos_token_id=ends)
    assert len({len(row[0]) for row in tokens}) == 2 and len(repeating) == 2
    assert all(g.replays for g in repeating)


def test_samples_share_their_prompt(answers, repeating, monkeypatch):
    monkeypatch.setattr(views, "SAVED_ROWS", 1)
    assert_as_eager(answers, samples=2, temperature=1.2, seed=5)
    assert [g.replays for g in repeating] == [10]


@pytest.mark.parametrize("rows, least, most", [(1, 0, 0), (7, 12, 55)])
def test_room_that_ends(rows, least, most, answers, repeating, monkeypatch):
    """Rows that lie elsewhere need another graph, and pools that must grow a forward of their own."""
    monkeypatch.setattr(next_tokens, "RESERVE", rows)
    monkeypatch.setattr(decoding, "RESERVE", rows)
    assert_as_eager(answers, max_new_tokens=60)
    assert least <= sum(g.replays for g in repeating) <= most


def test_pools_that_grow_at_the_end(answers, repeating, monkeypatch):
    """A sequence that goes on in the next row, where no pool has one yet."""
    monkeypatch.setattr(next_tokens, "RESERVE", 7)
    monkeypatch.setattr(decoding, "RESERVE", 7)
    assert_as_eager(answers, questions=QUESTIONS[:1], max_new_tokens=60)
    assert len(repeating) == 3 and sum(g.replays for g in repeating) > 40  # they grow twice


def keep_sinks(s, trace, fork):
    return trace.keep(agent="solver")


def grow_pools(s, trace, fork):
    before = trace.memory()
    fork.agent = "planner"
    ids = torch.arange(900)[None] % 50 + 2
    with torch.no_grad():
        forward(patch_of(s.model), fork, fork.plan([300, 300, 300], "prompt"), input_ids=ids)
    assert trace.memory() > before
    return trace


@pytest.mark.parametrize("change, captured", [(keep_sinks, 2), (grow_pools, 2)])
def test_what_changes_between_two_tokens(change, captured, s, repeating):
    """Another view of the same rows, at whose end the next one follows; pools that another trace makes grow."""
    found = []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        trace, tokens, logits = s.communicate(s.fields_of(QUESTIONS)), [5, 6, 7], []
        trace.agent, (fork,) = "solver", trace.fork(1)
        next_of = next_tokens.NextTokens(patch_of(s.model), s.device)
        for left in range(24, 0, -1):
            if left == 14:
                trace = change(s, trace, fork)
            with torch.no_grad():
                logits.append(next_of(trace, torch.tensor(tokens), left))
            tokens = logits[-1].argmax(-1).tolist()
        found.append(logits)
    assert all(map(torch.equal, *found)) and len(repeating) == captured


def test_stop_strings(answers, repeating):
    tokens, _ = answers(False, max_new_tokens=20)
    stop = f"w{tokens[0][0][9]} w{tokens[0][0][10]}"
    assert_as_eager(answers, max_new_tokens=20, stop=[stop])
    assert repeating


def test_nothing_is_captured(answers, repeating, s):
    assert_as_eager(answers, max_new_tokens=7)  # where few tokens are left
    handle = body(s.model).layers[1].register_forward_hook(lambda *_: None)
    assert_as_eager(answers)
    handle.remove()
    assert not repeating


def test_a_capture_that_fails(answers, repeating, monkeypatch, s):
    check_a_capture_that_fails(monkeypatch, s.model, lambda: assert_as_eager(answers), repeating)


def test_what_was_decoded_is_known(answers, repeating, s):
    """Rows and token ids of an answer, which a later turn goes on from."""
    found = []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        trace, tokens = s.communicate(s.fields_of(QUESTIONS)), [[5], [6], [7]]
        next_of = next_tokens.NextTokens(patch_of(s.model), s.device)
        with torch.no_grad():
            for left in range(12, 0, -1):
                logits = next_of(trace, torch.tensor([row[-1] for row in tokens]), left)
                tokens = [[*row, t] for row, t in zip(tokens, logits.argmax(-1).tolist())]
        rows = [x for layer in range(len(trace)) for b in range(3) for x in trace.keys_values(layer, b)]
        found.append((tokens, trace.segments, [trace.token_ids(b).tolist() for b in range(3)], rows))
        assert all(row[:-1] == trace.token_ids(b).tolist()[-12:] for b, row in enumerate(tokens))
    got, want = found
    assert got[:3] == want[:3] and all(map(torch.equal, got[3], want[3])) and len(repeating) == 1


def test_ends_of_the_model(answers, repeating):
    assert_as_eager(answers, max_new_tokens=30, eos_token_id=EOS)
