"""Forward passes that fail leave a trace as it was."""

import pytest
import torch
import transformers
from models import assert_close, body, gradients, loss_of, pad, prefill, tiny, tokens, whole

import diffmas

THREE = torch.ones(1, 3, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(lengths=[2]), "trace: expected a batch of 2 sequences, got 1"),
        (dict(lengths=[1.0, 1]), "lengths: expected integers >= 0"),
        (dict(lengths=[2, -1]), "lengths: expected integers >= 0"),
        (dict(lengths=[2, 1], reserve=[1.5, 1]), "reserve: expected integers >= 0"),
        (dict(lengths=[2, 1], reserve=-3), "reserve: expected integers >= 0"),
        (dict(lengths=[2, 1], reserve=[3]), "reserve: expected one for each of 2 sequences, got 1"),
        (dict(lengths=[1, 1], positions=[0, 1]), "positions: expected a 1-D tensor of integers"),
        (dict(lengths=[1, 1], positions=torch.tensor([[0, 1]])), "positions: expected a 1-D tensor of integers"),
        (dict(lengths=[1, 1], positions=torch.tensor([0.0, 1.5])), "positions: expected a 1-D tensor of integers"),
        (dict(lengths=[1, 1], positions=torch.tensor([0])), "positions: expected 2 of them, got 1"),
    ],
)
def test_bad_plans_are_refused_and_break_nothing(arguments, message):
    model = tiny("qwen3")
    trace = prefill(model, *tokens(4, 2))
    before = trace.rows
    with pytest.raises(ValueError, match=message):
        trace.plan(kind="prompt", **arguments)
    with pytest.raises(ValueError, match="counts: expected"):
        trace.drop_newest([1])
    assert (trace.rows, trace.lengths) == (before, [4, 2])
    prefill(model, *tokens(1, 3), trace=trace)
    assert trace.lengths == [5, 5]


def test_a_failing_forward_leaves_the_trace_usable():
    model = tiny("qwen3")
    a, b = tokens(4, 3)
    trace = diffmas.Trace(model)
    model(a[None], past_key_values=trace)
    layer = body(model).layers[1]
    handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(b[None], past_key_values=trace)
    handle.remove()
    assert trace.lengths == [4] and trace.next_positions == [4]
    logits = model(b[None], past_key_values=trace).logits
    assert_close(logits, whole(model, torch.cat((a, b))).logits[:, 4:])
    loss_of(logits).backward()
    got = gradients(model)
    loss_of(whole(model, torch.cat((a, b))).logits[:, 4:]).backward()
    assert_close(got, gradients(model))


def test_a_layer_that_does_not_write_is_noticed():
    model = tiny("llama")
    layer = body(model).layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"layers \[1\] did not write"):
        model(tokens(3)[0][None], past_key_values=diffmas.Trace(model))


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(input_ids=torch.ones(2, 3, dtype=torch.long)), "batch of 1"),
        (dict(input_ids=torch.ones(1, 0, dtype=torch.long)), "at least one token"),
        (dict(input_ids=THREE, attention_mask=torch.ones(1, 2)), "attention_mask"),
        (dict(input_ids=THREE, attention_mask=torch.zeros(1, 3)), "at least one token"),
        (dict(input_ids=THREE, attention_mask=torch.ones(1, 1, 3, 3)), "attention_mask"),
        (dict(input_ids=THREE, attention_mask=torch.tensor([[1, 0, 1]])), "got some between them; pass position_ids"),
        (dict(input_ids=THREE, attention_mask=torch.tensor([[0.0, -1e9, -1e9]])), "attention_mask: expected 0 for padding"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[0.0, 1.5, 2.0]])), "position_ids: expected .* torch.float32"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[False, True, True]])), "position_ids: expected .* torch.bool"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[-1, 0, 1]])), "position_ids"),
        (dict(input_ids=THREE.expand(3, 3), position_ids=torch.arange(3).expand(3, 1, 3)), "position_ids: expected"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[0, 1]])), "position_ids"),
        (dict(input_ids=THREE, output_attentions=True), "output_attentions"),
    ],
)
def test_bad_calls_are_refused_by_name(call, message):
    model = tiny("qwen3")
    trace = diffmas.Trace(model, 3 if call["input_ids"].shape[0] == 3 else 1)
    with pytest.raises(ValueError, match=message):
        model(**call, past_key_values=trace)
    assert not any(trace.lengths)


def test_a_mask_that_hides_the_past_is_refused():
    """What a sequence sees is its view's, not its mask's: with a view the same mask gives what transformers gives."""
    model, plain = tiny("qwen3"), tiny("qwen3", patch=False)
    rows, new = tokens(5, 3), tokens(2, 2, seed=2)
    trace, cache = prefill(model, *rows), transformers.DynamicCache()
    ids, mask = pad(rows)
    mask = torch.cat((mask, torch.ones(2, 2, dtype=torch.long)), dim=1)
    mask[0, 1:3] = 0
    with pytest.raises(ValueError, match="attention_mask: expected the 5 rows that sequence 0 .* 3 of them; .*Trace.keep"):
        model(torch.stack(new), mask, past_key_values=trace)
    assert trace.lengths == [5, 3]
    seen = [[s._replace(length=1), s.skip(3)] if s.sequence == 0 else [s] for s in trace.segments]
    got = model(torch.stack(new), mask, past_key_values=trace.reading(seen)).logits
    at = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
    plain(ids, pad(rows)[1], position_ids=at[:, :5], past_key_values=cache)
    assert_close(got, plain(torch.stack(new), mask, position_ids=at[:, 5:], past_key_values=cache).logits)


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(capacity=0)], ids=str)
def test_bad_traces_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        diffmas.Trace(tiny("qwen3"), **options)


def test_another_dtype_is_refused():
    model = tiny("qwen3")
    trace = diffmas.Trace(model)
    model(tokens(3)[0][None], past_key_values=trace)
    with pytest.raises(ValueError, match="float64.*float32"):
        model.float()(tokens(3)[0][None], past_key_values=trace)
    model.double()(tokens(3)[0][None], past_key_values=trace)
    assert trace.lengths == [6]
