"""generate on a trace against transformers' own generate on the concatenated text."""

import pytest
import torch
from models import EOS, FUSED, GENERIC, SOME, assert_close, body, latent_steps, pad, tiny, tokens, unroll, whole, with_lora
from transformers import GenerationConfig

import diffmas

GREEDY = dict(do_sample=False, max_new_tokens=8)
FEW = dict(do_sample=False, max_new_tokens=5)


def prefilled(model, rows):
    trace = diffmas.Trace(model, len(rows))
    if any(len(r) for r in rows):
        ids, mask = pad(rows)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=trace)
    return trace


def generated(model, past, new, options):
    """What generate on a trace appends; [B, at most max_new_tokens]."""
    ids, mask = pad(new)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=prefilled(model, past), **options)
    assert torch.equal(out[:, : ids.shape[1]], ids.repeat_interleave(len(out) // len(ids), 0))
    return out[:, ids.shape[1] :]


def expected(model, past, new, options):
    """What transformers' generate appends to the concatenated text."""
    ids, mask = pad([torch.cat(rows) for rows in zip(past, new)])
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def by_hand(model, ids, steps):
    """Greedy decoding of one sequence without any cache."""
    text = []
    for _ in range(steps):
        text.append(int(whole(model, ids).logits[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor(text[-1:])))
        if text[-1] == EOS:
            break
    return text


def trimmed(row):
    """A row of generated text without the filling after its end."""
    row = row.tolist()
    return row[: row.index(EOS) + 1] if EOS in row else row


CASES = {
    "empty": ([0, 0], [4, 2]),
    "empty, one token": ([0], [1]),
    "past longer": ([7, 7], [2, 2]),
    "past shorter": ([2, 2], [6, 6]),
    "ragged": ([5, 1, 3], [2, 6, 1]),
    "partly empty": ([0, 5], [3, 1]),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("family", SOME)
def test_greedy(family, case):
    model = tiny(family)
    past, new = tokens(*CASES[case][0]), tokens(*CASES[case][1], seed=2)
    got = generated(model, past, new, GREEDY)
    assert torch.equal(got, expected(model, past, new, GREEDY))
    for row, a, b in zip(got, past, new):
        assert trimmed(row) == by_hand(model, torch.cat((a, b)), 8)


@pytest.mark.parametrize("family", FUSED + GENERIC)
def test_greedy_of_every_family(family):
    model = tiny(family, torch.float32)
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    assert torch.equal(generated(model, past, new, GREEDY), expected(model, past, new, GREEDY))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_greedy_with_lora(family, merged):
    model = with_lora(tiny(family))
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    want = expected(model, past, new, GREEDY)
    if merged:
        model.merge_adapter()
    assert torch.equal(generated(model, past, new, GREEDY), want)
    assert torch.equal(generated(model.merge_and_unload(), past, new, GREEDY), want)


OPTIONS = {
    "sampling": dict(do_sample=True, temperature=1.5, top_p=0.95, max_new_tokens=8),
    "several samples": dict(do_sample=True, num_return_sequences=3, max_new_tokens=5),
    "beams": dict(do_sample=False, num_beams=3, max_new_tokens=8),
    "several beams": dict(do_sample=False, num_beams=4, num_return_sequences=2, max_new_tokens=5),
    "sampled beams": dict(do_sample=True, num_beams=3, max_new_tokens=5),
    "least new tokens": dict(do_sample=False, min_new_tokens=4, max_new_tokens=6, eos_token_id=list(range(32))),
    "several eos": dict(do_sample=False, max_new_tokens=8, eos_token_id=list(range(0, 64, 3))),
}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("family", SOME)
def test_equal_to_plain_generate(family, name):
    model = tiny(family)
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    results = []
    for run in (generated, expected):
        torch.manual_seed(5)
        results.append(run(model, past, new, OPTIONS[name]))
    assert torch.equal(*results)


def test_beams_leave_the_trace_as_it_was():
    model = tiny("qwen3")
    ids, mask = pad(tokens(2, 4, seed=2))
    trace = prefilled(model, tokens(5, 2))
    for options in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, max_new_tokens=3, **options)
        assert trace.lengths == [5, 2]


@pytest.mark.parametrize("eos", [[EOS], list(range(0, 64, 4))])
def test_the_trace_afterwards_holds_prompt_and_text(eos):
    """Sequences that end early are filled up by generate; the filling must not stay in the trace."""
    model = tiny("qwen3")
    past, new, last = tokens(5, 2, 3), tokens(2, 4, 1, seed=2), tokens(2, 2, 2, seed=3)
    trace = prefilled(model, past)
    ids, mask = pad(new)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, eos_token_id=eos, **GREEDY)
    texts = []
    for b in range(3):
        text = out[b, ids.shape[1] :].tolist()
        end = next((i for i, t in enumerate(text) if t in eos), len(text) - 1)
        texts.append(torch.cat((past[b], new[b], torch.tensor(text[:end], dtype=torch.long))))  # without the last token
    assert trace.lengths == [len(t) for t in texts] == trace.next_positions
    assert len(eos) == 1 or len(set(trace.lengths)) > 1
    for b in range(3):
        prompt = sum(s.length for s in trace.segments if s.sequence == b and s.kind == "prompt")
        assert prompt == len(past[b]) + len(new[b])
    logits = model(input_ids=pad(last)[0], past_key_values=trace).logits
    for b in range(3):
        assert_close(logits[b], whole(model, torch.cat((texts[b], last[b]))).logits[0, -2:])


def test_a_row_that_ends_at_a_stop_criterion():
    model = tiny("qwen3")
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    plain = expected(model, past, new, GREEDY)
    stop = int(plain[0, 1])
    criteria = [lambda ids, scores, **_: ids[:, -1] == stop]
    ids, mask = pad(new)
    trace = prefilled(model, past)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, stopping_criteria=criteria, **GREEDY)
    first = out[0, 4:].tolist()
    end = first.index(stop) + 1
    assert end < out.shape[1] - 4 and trace.lengths[0] == 5 + 2 + end - 1


def test_going_on_from_what_was_generated():
    model = tiny("phi3")
    model.generation_config.eos_token_id = None
    (past,), (new,) = tokens(5), tokens(3, seed=2)
    want = expected(model, [past], [new], dict(do_sample=False, max_new_tokens=8))[0]
    trace = prefilled(model, [past])
    text = model.generate(input_ids=new[None], past_key_values=trace, do_sample=False, max_new_tokens=4)
    more = model.generate(input_ids=text[:, -1:], past_key_values=trace, do_sample=False, max_new_tokens=4)
    assert text[0, 3:].tolist() + more[0, 1:].tolist() == want.tolist()


def test_after_latent_steps():
    """Text after a context that no text describes."""
    model = tiny("qwen3")
    first, second = tokens(4, 2), tokens(1, 3, seed=2)
    trace = diffmas.Trace(model, 2)
    ids, mask = pad(first)
    with torch.no_grad():
        h = body(model)(input_ids=ids, attention_mask=mask, past_key_values=trace).last_hidden_state[:, -1:]
        latent_steps(model, trace, h, 3)
    ids, mask = pad(second)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, **FEW)[:, 3:]
    for b in range(2):
        text = second[b]
        for _ in range(5):
            token = unroll(model, [first[b], 3, text])[-1].argmax()
            text = torch.cat((text, token[None]))
        assert out[b].tolist() == text[len(second[b]) :].tolist()


