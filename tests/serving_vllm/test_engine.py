"""Teams in vLLM answer as in our own loop: greedy tokens, in one continuous batch. `make test-vllm`."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import tiny_systems as tiny
import torch
from crews import ANSWER, BLOCK, CREWS, MIXED, QUESTIONS, STEPS, Engine, Ours, save_base, save_crew
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from diffmas.serving.team import Settings
from diffmas.serving.vllm import runner_v1
from diffmas.serving.vllm.course import Course
from diffmas.serving.vllm.latents import Latents


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("crews")
    base = save_base(root / "base")
    return {name: save_crew(root / name, base, *options) for name, options in CREWS.items()}


@pytest.fixture(scope="module")
def ours(directories):
    return Ours(directories)


@pytest.fixture(scope="module")
def loaded(directories):
    engine = Engine(directories)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded):
    loaded.forget()
    return loaded


@pytest.fixture(scope="module")
def plain(directories):
    """What the bare model says to token ids, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directories["bare"].parent / "base").eval()

    @torch.no_grad()
    def answer(ids: list[int]) -> list[int]:
        given = torch.tensor([ids])
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=ANSWER, do_sample=False)
        return out[0, len(ids) :].tolist()

    return answer


def bare_request(ids: list[int]):
    return {"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=ANSWER, stop_token_ids=[2], detokenize=False)


def check(engine, ours, asked) -> None:
    for one, got in zip(asked, engine.tokens(asked)):
        assert got == ours(*one), one


def latents(engine) -> Latents:
    """Of the runner of this engine."""
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    if engine.llm.llm_engine.vllm_config.use_v2_model_runner:
        return runner.model_state.latents
    return runner_v1.latents_of(runner)


@pytest.mark.parametrize("name", CREWS)
def test_answers_are_ours_for_every_number_of_steps(engine, ours, name):
    check(engine, ours, [(name, *one) for one in MIXED])
    assert len({tuple(ours(name, QUESTIONS[0], T)) for T in STEPS}) > 1  # steps change what is said


def test_teams_and_plain_requests_side_by_side(engine, ours, plain):
    teams = [(name, text, T) for text, T in MIXED for name in CREWS]
    prompts = [tiny.tokenizer()(text)["input_ids"] for text in QUESTIONS]
    asked = [x for pair in zip(teams, [bare_request(prompts[i % 4]) for i in range(len(teams))]) for x in pair]
    got = engine.tokens(asked)
    for one, tokens in zip(teams, got[::2]):
        assert tokens == ours(*one), one
    assert got[1::2] == [plain(prompts[i % 4]) for i in range(len(teams))]


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine):
    """Though its prompt is taken in many parts, each of which samples a token that is thrown away."""
    if engine.llm.llm_engine.vllm_config.use_v2_model_runner:
        pytest.skip("vLLM's kernel of top-k and top-p does not run in Triton's interpreter")
    settings, team = Settings(temperature=1.0), engine.teams["roles"]

    def request(seed):
        prompt, params = engine.teams.request(team.question({"question": QUESTIONS[0]}, settings, ANSWER, seed, STEPS[0]))
        params.detokenize = False
        return prompt, params

    alone = []
    for seed in range(3):
        engine.forget()
        alone += engine.tokens([request(seed)])
    engine.forget()
    together = engine.tokens([x for seed in range(3) for x in (request(seed), ("shared", *MIXED[4 * seed]))])
    assert together[::2] == alone and len(set(map(tuple, alone))) == 3


def test_requests_that_come_while_others_take_steps(engine, ours):
    asked, found = [(name, text, T) for name in ("shared", "roles") for text, T in MIXED[:8]], {}
    waiting = list(enumerate(asked))
    core = engine.llm.llm_engine
    while waiting or core.has_unfinished_requests():
        if waiting:
            i, one = waiting.pop(0)
            core.add_request(str(i), *engine.request(*one))
        found |= {int(o.request_id): list(o.outputs[0].token_ids) for o in core.step() if o.finished}
    assert [found[i] for i in range(len(asked))] == [ours(*one) for one in asked]


