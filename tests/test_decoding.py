"""What a system's generate takes: transformers' options, stop strings, what others have written; what batches change."""

import pytest
import torch
from models import EOS, assert_close, tiny
from systems import ANSWERS, QUESTIONS, system
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from diffmas import Agent, Trace
from diffmas.agents.decoding import Rules
from diffmas.agents.sampling import Sampling
from diffmas.models.patch import patch_of


class RowByRow(TorchFunctionMode):
    """torch's products and activations, one row of x at a time: how they round does not depend on how many rows there are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        product = func in (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul) and args[1].dim() == 2
        if product or func is torch.nn.functional.silu:
            x, *rest = args
            rows = [func(row[None], *rest, **kwargs or {}) for row in x.reshape(-1, x.shape[-1])]
            out = torch.cat(rows).view(out.shape)
        return out


def test_nothing_of_ours_depends_on_the_batch():
    """Bit by bit in float32: logits after latent steps, and samples."""
    s = system(dtype=torch.float32, realign="ridge")
    sample = lambda size: s.generate(QUESTIONS, max_new_tokens=8, temperature=1.5, samples=3, seed=1, batch_size=size)  # noqa: E731
    with torch.no_grad(), RowByRow():
        together = s(QUESTIONS).logits
        assert all(torch.equal(s([q]).logits[0], together[b]) for b, q in enumerate(QUESTIONS))
        assert sample(None) == sample(1)


def test_a_stop_string_may_hold_special_tokens():
    """As <|im_end|>, which the text itself does not show."""
    s = system()
    ids = s.generate_tokens(QUESTIONS[:1], max_new_tokens=12, temperature=0)[0][0]
    end = next(i for i in range(4, 12) if ids[i] not in ids[:i])
    whole = [s.tokenizer.convert_ids_to_tokens(i) for i in ids]
    s.tokenizer.add_special_tokens({"additional_special_tokens": [whole[1], whole[end]]})
    before = " ".join(w for w in whole[:end] if w != whole[1])
    for stop, text in ((whole[end], before), (f"{whole[end - 1]} {whole[end]}", before.removesuffix(whole[end - 1]).strip())):
        options = dict(max_new_tokens=12, temperature=0, stop_strings=[stop])
        assert s.generate_tokens(QUESTIONS[:1], **options) == [[ids[: end + 1]]]
        assert s.generate(QUESTIONS[:1], **options)[0][0].strip() == text


# What transformers' own generate does on the text of all agents; none of them takes latent steps.
READERS = [Agent("planner", "w5 {question} w6"), Agent("solver", "w9 {question}")]


def by_transformers(s, questions, **options):
    """Greedy or beam texts, [question][sample][token], of a plain model; the questions one by one."""
    found = []
    for q in questions:
        ids = [t for a in s.agents for t in s.prompt_ids(a, {"question": q})]
        out = tiny("qwen3", patch=False).generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        found.append([row[: row.index(EOS) + 1] if EOS in row else row for row in out[:, len(ids) :].tolist()])
    return found


OPTIONS = {
    "penalty": dict(repetition_penalty=5.0),
    "n-grams": dict(no_repeat_ngram_size=1),
    "at least": dict(min_new_tokens=6, bad_words_ids=[[35], [57]]),
    "processor": dict(logits_processor=LogitsProcessorList([lambda ids, scores: scores.roll(1, -1)])),
    "criterion": dict(stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] % 3 == 0])),
    "ends": dict(eos_token_id=[53, 19]),
    "beams": dict(num_beams=3, num_return_sequences=2, length_penalty=0.5),
    "beams and n-grams": dict(num_beams=3, no_repeat_ngram_size=1),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_of_transformers(name):
    """By argument, by a config, and by the model's own config; texts of the past count."""
    given = {"max_new_tokens": 8, **OPTIONS[name]}
    s = system(agents=READERS, lora=False, no_latents="prompt")
    want = by_transformers(s, QUESTIONS, do_sample=False, **given)
    if name != "beams":
        plain = s.generate_tokens(QUESTIONS, max_new_tokens=given["max_new_tokens"], temperature=0)
        assert want != plain
    assert s.generate_tokens(QUESTIONS, temperature=0, **given) == want
    assert s.generate_tokens(QUESTIONS, temperature=0, batch_size=2, **given) == want
    if name in ("penalty", "beams"):
        assert s.generate_tokens(QUESTIONS, generation_config=GenerationConfig(**given)) == want
        own = patch_of(s.model).causal_lm.generation_config
        for key, value in given.items():
            setattr(own, key, value)
        assert s.generate_tokens(QUESTIONS, temperature=0) == want