@pytest.mark.parametrize("case", ["empty", "ragged"])
def test_inputs_embeds(case):
    model = tiny("qwen3")
    past, new = tokens(*CASES[case][0]), tokens(*CASES[case][1], seed=2)
    ids, mask = pad(new)
    trace = prefilled(model, past)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, past_key_values=trace, **GREEDY)
    assert torch.equal(out, expected(model, past, new, GREEDY))
    assert {s.kind for s in trace.segments} == {"prompt", "text"}


def test_return_dict():
    model = tiny("qwen3")
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    options = dict(GREEDY, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    ids, mask = pad(new)
    trace = prefilled(model, past)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, **options)
    assert torch.equal(out.sequences[:, :4], ids) and out.past_key_values is trace
    full, full_mask = pad([torch.cat(rows) for rows in zip(past, new)])
    want = model.generate(input_ids=full, attention_mask=full_mask, **options)
    assert torch.equal(out.sequences[:, 4:], want.sequences[:, full.shape[1] :])
    assert_close(torch.stack(out.logits), torch.stack(want.logits))
    assert_close(out.hidden_states[1][-1], want.hidden_states[1][-1])


@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_lengths_count_as_if_there_was_no_past(how):
    model = tiny("qwen3")
    past, new = tokens(9), tokens(3, seed=2)
    limits = dict(max_length=9, min_length=7, do_sample=False, eos_token_id=list(range(8, 64)), pad_token_id=0)
    full = torch.cat((past[0], new[0]))
    want = model.generate(full[None], **{**limits, "max_length": 18, "min_length": 16})[:, 9:]
    assert 7 < want.shape[1] <= 9
    options = {}
    if how == "argument":
        options = limits
    elif how == "config":
        options = dict(generation_config=GenerationConfig(**limits))
    else:
        model.generation_config = GenerationConfig(**limits)
    out = model.generate(input_ids=new[0][None], past_key_values=prefilled(model, past), **options)
    assert torch.equal(out, want)


