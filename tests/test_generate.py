"""generate on a trace against transformers' own generate on the concatenated text."""

import string

import pytest
import torch
from models import (
    EOS,
    FUSED,
    GENERIC,
    SOME,
    assert_close,
    body,
    embed,
    latent_steps,
    pad,
    tiny,
    tokens,
    unroll,
    whole,
    with_lora,
)  # fmt: skip
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer
from transformers.generation import EosTokenCriteria

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


def test_without_an_end_the_trace_holds_all():
    """eos_token_id=None is a value: it does not mean the config's."""
    model, config = tiny("qwen3"), GenerationConfig(max_new_tokens=20, do_sample=False)
    past, new, last = tokens(5), tokens(1, seed=2), tokens(2, seed=3)
    without_end = expected(model, past, new, dict(do_sample=False, max_new_tokens=20, eos_token_id=None))
    model.generation_config.eos_token_id = int(without_end[0, 9])
    for given in (dict(max_new_tokens=20, do_sample=False), dict(generation_config=config)):
        trace = prefilled(model, past)
        out = model.generate(new[0][None], past_key_values=trace, eos_token_id=None, **given)
        assert torch.equal(out[:, 1:], without_end) and trace.lengths == [25]
    logits = model(last[0][None], past_key_values=trace).logits[0]
    assert_close(logits, whole(model, torch.cat((past[0], out[0, :-1], last[0]))).logits[0, -2:])


def letters(special=()):
    """A tokenizer of one letter to a token, as transformers' stop strings need one, and the letter of a token."""
    alphabet = "<>" + string.ascii_letters + string.digits
    backend = Tokenizer(BPE({c: i for i, c in enumerate(alphabet[:EOS])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [alphabet[i] for i in special]
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special), alphabet


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("how", ["criterion", "stop string", "criterion for the end"])
def test_rows_that_end_at_a_stop_criterion(how, pad_is_eos):
    """One row ends; what fills it up while the other goes on is no text, be it the end-of-sequence token itself."""
    model = tiny("qwen3")
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = EOS if pad_is_eos else 0
    past, new = tokens(5, 2), tokens(2, 4, seed=2)
    stop = int(expected(model, past, new, GREEDY)[0, 1])
    options = {
        "criterion": dict(stopping_criteria=[lambda ids, scores, **_: ids[:, -1] == stop]),
        "stop string": dict(stop_strings=[letters()[1][stop]], tokenizer=letters()[0]),
        "criterion for the end": dict(stopping_criteria=[EosTokenCriteria(stop)]),
    }[how]
    ids, mask = pad(new)
    trace = prefilled(model, past)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, **options, **GREEDY)
    ends = [(row == stop).nonzero()[:, 0].tolist() for row in out[:, 4:]]
    assert ends[0] == [1] and out.shape[1] > 4 + 2
    length = ends[1][0] + 1 if ends[1] else out.shape[1] - 4
    assert trace.lengths == [5 + 2 + 2 - 1, 2 + 4 + length - 1]


def test_a_stop_string_that_is_a_special_token():
    model = tiny("qwen3")
    (past,), (new,) = tokens(5), tokens(2, seed=2)
    plain = expected(model, [past], [new], GREEDY)[0].tolist()
    tokenizer, alphabet = letters(special=plain[2:3])
    trace = prefilled(model, [past])
    out = model.generate(new[None], past_key_values=trace, stop_strings=alphabet[plain[2]], tokenizer=tokenizer, **GREEDY)
    assert out[0, 2:].tolist() == plain[:3] and trace.lengths == [5 + 2 + 2]


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


def test_a_config_that_is_passed_leaves_to_the_models_what_it_does_not_say():
    model, past, new = tiny("qwen3"), tokens(5, 2), tokens(2, 4, seed=2)
    beams = generated(model, past, new, dict(do_sample=False, max_new_tokens=6, num_beams=3))
    model.generation_config.num_beams = 3
    got = generated(model, past, new, dict(generation_config=GenerationConfig(max_new_tokens=6)))
    assert torch.equal(got, beams)
    trace = prefilled(model, past)
    ids, mask = pad(new)
    config = GenerationConfig(max_new_tokens=6, num_beams=2)
    model.generate(ids, attention_mask=mask, past_key_values=trace, generation_config=config)
    assert trace.lengths == [5, 2]


def test_default_length():
    model = tiny("qwen3")
    model.generation_config.eos_token_id = None
    out = model.generate(input_ids=tokens(3)[0][None], past_key_values=prefilled(model, tokens(9)), do_sample=False)
    assert out.shape == (1, 23)  # transformers' default is 20 new tokens


RULES = {
    "penalty": dict(repetition_penalty=5.0),
    "n-grams": dict(no_repeat_ngram_size=1),
    "beams": dict(repetition_penalty=5.0, num_beams=3, num_return_sequences=2),
    "pad is eos": dict(repetition_penalty=5.0, pad_token_id=EOS),
    "no pad": dict(repetition_penalty=5.0, pad_token_id=None),
}


@pytest.mark.parametrize("name", list(RULES))
def test_rules_see_the_text_of_the_past(name):
    """As in transformers with all of the text as input, padded on the left."""
    model, options = tiny("qwen3"), dict(do_sample=False, max_new_tokens=8, **RULES[name])
    past, new = tokens(9, 4), tokens(2, 5, seed=2)
    got = generated(model, past, new, options)
    filling = EOS if options.get("pad_token_id", 0) is None else options.get("pad_token_id", 0)
    ids, mask = pad([torch.cat(rows) for rows in zip(past, new)], value=filling)
    assert torch.equal(got, model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :])
    beams = {k: v for k, v in options.items() if k.startswith("num_")}
    plain = generated(model, past, new, dict(do_sample=False, max_new_tokens=8, **beams))
    assert got.tolist() != plain.tolist()