@pytest.mark.parametrize("options", [dict(top_k=2), dict(min_p=0.3), dict(top_k=3, top_p=0.5)], ids=str)
def test_what_is_sampled_from(options):
    """The distribution that transformers' processors leave, and no others: no top_k of 50 that nobody asked for."""
    s = system(agents=[Agent("solver", "w9 {question}")])
    kept = {t for row in s.generate_tokens(["w10"], 1, 2.0, seed=0, samples=300, **{"top_p": 1.0, **options}) for (t,) in row}
    everything = {t for row in s.generate_tokens(["w10"], 1, 50.0, top_p=1.0, seed=0, samples=2000) for (t,) in row}
    p = (s(["w10"]).logits[0, 0].float() / 2.0).softmax(-1).detach()
    order, most = p.argsort(descending=True).tolist(), options.get("top_k", 64)
    top = p[order[:most]] / p[order[:most]].sum()  # top_k goes before top_p
    want = {t for i, t in enumerate(order[:most]) if float(top[:i].sum()) < options.get("top_p", 2.0)}
    assert kept == {t for t in want if p[t] >= options.get("min_p", 0.0) * p.max()} and len(everything) > 55


def chosen(s, **given):
    arguments = Sampling.of(s, **given).arguments
    return [arguments[name] for name in ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")]


def test_what_nobody_says():
    """temperature, top_p and top_k: an argument's, then the model's, and then ours, not transformers'."""
    s = system()
    own = patch_of(s.model).causal_lm.generation_config
    assert chosen(s) == [True, 0.6, 0.95, 0, 256]
    ends = [Sampling.of(s, **given).arguments["eos_token_id"] for given in ({}, dict(eos_token_id=None), dict(eos_token_id=5))]
    assert ends == [[EOS], None, 5]
    assert chosen(s, temperature=1.0, max_new_tokens=3) == [True, 1.0, 0.95, 0, 3]
    assert chosen(s, temperature=0) == chosen(s, do_sample=False) == chosen(s, num_beams=2) == [False, None, None, None, 256]
    assert chosen(s, do_sample=True, top_k=50) == [True, 0.6, 0.95, 50, 256]
    own.temperature = 0.7
    assert chosen(s) == [True, 0.7, 0.95, 0, 256]
    own.temperature = 1.0  # as transformers before version 5 has it where nobody said it
    assert chosen(s) == [True, 0.6, 0.95, 0, 256]
    own.do_sample = True  # it samples, so this is how
    assert chosen(s) == [True, 1.0, 1.0, 50, 256] and chosen(s, temperature=0)[0] is False
    own.temperature, own.top_k = 0.7, 20
    assert chosen(s) == [True, 0.7, 1.0, 20, 256] and chosen(s, top_p=0.5, top_k=3) == [True, 0.7, 0.5, 3, 256]


def test_a_config_that_is_passed_is_taken_as_it_is():
    """Whatever the model's own says; what it leaves out is transformers' default, as a value that is that default."""
    s = system()
    own = patch_of(s.model).causal_lm.generation_config
    plain = s.generate(QUESTIONS, max_new_tokens=6, temperature=0)
    for _ in range(2):
        config = GenerationConfig(do_sample=True, temperature=1.0, top_k=50, max_new_tokens=9)
        assert chosen(s, generation_config=config) == [True, 1.0, 1.0, 50, 9]
        assert chosen(s, generation_config=GenerationConfig(do_sample=True)) == [True, 1.0, 1.0, 50, 256]
        assert chosen(s, generation_config=GenerationConfig(max_new_tokens=9)) == [False, None, None, None, 9]
        assert chosen(s, generation_config=GenerationConfig(top_k=7), temperature=0.5) == [True, 0.5, 1.0, 7, 256]
        config = GenerationConfig(do_sample=True, top_k=7, max_new_tokens=9)
        assert chosen(s, generation_config=config) == [True, 1.0, 1.0, 7, 9]
        assert chosen(s, generation_config=config, top_k=5, top_p=0.5) == [True, 1.0, 0.5, 5, 9]
        config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.0)
        assert s.generate(QUESTIONS, generation_config=config) == plain
        own.do_sample, own.temperature, own.top_k, own.max_new_tokens = True, 0.7, 20, 3  # and now the same again
        own.repetition_penalty, own.num_return_sequences, own.stop_strings = 5.0, 2, [plain[0][0].split()[1]]
    assert s.generate(QUESTIONS, temperature=0) != plain


