"""Engines that do not fit to their teams are refused before they start; those of other processes have the plugin too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from crews import CREWS, MIXED, QUESTIONS, STEPS, Engine, Ours, save_base, save_crew
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from diffmas.agents.prompts import Turn
from diffmas.serving.vllm import limits
from diffmas.serving.vllm.course import Course, extra_args, prompt_of
from diffmas.serving.vllm.teams import Teams


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("crews")
    base = save_base(root / "base")
    return {name: save_crew(root / name, base, *CREWS[name]) for name in ("bare", "shared", "roles")}


class Started(Exception):
    """An engine got as far as to be started."""


@pytest.fixture
def start(directories, monkeypatch):
    """Tries to start an engine with other options than it needs; nothing is loaded."""
    from vllm.v1.engine.core_client import EngineCoreClient

    def never(*_, **__):
        raise Started

    monkeypatch.setattr(EngineCoreClient, "make_client", never)
    teams = Teams({"shared": directories["shared"], "roles": directories["roles"]})

    def start(**options):
        LLM(**{**teams.engine_options(), "max_model_len": 128, "skip_tokenizer_init": True, **options})

    return start


def test_engines_that_do_not_fit(start, tmp_path):
    with pytest.raises(Started):
        start()
    for options, what in (
        ({"enable_prompt_embeds": False}, "enable_prompt_embeds: expected True"),
        ({"max_loras": 3}, "max_loras: expected at least 4, .* got 3"),
        ({"enable_lora": False}, "max_loras: expected at least 4, .* got no LoRA"),
        ({"max_lora_rank": 1}, "adapter 'roles/critic': expected one that vLLM takes, got another .*rank 2"),
        ({"model": str(save_base(tmp_path / "other", seed=1))}, "model: expected .*, the base model of team 'shared', got "),
    ):
        with pytest.raises(ValueError, match=what):
            start(**options)


def test_teams_of_another_base_model(directories, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="expected agents of this base model"):
        Teams({"shared": directories["shared"]}, model=str(other))
    with pytest.raises(ValueError, match="model: expected one base model of all teams"):
        Teams({"bare": directories["bare"], "other": save_crew(tmp_path / "crew", other, *CREWS["bare"])})


def test_a_plugin_that_the_engine_would_not_load(directories, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with pytest.raises(ValueError, match="vllm.general_plugins: expected the plugin 'diffmas'"):
        Teams({"bare": directories["bare"]})


def test_requests_are_refused_in_the_process_that_was_asked(directories):
    engine = Engine({name: directories[name] for name in ("shared", "roles")})
    try:
        prompt, params = engine.request("roles", QUESTIONS[0], STEPS[0])

        def asked(lora=None, ids=None, **args):
            given = SamplingParams(max_tokens=2, detokenize=False, extra_args={**params.extra_args, **args})
            given = given if args or ids else SamplingParams(max_tokens=2, detokenize=False)
            engine.llm.generate([{"prompt_token_ids": ids or prompt["prompt_token_ids"]}], [given], lora_request=lora)

        lora = LoRARequest("mine", 7, str(directories["shared"]))
        for arguments, what in (
            ({"diffmas": "others"}, "diffmas: expected one of this engine's teams"),
            ({"ids": [3, 4, 5]}, "prompt: expected [0-9]+ token ids"),
            ({"prompt_tokens": ["3"]}, "latent_steps: expected one for each of 1 agents"),
            ({"lora": lora, "other": 1}, "lora_request: expected none, a team has its own"),
            ({"lora": lora}, "lora_request: expected none beside teams whose agents have different adapters"),
        ):
            with pytest.raises(ValueError, match=what):
                asked(**arguments)
        ours = Ours({"roles": directories["roles"]})  # the engine is still there
        assert engine.tokens([("roles", *MIXED[0])]) == [ours("roles", *MIXED[0])]
    finally:
        engine.close()


def test_a_course_goes_through_vllms_own_http_server():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    turns = [Turn([5, 6, 7], 2), Turn([8], 0)]
    asked = CompletionRequest(model="base", prompt=prompt_of(turns), vllm_xargs=extra_args("facts", turns))
    params = CompletionRequest.model_validate_json(asked.model_dump_json()).to_sampling_params(4)
    assert Course.read(params.extra_args) == Course.of_turns("facts", [3, 1], [2, 0])


@pytest.mark.parametrize("kind", ("llama", "mistral", "qwen2"))
def test_families(tmp_path, kind):
    base = save_base(tmp_path / "base", kind, seed=1)  # where rounding tips no token
    directories = {"crew": save_crew(tmp_path / "crew", base, *CREWS["shared"])}
    engine, ours = Engine(directories), Ours(directories)
    try:
        assert engine.tokens([("crew", *one) for one in MIXED]) == [ours("crew", *one) for one in MIXED]
    finally:
        engine.close()


def test_an_engine_in_a_process_of_its_own(directories):
    """As vLLM starts it: the plugin comes by its entry point."""
    code = f"""
import crews
if __name__ == "__main__":
    directories = {{name: {str(directories["bare"].parent)!r} + "/" + name for name in ("bare", "roles")}}
    engine, ours = crews.Engine(directories), crews.Ours(directories)
    asked = [(name, *one) for name in directories for one in crews.MIXED]
    assert engine.tokens(asked) == engine.tokens(asked) == [ours(*one) for one in asked]
    print("equal")
"""
    here = Path(__file__).parent
    paths = [str(here.parent.parent), str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    file = directories["bare"].parent / "alone.py"
    file.write_text(code)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=400)
    assert "equal" in done.stdout, done.stderr[-3000:]


def test_an_engine_without_teams_is_as_it_was(directories):
    """The wrappers are there, and pass on."""
    engine = LLM(
        str(directories["bare"].parent / "base"), dtype="float32", enforce_eager=True, max_model_len=128,
        skip_tokenizer_init=True,
    )  # fmt: skip
    try:
        assert not limits.teams_of(engine.llm_engine.vllm_config)
        params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
        assert len(engine.generate([{"prompt_token_ids": [3, 4, 5]}], params)[0].outputs[0].token_ids) <= 4
        params.extra_args = {"diffmas": "bare", "prompt_tokens": [3], "latent_steps": [0]}
        with pytest.raises(ValueError, match="diffmas: expected one of this engine's teams, \\[\\], got 'bare'"):
            engine.generate([{"prompt_token_ids": [3, 4, 5]}], params)
    finally:
        engine.llm_engine.engine_core.shutdown()
