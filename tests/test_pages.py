"""README and docs: links lead somewhere, commands and their options exist, and every block of Python runs."""

import contextlib
import csv
import doctest
import functools
import io
import re
from importlib.util import find_spec

import openai
import pytest
import rich
import tiny_systems as tiny
import typer
import yaml
from pages import PAGES, ROOT, anchors, blocks, commands, links
from test_serving import client, listening
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffmas import Agent, patch_model
from diffmas.cli import app
from diffmas.cli.config import Config
from diffmas.cli.plain_data import parsed
from diffmas.demo import experiment
from diffmas.serving.team import Team

NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page):
    for path, anchor in links(page):
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{path}: a file, as the site has no pages of directories"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_links_are_seen():
    assert ("docs/teams.md", "") in links(ROOT / "README.md") and ("", "what-is-unproven") in links(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands(page):
    known = typer.main.get_command(app).commands
    for name, *words in commands(page):
        if name.startswith("-"):
            continue
        assert name in known, name
        options = {option for p in known[name].params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words:
            assert not word.startswith("--") or word.partition("=")[0] in options, f"diffmas {name} {word}"


def test_commands_are_seen():
    found = [words[0] for page in PAGES for words in commands(page)]
    assert {"train", "plan", "serve", "bench"} <= set(found) and len(found) > 20


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_configs(page):
    for block in blocks(page):
        if block.language == "yaml":
            parsed(Config, {"model": "base", **yaml.safe_load(block.text)})


# ---- code ------------------------------------------------------------------------------------------------------------


def team():
    """What a page that does not make its own team speaks of."""
    system = tiny.system()
    return {
        "system": system, "model": system.model, "rows": tiny.rows(2), "questions": ["where is the key"],
        "answers": ["in the garden"],
        "rich": rich, "patch_model": patch_model,
    }  # fmt: skip


def two_models():
    """Two models, and agents of both."""
    agents = [Agent("expert", "notes : {question}", 2, model="small"), Agent("solver", "question : {question}")]
    models = {"model": tiny.model(), "small": tiny.model(1), "agents": agents}
    return {**models, "tokenizer": tiny.tokenizer(), "small_tokenizer": tiny.tokenizer()}


# Pages of pieces; the others are whole programs.
GIVEN = {"docs/training.md": team, "docs/many_gpus.md": team, "docs/teams.md": two_models, "docs/view.md": team}
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITH_CODE = [name for name, page in zip(NAMES, PAGES) if any(b.language == "python" for b in blocks(page))]


def stored(kind, monkeypatch):
    """What a page loads from the hub by its name is the demo's."""
    load = kind.from_pretrained

    def from_pretrained(pretrained_model_name_or_path, **options):
        if str(pretrained_model_name_or_path).startswith("Qwen/"):
            return load(experiment.BASE)
        return load(pretrained_model_name_or_path, **options)

    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)


@pytest.mark.parametrize("name", WITH_CODE)
def test_code(name, tmp_path, monkeypatch):
    """The page's blocks one after the other; a block of text is what the one before prints. Those for packages that are not
    here are told once the others have run."""
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        stored(kind, monkeypatch)
    monkeypatch.chdir(tmp_path)
    names, lacking = GIVEN.get(name, dict)(), []
    with contextlib.ExitStack() as stack:
        if name == "docs/serving.md":
            served = Team("facts", tiny.system(base=tiny.model(max_position_embeddings=512)))
            address, _ = stack.enter_context(listening([served]))
            asking = functools.partial(client, address)
            monkeypatch.setattr(openai, "OpenAI", lambda base_url, api_key: asking(key=api_key))
        said = ""
        for block in blocks(ROOT / name):
            if block.language == "text":
                assert doctest.OutputChecker().check_output(block.text, said, LOOSELY), f"line {block.line}: it says\n{said}"
            if block.language == "python":
                wanted = re.findall(r"^(?:import|from) (\w+)", block.text, re.MULTILINE)
                if missing := [package for package in wanted if find_spec(package) is None]:
                    lacking += missing
                    continue
                code = "\n" * (block.line - 1) + block.text  # errors name the page's lines
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(code, ROOT / name, "exec"), names)
                said = out.getvalue()
    if lacking:
        pytest.skip(f"the other blocks ran; not installed: {', '.join(lacking)}")


@pytest.mark.parametrize(
    "study, name",
    [
        ("facts", "methods"),
        ("facts", "audit"),
        ("gsm8k", "methods"),
        ("openbookqa", "methods"),
        ("passes_float32", "methods"),
        ("scopes", "methods"),
    ],
)
def test_results_are_those_of_the_studies(study, name):
    """Accuracy with its interval, of each row that is stored."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    with open(ROOT / f"benchmarks/results/studies/{study}/{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        accuracy, low, high = (f"{100 * float(row[key]):.1f}" for key in ("accuracy", "low", "high"))
        assert f"| {accuracy} [{low}, {high}]" in page, row
    assert len(rows) > 1