def test_sampled_beams_depend_on_seed_not_on_batching():
    """And nobody else's random numbers on them, not even meanwhile."""
    s = system()
    sample = lambda **kw: s.generate(QUESTIONS, max_new_tokens=6, temperature=1.5, num_beams=3, **kw)  # noqa: E731
    state, seen = torch.get_rng_state(), []
    assert sample(seed=3) == sample(seed=3, batch_size=1) != sample(seed=4)
    sample(seed=3, logits_processor=LogitsProcessorList([lambda ids, scores: seen.append(torch.get_rng_state()) or scores]))
    assert seen and all(torch.equal(now, state) for now in (*seen, torch.get_rng_state()))


@pytest.mark.parametrize("options, kept", [({}, 1), (dict(repetition_penalty=1.1), 5)], ids=str)
def test_texts_are_kept_where_a_rule_looks_at_them(options, kept):
    """Elsewhere they cost a copy of them all, and a wait for the device, at each token."""
    s = system()
    sampling = Sampling.of(s, max_new_tokens=4, temperature=0, **options)
    rules = Rules(sampling, s, [0, 1, 2], torch.zeros(1, dtype=torch.long))
    for i, done in enumerate([[False, True, False], [False, False], [False, False], [True, True]]):
        tokens = [EOS if end and i < 3 else 5 for end in done]
        assert rules.append(tokens, torch.zeros(len(tokens), 64)) == done
        if i < 3:
            rules.keep([not end for end in done])
    assert rules.members == [0, 2] and rules.text.shape == (2, 5)
    assert rules.text.untyped_storage().nbytes() == 8 * 2 * kept


def test_names_of_transformers_are_names_too():
    s = system()
    word = s.generate(QUESTIONS[:1], max_new_tokens=12, temperature=0)[0][0].split()[2]
    ours = s.generate(QUESTIONS, max_new_tokens=6, seed=3, samples=2, stop=[word])
    assert s.generate(QUESTIONS, max_new_tokens=6, seed=3, num_return_sequences=2, stop_strings=word) == ours
    config = GenerationConfig(max_new_tokens=6, num_return_sequences=2, num_beams=2, stop_strings=[word])
    assert [len(row) for row in s.generate(QUESTIONS, generation_config=config)] == [2, 2, 2]


# ---- what others have written before ----------------------------------------------------------------------------------