@pytest.mark.parametrize("name", CREWS)
def test_a_prefix_is_read_from_the_cache_and_stays_what_it_was(engine, ours, name):
    """Also where the cache ends inside of latent steps, whose vector nobody has: T is chosen so that block ends lie there."""
    ends = set()
    for T in (13, 20, 27) if name == "roles" else (13, 27, 55, 62, 83):  # further, this one's rounding errors grow
        one = (name, QUESTIONS[1], {"planner": T, "critic": 9})
        first, again = engine([one])[0], engine([one])[0]
        assert list(first.outputs[0].token_ids) == list(again.outputs[0].token_ids) == ours(*one), one
        course = Course.read(engine.request(*one)[1].extra_args)
        fits = [end for end in range(0, course.end, BLOCK) if not course.is_latent(end)]
        assert again.num_cached_tokens == max(fits), one
        ends |= {max(fits), course.end // BLOCK * BLOCK}
    assert len(ends) > 1


def test_a_stand_in_never_finds_a_block(engine, ours, plain):
    """A plain prompt of the very ids that a team's request has, and a team's behind it."""
    steps = {"planner": 40, "critic": 60}
    for name in ("bare", "shared"):
        one = (name, QUESTIONS[0], steps)
        prompt, _ = engine.request(*one)
        ids = prompt["prompt_token_ids"]
        assert len(ids) > 3 * BLOCK
        for asked in ([one, bare_request(ids)], [bare_request(ids), one]):
            engine.forget()
            first, second = (engine([request])[0] for request in asked)
            assert second.num_cached_tokens == 0
            for request, output in zip(asked, (first, second)):
                want = ours(*one) if request is one else plain(ids)
                assert list(output.outputs[0].token_ids) == want
    engine.forget()  # nor another team's, or one with as many positions and other steps
    tokens = [QUESTIONS[0], {"planner": 40, "critic": 60}]
    engine([("shared", *tokens)])
    assert engine([("roles", *tokens)])[0].num_cached_tokens == 0
    engine.forget()
    first, second = ("bare", QUESTIONS[0], {"planner": 90, "critic": 9}), ("bare", QUESTIONS[0], {"planner": 9, "critic": 90})
    engine([first])
    again = engine([second])[0]
    assert again.num_cached_tokens == 0 and list(again.outputs[0].token_ids) == ours(*second)


@pytest.mark.parametrize("name", ("bare", "roles"))
def test_preempted_in_the_middle_of_latent_steps(engine, ours, name):
    """After every number of the engine's steps, all that runs is thrown out and begins anew; after some where Triton's
    interpreter takes its time."""
    asked = [(name, QUESTIONS[i], T) for i, T in enumerate(STEPS)]
    want = {str(i): ours(*one) for i, one in enumerate(asked)}
    core, scheduler = engine.llm.llm_engine, engine.core.scheduler
    for at in range(1, 20, 6 if engine.llm.llm_engine.vllm_config.use_v2_model_runner else 1):
        before, found = sum(r.num_preemptions for r in scheduler.requests.values()), {}
        for i, one in enumerate(asked):
            core.add_request(str(i), *engine.request(*one))
        for step in range(10_000):
            if step in (at, at + 2):
                core.reset_prefix_cache(reset_running_requests=True)
                assert sum(r.num_preemptions for r in scheduler.requests.values()) > before
            found |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
            if not core.has_unfinished_requests():
                break
        assert found == want, at


def test_aborted_requests_leave_nothing(engine, ours):
    core = engine.llm.llm_engine
    stay, go = [("shared", text, STEPS[0]) for text in QUESTIONS], [("roles", text, STEPS[0]) for text in QUESTIONS]
    for at in (1, 3, 6, 12):
        found = {}
        for i, (a, b) in enumerate(zip(stay, go)):
            core.add_request(f"stay{i}", *engine.request(*a))
            core.add_request(f"go{i}", *engine.request(*b))
        for _ in range(at):
            found |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
        core.abort_request([f"go{i}" for i in range(4)])
        while core.has_unfinished_requests():
            found |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
        assert [found[f"stay{i}"] for i in range(4)] == [ours(*one) for one in stay]
        engine([bare_request([3, 4, 5])])  # a step tells the runner who has left
        assert not latents(engine).vectors
        assert not engine.core.scheduler.requests


def test_a_cache_that_is_too_small_preempts(directories, ours):
    """Long answers push out whoever came last, again and again."""
    small = Engine({"roles": directories["roles"]}, num_gpu_blocks_override=14)
    asked = [("roles", text, T, 100) for text, T in MIXED]
    try:
        got = small.tokens(asked)
        preempted = next(m.value for m in small.llm.get_metrics() if m.name == "vllm:num_preemptions")
    finally:
        small.close()
    assert preempted > 0
    assert got == [ours(*one) for one in asked]