def test_default_length():
    model = tiny("qwen3")
    model.generation_config.eos_token_id = None
    out = model.generate(input_ids=tokens(3)[0][None], past_key_values=prefilled(model, tokens(9)), do_sample=False)
    assert out.shape == (1, 23)  # transformers' default is 20 new tokens


def test_penalties_do_not_see_what_stands_in_for_the_past():
    """The past is unknown to a penalty; what fills its place must not be penalised either."""
    model = tiny("qwen3")
    model.generation_config.pad_token_id = EOS
    (past,), (new,) = tokens(9), tokens(3, seed=2)
    out = model.generate(
        input_ids=new[None], past_key_values=prefilled(model, [past]), repetition_penalty=50.0, output_scores=True,
        return_dict_in_generate=True, **FEW,
    )  # fmt: skip
    logits = whole(model, torch.cat((past, new))).logits[0, -1].detach()
    seen = torch.zeros(64, dtype=torch.bool).scatter(0, new, True)
    want = torch.where(seen, torch.where(logits > 0, logits / 50, logits * 50), logits)
    assert_close(out.scores[0][0].double(), want)


def test_prompt_lookup():
    model = tiny("qwen3", seed=3)
    (past,), new = tokens(9), torch.tensor([5, 6, 7, 8, 5, 6, 7, 8, 5, 6])
    trace = prefilled(model, [past])
    out = model.generate(input_ids=new[None], past_key_values=trace, prompt_lookup_num_tokens=3, **GREEDY)
    assert out[0, 10:].tolist() == by_hand(model, torch.cat((past, new)), 8)
    assert trace.lengths == [9 + 10 + 7]


def test_assisted_decoding():
    model, assistant = tiny("qwen3"), tiny("qwen3", patch=False)
    (past,), (new,) = tokens(9), tokens(4, seed=2)
    out = model.generate(input_ids=new[None], past_key_values=prefilled(model, [past]), assistant_model=assistant, **GREEDY)
    assert out[0, 4:].tolist() == by_hand(model, torch.cat((past, new)), 8)


def test_streamer_and_positional_inputs():
    model = tiny("qwen3")
    (past,), (new,) = tokens(9), tokens(4, seed=2)
    want = model.generate(new[None], past_key_values=prefilled(model, [past]), **GREEDY)
    assert want[0, 4:].tolist() == by_hand(model, torch.cat((past, new)), 8)
    trace = prefilled(model, [past])
    assert torch.equal(model.generate(inputs=new[None], past_key_values=trace, attention_mask=None, **GREEDY), want)


def test_generate_without_a_trace_is_transformers_own():
    model, plain = tiny("qwen3"), tiny("qwen3", patch=False)
    ids, mask = pad(tokens(5, 2))
    for options in (GREEDY, OPTIONS["beams"]):
        got, want = (m.generate(input_ids=ids, attention_mask=mask, **options) for m in (model, plain))
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(), "input_ids"),
        (dict(input_ids=torch.ones(2, 3, dtype=torch.long)), "batch of 1"),
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False), "use_cache"),
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 2)), "attention_mask.*at least 3"),
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 0]])), "left-padded"),
    ],
)
def test_bad_calls_are_refused_by_name(call, message):
    model = tiny("qwen3")
    trace = prefilled(model, tokens(4))
    with pytest.raises(ValueError, match=message):
        model.generate(**call, past_key_values=trace, max_new_tokens=2)
    assert trace.lengths == [4] and trace.generation is None