def test_a_saved_memory_is_answered_from(tmp_path):
    """What the others wrote, saved and loaded: the same answers and losses; the memory stays as it is."""
    s = system(trace_content="latent_only")
    with torch.no_grad():
        s.communicate(s.fields_of(QUESTIONS)).save(tmp_path / "memory")
    memory = Trace.load(tmp_path / "memory", s.model)
    lengths = memory.lengths
    for options in (dict(temperature=0), dict(seed=1, samples=2), dict(temperature=0, batch_size=2), dict(num_beams=2)):
        options["max_new_tokens"] = 6
        assert s.generate(QUESTIONS, trace=memory, **options) == s.generate(QUESTIONS, **options)
        assert memory.lengths == lengths
    assert_close(s(QUESTIONS, ANSWERS, trace=memory.fork(1)[0]).loss, s(QUESTIONS, ANSWERS).loss)
    for_all = s.generate(QUESTIONS[1:2] * 3, trace=memory.select([1, 1, 1]), max_new_tokens=6, temperature=0)
    assert for_all == s.generate(QUESTIONS[1:2], max_new_tokens=6, temperature=0) * 3


def test_the_others_need_no_fields_when_they_have_written():
    s = system(agents=[Agent("reader", "w5 {facts}", latent_steps=1), Agent("solver", "w9 {question}")])
    trace = s.communicate([{"facts": "w30 w31"}])
    assert s.generate(["w10"], trace=trace, max_new_tokens=2, temperature=0)
    with pytest.raises(ValueError, match="expected its prompt and answer to fit .* got 4 before it"):
        s.generate(["w10"], trace=trace, max_new_tokens=507)
    for call in (lambda: s.generate(["w10", "w11"], trace=trace), lambda: s(["w10", "w11"], ["w20", "w21"], trace=trace)):
        with pytest.raises(ValueError, match="trace: expected 2 sequences, one for each question, got 1"):
            call()


# ---- each question's own limit and seed; a hook for each token -------------------------------------------------------


def test_each_question_has_its_own_limit_and_seed():
    s = system()
    options = dict(temperature=1.5, samples=2)
    together = s.generate_tokens(QUESTIONS, [9, 2, 5], seed=[7, 8, 7], **options)
    alone = [s.generate_tokens([q], n, seed=k, **options)[0] for q, n, k in zip(QUESTIONS, (9, 2, 5), (7, 8, 7))]
    assert together == alone and [len(t) for row in together for t in row] == [9, 9, 2, 2, 5, 5]
    assert s.generate_tokens(QUESTIONS, [9, 2, 5], seed=[7, 8, 7], batch_size=2, **options) == together
    for name, given in (("max_new_tokens", [1]), ("seed", [1, 2])):
        with pytest.raises(ValueError, match=f"{name}: expected one for each of 3 questions"):
            s.generate(QUESTIONS, **{name: given})
    for wrong in ([], [3, 0]):
        with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
            s.generate(QUESTIONS, wrong)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_who_is_told_each_token_may_end_an_answer(batch_size):
    s, told = system(), {}
    whole = s.generate_tokens(QUESTIONS, 8, temperature=0, samples=2)

    def tell(question, sample, token, last):
        told.setdefault((question, sample), []).append((token, last))
        return (question, sample) == (1, 0) and len(told[1, 0]) == 3

    got = s.generate_tokens(QUESTIONS, 8, temperature=0, samples=2, batch_size=batch_size, on_token=tell)
    want = [[whole[b][n][:3] if (b, n) == (1, 0) else whole[b][n] for n in range(2)] for b in range(3)]
    assert got == want
    for (b, n), tokens in told.items():
        assert [t for t, _ in tokens] == want[b][n]
        assert [last for _, last in tokens] == [False] * (len(tokens) - 1) + [(b, n) != (1, 0)]
    with pytest.raises(ValueError, match="on_token: expected None with num_beams"):
        s.generate_tokens(QUESTIONS, 8, num_beams=2, on_token=tell)
    with pytest.raises(ValueError, match="max_new_tokens: expected one number for all questions with num_beams"):
        s.generate_tokens(QUESTIONS, [8, 8, 8], num_beams=2)
