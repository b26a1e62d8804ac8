"""Other models by config.yaml: teams that are trained, evaluated and answer, and C2C as a baseline."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny_systems as tiny
import torch
import yaml
from safetensors.torch import load_file
from test_cli import call

from diffmas import Agent, MultiAgentSystem, Trainer, default_arguments
from diffmas.agents.member import Other
from diffmas.agents.projector import Fuser
from diffmas.cli import build, config
from diffmas.demo.experiment import BASE
from diffmas.evaluation import c2c
from diffmas.evaluation.tasks import facts, task
from diffmas.models.load import load_model
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_model
from diffmas.serving.export import export

AGENTS = [
    {"name": "expert", "prompt": "notes : {question}", "latent_steps": 2, "model": "small"},
    {"name": "solver", "prompt": "question : {question} answer :"},
]  # fmt: skip
SETTINGS = {
    "model": "base", "output_dir": "run", "agents": AGENTS, "lora": {"r": 2, "alpha": 4},
    "others": {"small": {"model": "small", "projector": {"kind": "projector", "hidden": 8}, "lora": True}},
    "c2c": {"model": "small", "projector": {"hidden": 16, "inner": 16}}, "data": {"train": "rows.jsonl"},
    "training": {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "gradient_accumulation_steps": 1},
    "generation": {"max_new_tokens": 4, "temperature": 0.6},
    "evaluation": {"data": "rows.jsonl", "limit": 3, "samples": 2, "max_message_tokens": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    tiny.save_base(path / "base")
    tiny.save_base(path / "small", seed=1, num_hidden_layers=3, hidden_size=24, head_dim=12)
    tiny.write_jsonl(path / "rows.jsonl", tiny.rows(10))
    (path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    return path


def test_a_team_and_c2c_are_trained_and_compared(project):
    path = project / "config.yaml"
    for method, directory in (("diffmas", "run"), ("c2c", "run-c2c")):
        output = call("train", path, "--method", method).output
        assert "3 steps" in output
        weights = load_file(next((project / directory / "others").rglob("projector.safetensors")))
        assert weights and all(x.isfinite().all() for x in weights.values())
        assert (project / directory / "adapter_model.safetensors").is_file() == (method == "diffmas")
    assert (project / "run" / "others" / "small" / "adapter_model.safetensors").is_file()
    methods = ("--methods", "single,text,c2c,diffmas", "--device", "cpu", "--adapter", project / "run")
    result = call("evaluate", path, "--c2c", project / "run-c2c", *methods[2:], "--output", project / "out")
    assert "latent_mas: left out, it needs agents of one model" in result.stderr
    lines = (project / "out" / "results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["single", "text", "c2c", "diffmas"]
    output = call("evaluate", path, *methods, code=1).output
    assert "'c2c' needs --c2c DIR" in output
    output = call("evaluate", path, *methods[:2], "--c2c", project / "run", *methods[2:], code=1).output
    assert "expected a system of the class diffmas.evaluation.c2c.C2C" in " ".join(output.split())
    card = (project / "run-c2c" / "README.md").read_text()
    exec(re.search(r"^from diffmas.* import C2C$", card, re.MULTILINE)[0], found := {})  # as the card says
    assert found["C2C"].class_name() == "diffmas.evaluation.c2c.C2C"  # as directories have it
    output = call("evaluate", path, "--methods", "latent_mas", "--adapter", project / "run", "--device", "cpu", code=1).output
    assert "expected agents of one model for another team of them, got others: ['small']" in " ".join(output.split())
    output = call("train", path, "--method", "text_sft", code=1).output
    message = "text_sft: expected agents of one model, which share its adapter, got some of others: ['expert']"
    assert message in " ".join(output.split())
    answers = call("generate", "--adapter", project / "run", "--question", "where is the key", "--max-new-tokens", 4).output
    assert answers.strip()
    with pytest.raises(ValueError, match=r"run: expected a team of one model, got others beside it: \['small'\]"):
        export(project / "run", project / "exported")


def test_c2c_is_of_the_prompt_that_is_asked(project, tmp_path):
    settings = config.load(project / "config.yaml")
    build.c2c_system(settings).save_pretrained(tmp_path / "fused")
    described = json.loads((tmp_path / "fused" / "agents.json").read_text())
    assert [agent["name"] for agent in described["agents"]] == ["sharer", "receiver", "solver"]
    bare = build.trained_system(settings, None)
    method = build.methods_of(settings, bare, ["c2c"], {"c2c": tmp_path / "fused"})["c2c"]
    assert method.system.describe()["others"] == described["others"]
    for agent in described["agents"]:
        agent["prompt"] = "question : {question}"
    (tmp_path / "fused" / "agents.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="fused: expected prompt 'question : {question} answer :' of agent 'sharer'"):
        build.methods_of(settings, bare, ["c2c"], {"c2c": tmp_path / "fused"})
    settings.c2c.lora = True
    with pytest.raises(ValueError, match="c2c.lora: expected false, since the projector alone is trained, got true"):
        build.c2c_system(settings)
    settings.c2c = None
    with pytest.raises(ValueError, match="c2c: expected the model whose rows are fused"):
        build.c2c_system(settings)


def test_a_saved_c2c_is_that_of_the_config(project, tmp_path):
    settings, fused = config.load(project / "config.yaml"), {"c2c": tmp_path / "fused"}
    build.c2c_system(settings).save_pretrained(tmp_path / "fused")
    bare, asked = build.trained_system(settings, None), settings.c2c
    for changes, error in (
        ({"projector": {"hidden": 8, "inner": 16}}, "fused: c2c: expected hidden 8, got 16"),
        ({"projector": {**asked.projector, "layers": "depth"}}, r"fused: c2c: expected layers \[0, 2\], got \[1, 2\]"),
        ({"model": str(project / "base")}, "expected agents of this base model .* got those of .*small"),
    ):
        settings.c2c = replace(asked, **changes)
        with pytest.raises(ValueError, match=error):
            build.methods_of(settings, bare, ["c2c"], fused)
    for same in (None, replace(asked, projector={**asked.projector, "layers": "terminal", "dropout": 0.5})):
        settings.c2c = same
        assert list(build.methods_of(settings, bare, ["c2c"], fused)) == ["c2c"]


@pytest.mark.parametrize("kind, roles", [("encoder", ["reader", "solver"]), ("projector", ["solver"])])
def test_a_role_has_an_adapter_where_the_systems_model_writes_its_rows(project, kind, roles):
    """It does for an agent whose prompt another model encodes, and not for one that another model runs."""
    agents = [{**AGENTS[0], "name": "reader"}, AGENTS[1]]
    given = {"model": str(project / "base"), "dtype": "float32", "agents": agents, "system": {"adapter_scope": "per_role"}}
    others = {"small": {"model": str(project / "small"), "projector": {"kind": kind}}}
    system = build.untrained_system(config.parsed(config.Config, {**given, "others": others}))
    assert sorted(system.model.peft_config) == roles
    system(["where is the key"], ["in the garden"]).loss.backward()
    for role in roles:
        assert any(p.grad.any() for name, p in system.named_parameters() if f"lora_B.{role}." in name)


def team_of(project, **other):
    """The settings of the team, with absolute paths, and with another other model."""
    others = {"small": {**SETTINGS["others"]["small"], "model": str(project / "small"), **other}}
    given = {"model": str(project / "base"), "dtype": "float32", "agents": AGENTS, "others": others}
    return config.parsed(config.Config, given)


def test_a_study_may_ask_a_trained_team_otherwise(project, tmp_path):
    """As a case does that is `trained_by` another: the other models stay."""
    settings = team_of(project)
    build.untrained_system(settings).save_pretrained(tmp_path / "team")
    settings.agents[0] = replace(settings.agents[0], latent_steps=3)
    system = build.trained_system(settings, tmp_path / "team", other_agents=True)
    assert [agent.latent_steps for agent in system.agents] == [3, 0] and list(system.others) == ["small"]
    again = build.trained_system(team_of(project), tmp_path / "team")
    system.agents[0] = again.agents[0]
    asked = dict(questions=["where is the key"], answers=["in the garden"])
    assert torch.equal(system(**asked).loss, again(**asked).loss)


def test_a_trained_teams_other_models_are_the_configs(project, tmp_path):
    build.untrained_system(team_of(project)).save_pretrained(tmp_path / "team")
    tiny.save_base(tmp_path / "another", seed=2, num_hidden_layers=3, hidden_size=24, head_dim=12)
    load = lambda settings: build.trained_system(settings, tmp_path / "team")  # noqa: E731
    where = "team: others, 'small': expected "
    for change, message in (
        ({"model": str(tmp_path / "another")}, "small: expected agents of this base model .*, got those of"),
        ({"projector": {"kind": "projector", "hidden": 4}}, where + "hidden 4, got 8"),
        ({"projector": {"kind": "projector", "layers": "depth"}}, where + r"layers \[0, 2\], got \[1, 2\]"),
        ({"projector": {"kind": "projector", "width": 3}}, where + "width 3, got None"),
        ({"realign": "norm"}, where + "realign 'norm', got 'ridge'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(team_of(project, **change))
    shutil.copytree(project / "small", tmp_path / "moved")
    found = load(team_of(project, model=str(tmp_path / "moved"), projector={"kind": "projector", "layers": "terminal"}))
    assert causal_lm_of(found.others["small"].model).config._name_or_path == str(tmp_path / "moved")
    alone = config.parsed(config.Config, {"model": str(project / "base"), "agents": AGENTS[1:]})
    described = json.loads((tmp_path / "team" / "agents.json").read_text())
    (tmp_path / "team" / "agents.json").write_text(json.dumps({**described, "agents": described["agents"][1:]}))
    with pytest.raises(ValueError, match=r"team: expected others \[\], got \['small'\]"):
        load(alone)


@pytest.mark.parametrize("of", ["task", "task with T", "last_k"])
def test_c2c_is_evaluated_as_it_was_trained(project, tmp_path, of):
    """Training and evaluation ask one agent alike: the task's own prompt of one, or the last agent's; whatever a team needs."""
    given = {
        "task": {"task": "gsm8k"}, "task with T": {"task": "gsm8k", "latent_steps": 2},
        "last_k": {"agents": AGENTS, "others": SETTINGS["others"], "system": {"grad_scope": "last_k", "last_k": 2}},
    }  # fmt: skip
    c2c = {**SETTINGS["c2c"], "model": str(project / "small")}
    settings = config.parsed(config.Config, {"model": str(project / "base"), "dtype": "float32", "c2c": c2c, **given[of]})
    for other in settings.others.values():
        other.model = str(project / "small")
    trained = build.c2c_system(settings)
    wanted = settings.agents[-1] if of == "last_k" else task("gsm8k").agents("single")[0]
    assert {agent.prompt for agent in trained.agents} == {wanted.prompt}
    trained.save_pretrained(tmp_path / "fused")
    bare = build.trained_system(settings, None)
    method = build.methods_of(settings, bare, ["c2c"], {"c2c": tmp_path / "fused"})["c2c"]
    assert method.system.describe() == trained.describe()


def test_configs_that_do_not_fit():
    for change, message in (
        ({"others": {"small": {}}}, "others.small.model: expected a value, got none"),
        ({"others": {"small": {"model": "x", "hidden": 3}}}, "others.small.hidden: expected"),
        ({"others": {"small": "x"}}, "others.small.: expected a mapping, got str"),
        ({"c2c": {"model": "x", "lora": 3}}, "c2c.lora: expected bool, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            config.parsed(config.Config, {**SETTINGS, **change})
    model = patch_model(tiny.model())
    for projector, message in (
        ({"kind": "linear"}, r"projector: expected a kind of \['c2c', 'encoder', 'projector'\], got 'linear'"),
        ({"kind": "projector", "width": 3}, "projector: expected options of Projector, got {'width': 3}"),
    ):
        settings = config.parsed(config.Config, SETTINGS)
        described = config.OtherModel("small", projector)
        with pytest.raises(ValueError, match=message):
            build.other_of(described, settings, model, loaded=(tiny.model(1), tiny.tokenizer()))


def test_c2c_lowers_the_loss_of_the_demos_model(tmp_path):
    """It has to learn what the answers look like: the question alone tells the model nothing."""
    torch.manual_seed(0)
    model, tokenizer = load_model(str(BASE), dtype=torch.float32)
    sharer, theirs = load_model(str(BASE), dtype=torch.float32)
    for one in (model, sharer):
        patch_model(one.requires_grad_(False))
    other = Other(sharer, theirs, Fuser(sharer, model, hidden=64, inner=64))
    team = MultiAgentSystem(model, tokenizer, [Agent("solver", facts.SOLVER_PROMPT)])
    method = c2c(team, other)
    held_out = facts.make_rows(32, seed=1)
    questions, answers = [{"question": row["question"]} for row in held_out], [row["answer"] for row in held_out]
    before, tokens = method.loss(questions, answers)
    arguments = default_arguments(
        tmp_path, max_steps=20, per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=3e-3, report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    method.system.train()
    Trainer(method.system, arguments, train_dataset=facts.make_rows(320, seed=2)).train()
    method.system.eval()
    after, _ = method.loss(questions, answers)
    print(before / tokens, after / tokens)
    assert after < 0.9 * before
    assert other.projector.temperature == pytest.approx(0.001 ** (19 / 20))
    assert not any(p.requires_grad for p in (*model.parameters(), *sharer.parameters()))
