"""transformers' generate on a trace whose forwards are replayed: the same tokens and logits, bit by bit, as one by one."""

import pytest
import torch
from failing_capture import check_a_capture_that_fails
from models import EOS, body, embed, pad, tiny, tokens, with_lora

import diffmas
from diffmas.models.generate import Generation, with_replays
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument
from diffmas.trace.layer_work import LayerWork

OPTIONS = dict(max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return with_lora(tiny("qwen3"))


@pytest.fixture
def run(model):
    """(graphs, options) -> the tokens, the logits that they came from, and the trace."""
    patch_of(model).tries.clear()

    def generated(graphs, past=(7, 3), new=(2, 4), **options):
        patch_of(model).graphs = graphs
        trace, (ids, mask) = diffmas.Trace(model, len(past)), pad(tokens(*new, seed=2))
        old, old_mask = pad(tokens(*past))
        with torch.no_grad():
            model(input_ids=old, attention_mask=old_mask, past_key_values=trace)
        torch.manual_seed(5)
        options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True, "input_ids": ids, **options}
        out = model.generate(attention_mask=mask, past_key_values=trace, **options)
        return out.sequences, out.logits, trace

    return generated


def assert_as_eager(run, **options):
    (got, logits, trace), (want, plain, other) = (run(graphs, **options) for graphs in (True, False))
    assert torch.equal(got, want) and len(logits) == len(plain) and all(map(torch.equal, logits, plain))
    assert trace.segments == other.segments and trace.lengths == other.lengths
    for b in range(trace.batch_size):
        assert torch.equal(trace.token_ids(b), other.token_ids(b))
        for layer in range(len(trace)):
            assert all(map(torch.equal, trace.keys_values(layer, b), other.keys_values(layer, b)))
    return got


CASES = {
    "greedy": {},
    "samples": dict(do_sample=True, temperature=1.5, top_p=0.9, num_return_sequences=2),
    "one sequence": dict(past=(5,), new=(3,)),
    "embeddings": dict(input_ids=None),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_same_logits(options, model, run, repeating):
    if "input_ids" in options:
        options = dict(input_ids=None, inputs_embeds=embed(model, pad(tokens(2, 4, seed=2))[0]).detach())
    assert_as_eager(run, **options)
    # Of 14 tokens the first comes from the prompt; four forwards show that the sequences stay together.
    assert [g.replays for g in repeating] == [14 - 1 - 3]


def test_in_inference_mode(run, repeating):
    with torch.inference_mode():
        assert_as_eager(run)
    assert repeating


def by_itself(model, trace, with_others):
    """A decoding loop as transformers may be passed one: all tokens in one tensor, and forwards between that are not its own,
    of which it returns the logits too."""
    name, x, found = cache_argument(model), torch.tensor([[3, 4]]), []
    for i in range(14):
        found.append(model(input_ids=x, **{name: trace}).logits[:, -1:])
        x = found[-1].argmax(-1) if i == 0 else x.copy_(found[-1].argmax(-1))
        if with_others:
            found += [model(input_ids=x).logits, model(input_ids=x, **{name: trace.select([0])}).logits]
    return torch.cat(found)


@pytest.mark.parametrize("with_others", [False, True])
def test_a_loop_of_the_callers(with_others, model, run, repeating):
    lm, found = model.get_base_model(), []
    for graphs in (True, False):
        patch_of(model).graphs = graphs
        trace = diffmas.Trace(model, 1)
        trace.claim(Generation(width=2, longest=14, first=[0], before=[0]))
        with torch.no_grad():
            found.append((by_itself(with_replays(lm, lm.device), trace, with_others), trace.token_ids(0)))
    assert all(map(torch.equal, *found)) and len(repeating) == 1


def test_no_layer_runs_on_the_host(run, repeating, monkeypatch):
    ran, attend = [], LayerWork.attend
    monkeypatch.setattr(LayerWork, "attend", lambda *args: ran.append(1) or attend(*args))
    counts = {n: run(True, max_new_tokens=n) and (len(ran), ran.clear())[0] for n in (10, 40)}
    assert counts[10] == counts[40] and repeating[1].replays == 36


def test_sequences_that_end(run, repeating):
    """They stay in transformers' batch, and what fills them up does not stay in the trace."""
    plain, *_ = run(False)
    ends = next(int(t) for i, t in enumerate(plain[0, 12:], 12) if t not in plain[1] and t not in plain[0, :i])
    got = assert_as_eager(run, eos_token_id=[EOS, ends])
    assert got.shape == plain.shape and not torch.equal(got, plain)
    assert [g.replays for g in repeating] == [14 - 1 - 3]


REFUSED = {
    "few tokens": dict(max_new_tokens=7),
    "beams": dict(num_beams=2, max_new_tokens=9),
    "candidates": dict(past=(5,), new=(3,), prompt_lookup_num_tokens=2, eos_token_id=[EOS]),  # 4.56 wants an end for it
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_nothing_is_captured(options, run, repeating):
    assert_as_eager(run, **options)
    assert not repeating


def test_hidden_states(run, repeating):
    """transformers leaves hooks behind once it was asked for them, and these keep nothing from being captured."""
    assert_as_eager(run, output_hidden_states=True)
    assert not repeating
    run(True)
    assert repeating


def test_who_hooks_into_layers_sees_them(model, run, repeating):
    seen = []
    handle = body(model).layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert_as_eager(run)
    handle.remove()
    assert len(seen) == 2 * 14 + 2 and not repeating


def test_the_model_is_as_it_was(model, run, repeating):
    before = dict(vars(model.get_base_model()))
    run(True)
    assert repeating and vars(model.get_base_model()) == before


def test_a_capture_that_fails(run, repeating, monkeypatch, model):
    check_a_capture_that_fails(monkeypatch, model, lambda: assert_as_eager(run), repeating)
