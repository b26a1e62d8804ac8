"""What the vLLM plugin knows without vLLM: where turns lie in one prompt, how far a forward may go, and who is refused."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_systems as tiny

from diffmas.agents.prompts import Turn
from diffmas.serving.vllm import plugin
from diffmas.serving.vllm.course import Course, extra_args, prompt_of
from diffmas.serving.vllm.limits import check_engine
from diffmas.serving.vllm.teams import Teams, adapters_of, check_adapter, check_team


def drawn(rng: random.Random) -> tuple[list[int], list[int]]:
    """Prompts and T of some agents, as positions: for each its agent and whether it is a latent step."""
    prompts = [rng.randrange(4) for _ in range(rng.randrange(1, 5))] + [rng.randrange(1, 4)]
    steps = [rng.randrange(5) if n else 0 for n in prompts]
    return prompts, steps


def test_a_course_by_its_positions():
    rng = random.Random(0)
    for _ in range(300):
        prompts, steps = drawn(rng)
        course = Course.of_turns("facts", prompts, steps)
        kinds = [(i, latent) for i, (n, T) in enumerate(zip(prompts, steps)) for latent in [False] * n + [True] * T]
        adapters = [rng.randrange(2) for _ in prompts]
        assert course.end == len(kinds)
        assert [course.is_latent(p) for p in range(len(kinds) + 3)] == [latent for _, latent in kinds] + [False] * 3
        after = [(kinds[-1][0], False)] * 9
        for start in range(len(kinds)):
            end = start + rng.randrange(1, 9)
            here = [run for run in course.within(start, end) for _ in range(run.start, run.end)]
            assert [(run.agent, run.latent) for run in here] == (kinds + after)[start:end]
            assert course.agent_at(start) == kinds[start][0]
            # a vector is known where a forward begins; behind it, none is, and the adapter is the same
            fits = start + 1
            adapter = [adapters[agent] for agent, _ in kinds + after]
            while fits < end and not (kinds + after)[fits][1] and adapter[fits] == adapter[start]:
                fits += 1
            assert course.chunk_end(start, end, adapters) == fits


def test_a_block_is_named_by_all_that_its_rows_are_of():
    key = lambda team, prompts, steps, start, end: Course.of_turns(team, prompts, steps).key(start, end)
    here = key("facts", [3, 2], [4, 0], 2, 8)
    assert here == key("facts", [3, 7], [4, 0], 2, 8)  # what comes later changes nothing
    others = [
        key("others", [3, 2], [4, 0], 2, 8), key("facts", [3, 2], [3, 0], 2, 8), key("facts", [2, 3], [4, 0], 2, 8),
        key("facts", [3, 0, 2], [4, 0, 0], 2, 8), key("facts", [9, 2], [0, 0], 2, 8),
    ]  # fmt: skip
    assert len({here, *others}) == 6


def test_turns_there_and_back():
    turns = [Turn([5, 6, 7], 2), Turn([], 0), Turn([8], 0)]
    assert prompt_of(turns) == [5, 6, 7, 7, 7, 8]
    course = Course.read(json.loads(json.dumps({**extra_args("facts", turns), "other": 1})))
    assert course == Course.of_turns("facts", [3, 0, 1], [2, 0, 0]) and course.agents == 3
    assert Course.read(None) is None and Course.read({"prompt_tokens": [1]}) is None


@pytest.mark.parametrize(
    "args, what",
    [
        ({"diffmas": 3}, "diffmas: expected a team's name"),
        ({"diffmas": "a"}, "prompt_tokens: expected a list"),
        ({"diffmas": "a", "prompt_tokens": [1], "latent_steps": 1}, "latent_steps: expected a list"),
        ({"diffmas": "a", "prompt_tokens": [1], "latent_steps": []}, "one for each of 1 agents, got 0"),
        ({"diffmas": "a", "prompt_tokens": [1], "latent_steps": [-1]}, "latent_steps: expected integers >= 0, got -1"),
        ({"diffmas": "a", "prompt_tokens": [1.5], "latent_steps": [1]}, "prompt_tokens: expected integers >= 0, got 1.5"),
        ({"diffmas": "a", "prompt_tokens": [[1]], "latent_steps": [1]}, "expected integers >= 0"),
        ({"diffmas": "a", "prompt_tokens": [0, 1], "latent_steps": [1, 0]}, "expected some of agent 0"),
        ({"diffmas": "a", "prompt_tokens": [0], "latent_steps": [0]}, "at least one agent"),
    ],
)
def test_what_is_no_course(args, what):
    with pytest.raises(ValueError, match=what):
        Course.read(args)


# ---- who is refused ----------------------------------------------------------------------------------------------------


def test_teams_that_are_no_single_prompt_are_refused():
    def described(**options):
        system = tiny.system(**options)
        return {**system.describe(), "trained_in_base": [], "adapters": {"default": {}}}

    check_team("facts", described())
    for change, what in (
        ({"trace_content": "latent_only"}, "trace_content: expected 'all' in vLLM, got 'latent_only': .* KV connector"),
        ({"class": "other.System"}, "class: .* got 'other.System'"),
        ({"trained_in_base": ["lm_head.weight"]}, "trained_in_base"),
    ):
        with pytest.raises(ValueError, match=f"team 'facts': {what}"):
            check_team("facts", {**described(), **change})
    for key, value in (("stop_change", 0.1), ("reads", []), ("max_rows", 8), ("passes", 1)):
        other = described()
        other["agents"][1][key] = value
        with pytest.raises(ValueError, match=f"{key} of agent 'critic'"):
            check_team("facts", other)


def test_adapters_of_the_agents():
    for scope, want in (
        ("shared", ["default"] * 3), ("per_role", ["planner", "critic", "solver"]), ("final_only", [None, None, "default"]),
    ):  # fmt: skip
        system = tiny.system(adapter_scope=scope)
        assert adapters_of({**system.describe(), "adapters": dict.fromkeys(system.model.peft_config)}) == want
    assert adapters_of({**tiny.system(lora=False).describe(), "adapters": {}}) == [None] * 3


def test_adapters_beyond_the_layers_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    for name, config in (
        ("head", LoraConfig(target_modules=["q_proj", "lm_head"])),
        ("saved", LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
        ("dora", LoraConfig(target_modules=["q_proj"], use_dora=True)),
    ):
        get_peft_model(tiny.model(), config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="team 'facts': .*expected LoRA on layers alone in vLLM, got "):
            check_adapter("facts", tmp_path / name)
    get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj", "down_proj"])).save_pretrained(tmp_path / "fine")
    check_adapter("facts", tmp_path / "fine")


def test_engines_that_cannot_be_tried_on_a_cpu_are_refused(monkeypatch):
    def config(v2=False, tp=1, pp=1, drafts=None, connector=None, family="qwen3"):
        return SimpleNamespace(
            additional_config={}, lora_config=None, use_v2_model_runner=v2, speculative_config=drafts,
            kv_transfer_config=connector, parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp),
            model_config=SimpleNamespace(enable_prompt_embeds=True, hf_text_config=SimpleNamespace(model_type=family)),
        )  # fmt: skip

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    check_engine(config())
    for options, what in (
        ({"v2": True}, "VLLM_USE_V2_MODEL_RUNNER: expected 0, or 1 for a runner that teams have not .*, got none"),
        ({"tp": 2}, "tensor_parallel_size: expected 1: .* got 2"), ({"pp": 2}, "pipeline_parallel_size: expected 1"),
        ({"drafts": 1}, "speculative_config: expected None"), ({"connector": 1}, "kv_transfer_config: expected None"),
        ({"family": "gemma2"}, "model: expected one of the families .* got gemma2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            check_engine(config(**options))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # whoever asks for it gets it
    check_engine(config(v2=True))


def test_without_vllm_nothing_of_it_is_imported_and_it_says_what_to_install(tmp_path, monkeypatch):
    modules = "course limits plugin scheduling teams".split()
    code = f"import sys; [__import__('diffmas.serving.vllm.' + m) for m in {modules}]; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm: expected it to be installed, found none; pip install vllm"):
        Teams({"facts": tmp_path})