def test_rules_see_no_token_where_there_is_none():
    """Latent steps, and prompts that came as embeddings, have no token that a rule could see."""
    model, seen = tiny("qwen3"), []
    first, second, third = tokens(4, 2), tokens(2, 2, seed=2), tokens(1, 3, seed=3)
    trace = diffmas.Trace(model, 2)
    with torch.no_grad():
        ids, mask = pad(first)
        h = body(model)(input_ids=ids, attention_mask=mask, past_key_values=trace).last_hidden_state[:, -1:]
        latent_steps(model, trace, h, 3)
        model.generate(inputs_embeds=embed(model, torch.stack(second)), past_key_values=trace, max_new_tokens=1)
        ids, mask = pad(third)
        processors = [lambda ids, scores: seen.append(ids) or scores]
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=trace, logits_processor=processors, **FEW)
    want = [torch.cat(rows) for rows in zip(first, third)]
    assert torch.equal(seen[0], pad(want)[0]) and trace.token_ids(0).tolist()[4:9] == [-1] * 5


def test_a_streamer_gets_the_new_tokens():
    class Streamer(TextStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.got.append("end")

    model, streamer = tiny("qwen3"), Streamer()
    (past,), (new,) = tokens(9), tokens(4, seed=2)
    out = model.generate(new[None], past_key_values=prefilled(model, [past]), streamer=streamer, **GREEDY)
    assert streamer.got == [new.tolist(), *([t] for t in out[0, 4:].tolist()), "end"]


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
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1]])), "mask that"),
        (dict(inputs_embeds=torch.ones(1, 4, 32), attention_mask=torch.tensor([[1, 0, 1, 1]])), "attention_mask.*between them"),
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=torch.arange(3)[None]), "position_ids: expected None"),
        (dict(input_ids=torch.ones(1, 3, dtype=torch.long), prefill_chunk_size=2), "prefill_chunk_size: expected None"),
    ],
)
def test_bad_calls_are_refused_by_name(call, message):
    model = tiny("qwen3")
    trace = prefilled(model, tokens(4))
    with pytest.raises(ValueError, match=message):
        model.generate(**call, past_key_values=trace, max_new_tokens=2)
    assert trace.lengths == [4] and trace.generation is None
