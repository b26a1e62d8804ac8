"""The documentation's site: it builds without a warning, needs nothing from elsewhere, and shows our docstrings as meant."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from diffmas.cli import app

missing = [name for name in ("mkdocs", "material", "mkdocstrings", "griffe") if find_spec(name) is None]
if missing:
    pytest.skip(f"not installed: {', '.join(missing)} (make docs)", allow_module_level=True)

from tools.site_docstrings import markdown  # noqa: E402
from tools.site_pages import linked, moved, place  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", out]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_nothing_comes_from_elsewhere(site):
    """No script, style, font or picture, and no diagram that would fetch a library to draw it."""
    pages = list(site.rglob("*.html"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|object)\b[^>]*\bsrc=\"?(\S+)", text)
        loaded += re.findall(r"<link\b[^>]*rel=\"?(?:stylesheet|preconnect|icon)\b[^>]*href=\"?(\S+)", text)
        assert loaded and not [x for x in loaded if re.match(r"(https?:)?//", x)], page
        assert 'class="mermaid"' not in text, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_links_of_the_pages(site):
    """mkdocs has looked at links between pages; here are those to pictures and files, which come along from the repository."""
    for page in site.glob("*.html"):
        if page.name != "404.html":
            for target in re.findall(r'(?:src|href)="([^"#:?]+)[#"]', page.read_text(encoding="utf-8")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_reference_shows_signatures_and_examples(site):
    text = (site / "api" / "system.html").read_text(encoding="utf-8")
    assert 'id="diffmas.MultiAgentSystem.generate"' in text and "<strong>latent_steps</strong>" in text
    plain = re.sub(r"<[^>]+>", "", text)
    assert "Agent(" in plain and "system.generate(" in plain and "realign: str = " in plain


def test_the_page_of_commands_has_all_of_them(site):
    shown = re.sub(r"<[^>]+>", "", (site / "commands.html").read_text(encoding="utf-8"))
    commands = typer.main.get_command(app).commands
    assert len(commands) > 10
    for name, command in commands.items():
        assert f"diffmas {name} [OPTIONS]" in shown, name
        for option in (x for p in command.params for x in p.opts if x.startswith("--")):
            assert option in shown, f"{name} {option}"


def test_where_files_are():
    assert place("README.md") == "index.md" and place("docs/api/system.md") == "api/system.md"
    assert place("benchmarks/results/x.png") == "files/benchmarks/results/x.png"
    text = "[a](training.md#x) ![b](../benchmarks/b.png) [c](https://c.org/d)\n```\n[e](f.md)\n```\n[g](../README.md)"
    want = "[a](training.md#x) ![b](files/benchmarks/b.png) [c](https://c.org/d)\n```\n[e](f.md)\n```\n[g](index.md)"
    assert moved(text, "teams.md") == want
    assert moved("[a](docs/teams.md)", "index.md") == "[a](teams.md)"
    assert moved("[a](../../examples/x.yaml)", "api/system.md") == "[a](../files/examples/x.yaml)"
    assert linked(text, "docs/teams.md") == ["docs/training.md", "benchmarks/b.png", "README.md"]


def test_docstrings_as_markdown():
    text = (
        "What it does, [a][b].\n\nmodel: a model,\n    patched.\nmode:\n        none: as it is.\n        norm: scaled.\n"
        "id: `x[0][1]`. Returns x.\n\nsize, name: of it. kind:\nwhich: a, b. Raises ValueError otherwise.\n\n    >>> f(a)[0][1]"
    )
    assert markdown(text, ["model", "mode", "id", "size", "name", "kind"]).split("\n") == [
        "What it does, [a]\\[b].", "", "- **model**: a model,", "    patched.", "- **mode**:", "    - **none**: as it is.",
        "    - **norm**: scaled.", "- **id**: `x[0][1]`.", "", "Returns x.", "", "- **size, name**: of it.",
        "- **kind**:", "    which: a, b.", "", "Raises ValueError otherwise.", "", "    >>> f(a)[0][1]",
    ]  # fmt: skip
