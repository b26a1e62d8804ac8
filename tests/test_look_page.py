"""The page of `diffmas view` in a real browser: it draws, light and dark, wide and narrow; it can be used by keyboard and
heard; and what a model writes does nothing but stand there."""

from dataclasses import replace
from pathlib import Path

import pytest
import systems
import test_encoder
import test_low_rank_agents
import test_other_models
import tiny_systems as tiny
import torch
from browser import browser
from test_cli import call
from test_look import saved

from diffmas.evaluation.look import look_at, look_at_file, page

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def look():
    return look_at(tiny.system(), "where is the key", "in the garden", text_agents=True, max_new_tokens=4, nearest=5)


@pytest.fixture(scope="module")
def file(look, tmp_path_factory):
    return page(look, tmp_path_factory.mktemp("page") / "new" / "view.html")


def quantised_and_encoded():
    own, *others = test_encoder.SHAPES["thinks on"]
    return test_encoder.team([replace(own, quantized="int8"), *others])


# Pages that differ in what is on them: rows that others wrote, kinds of blocks, layers that one model has and another has not.
TEAMS = {
    "one model": None,
    "two models": lambda: test_other_models.team(test_other_models.SHAPES["two and an own"]),
    "low-rank rows and a message": lambda: test_low_rank_agents.team(test_low_rank_agents.SHAPES["chain"], dtype=torch.float32),
    "quantised rows and an encoder": quantised_and_encoded,
}


@pytest.fixture(scope="module", params=TEAMS)
def of_team(request, look, file, tmp_path_factory):
    """What is shown of a team, and its page."""
    if (make := TEAMS[request.param]) is None:
        return look, file
    shown = look_at(make().eval(), systems.QUESTIONS[1], systems.ANSWERS[1], max_new_tokens=2)
    return shown, page(shown, tmp_path_factory.mktemp("page") / "view.html")


CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
# Whether two children of one line lie over each other.
OVERLAP = """
[...document.querySelectorAll(".block, .reads, #facts > div, #controls")].flatMap(row => {
  const all = [...row.children].map(n => n.getBoundingClientRect()).filter(r => r.width && r.height);
  const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return all.some((a, i) => all.slice(i + 1).some(b => over(a, b))) ? [row.textContent] : [];
})
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width, height", [(1440, 900), (390, 844)])
def test_it_draws(chromium, of_team, width, height, dark, tmp_path):
    look, file = of_team
    chromium.open(file, width, height, dark)
    assert chromium.faults() == []
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll in themselves
    assert chromium.evaluate(OVERLAP) == []
    assert chromium.evaluate("document.querySelectorAll('.lane').length") == len(look.lanes)
    latent = sum(block.rows for block in look.blocks if block.kind == "latent")
    assert chromium.evaluate("document.querySelectorAll('.latent .step').length") == latent >= 3
    shown = [
        x > 0 for x in chromium.evaluate("[...document.querySelectorAll('#masses td')].map(n => n.getClientRects().length)")
    ]
    assert len(shown) == 1 + len(look.blocks) * (len(look.blocks) + 1) and all(shown)
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 28)" if dark else "rgb(251, 251, 250)"
    )
    between = look.between_lanes()[:, 1:].fill_diagonal_(0)
    arcs = int((between > 0.002).sum()) if width > 600 else 0
    assert chromium.evaluate("document.querySelectorAll('#arcs path').length") == arcs
    for looked_at in ("h1", ".answer .step"):
        chromium.point(looked_at)
        chromium.evaluate("new Promise(done => setTimeout(done, 300))")  # colours fade in
        (worst, where), *_ = chromium.evaluate(CONTRAST)
        assert worst >= 4.5, where
    assert chromium.screenshot(tmp_path / "page.png").stat().st_size > 10_000


def test_its_numbers_are_the_figures(chromium, look, file):
    chromium.open(file)
    percent = lambda x: (  # noqa: E731
        f"{100 * x:.0f} %" if x >= 0.0995 else f"{100 * x:.1f} %" if x >= 0.0005 else "< 0.1 %" if x else "–"
    )
    rows = chromium.evaluate(
        "[...document.querySelectorAll('#masses tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    mass = look.between_blocks().roll(-1, 1)  # the first token comes last
    assert rows == [[percent(float(f"{x:.4g}")) for x in row] for row in mass.tolist()]
    shares = chromium.evaluate("[...document.querySelectorAll('.shares')].at(-1).textContent")
    assert all(f"{100 * x:.0f} %" in shares for x in look.between_lanes()[-1].tolist() if x > 0.1)
    chromium.evaluate("{ const l = document.getElementById('layer'); l.value = 1; l.dispatchEvent(new Event('input')); }")
    rows = chromium.evaluate(
        "[...document.querySelectorAll('#masses tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    assert rows == [[percent(float(f"{x:.4g}")) for x in row] for row in look.between_blocks(1).roll(-1, 1).tolist()]
    assert chromium.evaluate("document.getElementById('layer').getAttribute('aria-valuetext')") == "layer 1"
    gradients = chromium.evaluate(
        "[...document.querySelectorAll('#gradient-bars .number')].map(n => parseFloat(n.textContent))"
    )
    want = [float(torch.tensor(b.gradient).norm()) for b in look.blocks if b.gradient]
    assert gradients == pytest.approx(want, rel=6e-3) and len(want) == 5


def test_hover_shows_what_a_step_says_and_whom_it_hears(chromium, look, file):
    chromium.open(file)
    detail = lambda: chromium.evaluate("document.getElementById('detail').textContent")  # noqa: E731
    assert "Look closer" in detail()
    chromium.point(".latent .step")
    step = look.blocks[1].steps[0]
    assert "planner · latent step 1 of 2" in detail() and "is nearest to" in detail()
    assert all(text.strip() in detail() for text, _ in step.nearest) and f"{step.entropy:.3g}" in detail()
    first = "[...document.querySelector('.prompt .text').children].map(n => parseFloat(n.style.getPropertyValue('--mass')))"
    shades = chromium.evaluate(first)
    own = look.rows[1][1 : look.blocks[0].rows]  # without the first token
    assert shades[0] == 0 and shades[1:] == pytest.approx((own / look.rows[1][1:].max()).sqrt().tolist(), abs=2e-3)
    chromium.point("h1")
    assert "Look closer" in detail() and set(chromium.evaluate(first)) == {0}
    chromium.evaluate("document.querySelector('.answer .step').click()")
    chromium.point("h1")
    assert "solver · token 1 of" in detail()  # kept
    arcs = (
        "[...document.querySelectorAll('#arcs g')].map(g => [+g.dataset.source, +g.dataset.reader, g.classList.contains('on')])"
    )
    assert chromium.evaluate(arcs) == [[0, 1, False], [0, 2, True], [1, 2, True]]
    chromium.call("Emulation.setDeviceMetricsOverride", width=1300, height=900, deviceScaleFactor=1, mobile=False)
    chromium.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert chromium.evaluate(arcs) == [[0, 1, False], [0, 2, True], [1, 2, True]]  # drawn anew
    chromium.evaluate("document.getElementById('close').click()")
    assert "Look closer" in detail()


def test_a_layer_that_only_one_model_has(chromium, tmp_path):
    """Is told as such at the agents of the other, whose attention would else be 0 %."""
    look = look_at(TEAMS["two models"]().eval(), systems.QUESTIONS[1], max_new_tokens=2)
    chromium.open(page(look, tmp_path / "view.html"))
    chromium.evaluate("{ const l = document.getElementById('layer'); l.value = 2; l.dispatchEvent(new Event('input')); }")
    shares = chromium.evaluate("[...document.querySelectorAll('.shares')].map(n => n.textContent)")
    none = "its model has no layer 2"
    assert shares[:2] == [none, none] and "first token" in shares[2] and "first token" in shares[3]
    rows = chromium.evaluate(
        "[...document.querySelectorAll('#masses tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    assert rows[:4] == [[none]] * 4 and all(len(row) == 9 for row in rows[4:]) and look.layers == 3
    chromium.evaluate("document.querySelector('.latent .step').click()")
    assert none in chromium.evaluate("document.getElementById('detail').textContent") and chromium.faults() == []
    heat = "document.querySelector('#detail .heat').getAttribute('aria-label')"
    assert chromium.evaluate(heat) == "attention, layer by layer, layers 0 to 1"
    chromium.evaluate("document.querySelector('.answer .step').click()")
    assert none not in chromium.evaluate("document.getElementById('detail').textContent")
    assert chromium.evaluate(heat) == "attention, layer by layer, layers 0 to 2"


def test_keyboard_and_names(chromium, of_team):
    look, file = of_team
    chromium.open(file)
    (first, latent), lanes, kinds = look.blocks[:2], [lane.name for lane in look.lanes], {b.kind for b in look.blocks}
    tokens = lambda block: f"{block.rows} token{'' if block.rows == 1 else 's'}"  # noqa: E731
    focus = lambda: chromium.evaluate("document.activeElement.getAttribute('aria-label')")  # noqa: E731
    chromium.evaluate("document.getElementById('layer').focus()")
    chromium.press("Tab")
    assert focus() == f"{lanes[0]}, prompt, {tokens(first)}"
    chromium.press("ArrowRight")
    text = latent.steps[0].text
    assert text and focus().startswith(f"{lanes[0]}, latent step 1 of {latent.rows}: {text}, ") and focus().endswith("nats")
    chromium.press("Enter")
    assert chromium.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    chromium.press("ArrowDown")
    assert focus() == f"{lanes[1]}, prompt, {tokens(look.blocks[2])}" and look.blocks[2].agent == 1
    chromium.press("ArrowUp")
    chromium.press("End")
    assert focus().startswith(f"{lanes[-1]}, token")
    chromium.press("Escape")
    assert chromium.evaluate("document.querySelectorAll('.kept').length") == 0
    chromium.press("Tab")
    assert focus() == "Attention between blocks"  # one stop for all steps; then the table, which scrolls
    buttons = chromium.names("button")
    assert len(buttons) >= sum(block.units for block in look.blocks) and all(buttons)
    also = {"text"} & kinds | ({"text agents"} if look.lanes[0].message else set())
    assert {"prompts", "latent steps", "answer", "attention"} | also == {n.strip() for n in chromium.names("checkbox")}
    assert [n.strip() for n in chromium.names("searchbox")] == ["Find"] and [
        n.split()[0] for n in chromium.names("slider")
    ] == ["Layers"]
    assert chromium.names("heading")[0] == look.title and {*lanes} <= {*chromium.names("heading")}
    blocks = len(look.blocks)
    assert len(chromium.names("columnheader")) == blocks + 1 and len(chromium.names("rowheader")) == blocks


def test_filters(chromium, look, file):
    chromium.open(file)
    chromium.evaluate("document.getElementById('find').focus()")
    chromium.type("key")
    prompts = sum("key" in text for b in look.blocks if not b.steps for text in b.texts)
    steps = sum(any("key" in text for text, _ in [*s.nearest, (s.text, 0)]) for b in look.blocks for s in b.steps)
    assert prompts == 3 and chromium.evaluate("document.getElementById('found').textContent") == f"{prompts + steps} found"
    assert chromium.evaluate("document.querySelectorAll('.match').length") == prompts + steps
    chromium.evaluate("document.querySelector('#kinds input').click()")
    assert chromium.evaluate("[...document.querySelectorAll('.prompt')].some(n => n.getClientRects().length)") is False
    assert chromium.evaluate("[...document.querySelectorAll('.latent')].every(n => n.getClientRects().length)") is True
    options = chromium.evaluate("[...document.querySelectorAll('#shade option')].map(o => o.value)")
    assert options == ["p", "entropy", "norm", "embedding", "gradient"]
    chromium.evaluate(
        "{ const s = document.getElementById('shade'); s.value = 'entropy'; s.dispatchEvent(new Event('change')); }"
    )
    shades = chromium.evaluate(
        "[...document.querySelectorAll('.step')].map(n => parseFloat(n.style.getPropertyValue('--shade')))"
    )
    entropy = [s.entropy for b in look.blocks for s in b.steps]
    want = [(x - min(entropy)) / (max(entropy) - min(entropy)) for x in entropy]
    assert shades == pytest.approx(want, abs=2e-3) and chromium.faults() == []


@pytest.mark.parametrize("width", [1440, 390])
def test_long_texts(chromium, width, tmp_path):
    """A prompt begins with what is the agent's own; the rest is there when it is asked for. Nothing lies over anything."""
    long = look_at(tiny.system(), "where is the key", text_agents=True, max_new_tokens=4)
    long.lanes[0].message, long.facts = "word " * 200, [("answer", "a\n\n\nb\nc\nd " * 40), ("model", "x" * 300)]
    block = long.blocks[0]
    block.rows, block.texts, block.own = 6, ["<system>", "lines\n" * 9, "own ", "words ", "here", "<end>"], (2, 5)
    chromium.open(page(long, tmp_path / "view.html"), width, 844)
    assert chromium.evaluate(OVERLAP) == [] and chromium.evaluate("document.documentElement.scrollWidth") <= width
    shown = "document.querySelector('.prompt .text').innerText"
    assert chromium.evaluate(shown).strip() == "own words here"
    for more, text in (("show less", "<end>"), ("show all of it", "here")):
        chromium.evaluate("document.querySelector('.prompt .more').click()")
        assert chromium.evaluate("document.querySelector('.prompt .more').textContent") == more
        assert chromium.evaluate(shown).strip().endswith(text)
    assert chromium.faults() == []


def test_hostile_text_does_nothing(chromium, look, tmp_path):
    evil = look_at(tiny.system(), "where is the key", text_agents=True, max_new_tokens=4)
    evil.title = evil.lanes[0].name = evil.lanes[1].message = evil.blocks[1].steps[0].text = evil.blocks[0].texts[1] = HOSTILE
    evil.blocks[1].steps[0].nearest[0] = (HOSTILE + "\u202e\u2028", 1.0)
    evil.facts = [(HOSTILE, HOSTILE), ("{{script}}", "{{data}} <!-- <script>")]
    chromium.open(page(evil, tmp_path / "view.html"))
    chromium.point(".latent .step")
    assert chromium.faults() == [] and chromium.evaluate("document.querySelectorAll('img').length") == 0
    assert chromium.evaluate("document.querySelector('.latent .step').textContent") == HOSTILE
    assert (
        chromium.evaluate("document.querySelector('h1').textContent")
        == chromium.evaluate("document.title")[: len(HOSTILE)]
        == HOSTILE
    )
    assert "{{data}} <!-- <script>" in chromium.evaluate("document.getElementById('facts').textContent")
    assert "\\u202e\\u2028" in chromium.evaluate("document.getElementById('detail').textContent")
    # And if it came to be markup by some mistake, the page's policy would not run it.
    chromium.evaluate(
        f"document.body.insertAdjacentHTML('beforeend', {HOSTILE[9:]!r}), new Promise(done => setTimeout(done, 200))"
    )
    assert not any("dialog" in fault for fault in chromium.faults())
    assert any("Content Security Policy" in fault for fault in chromium.faults())


def test_a_saved_trace(chromium, tmp_path):
    _, trace = saved(tmp_path)
    chromium.open(page(look_at_file(trace, tiny.tokenizer()), tmp_path / "view.html"), 390, 844)
    assert chromium.faults() == [] and chromium.evaluate("document.documentElement.scrollWidth") <= 390
    assert chromium.evaluate("[...document.querySelectorAll('.step')].map(n => n.textContent)") == ["1", "2", "1", "2"]
    assert chromium.evaluate("document.getElementById('matrix').hidden && document.getElementById('gradients').hidden") is True
    chromium.point(".latent .step")
    detail = chromium.evaluate("document.getElementById('detail').textContent")
    assert "norm of values" in detail and "nearest" not in detail and "probability" not in detail
    assert chromium.evaluate("document.querySelectorAll('#detail .heat').length") == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    tiny.save_base(tmp_path / "base")
    tiny.system().save_pretrained(tmp_path / "team")
    question = ("--question", "where is the key", "--model", tmp_path / "base", "--device", "cpu", "--max-new-tokens", 3)
    out, figure = tmp_path / "view.html", tmp_path / "view.svg"
    asked = ("--answer", "in the garden", "--text", "--output", out, "--figure", figure)
    assert call("view", tmp_path / "team", *question, *asked).stdout.split() == [str(out), str(figure)]
    text = out.read_text()
    assert '"right answer"' in text and "in the garden" in text and '"gradient":[' in text and figure.exists()
    assert '"made with"' in text and f"torch {torch.__version__}" in text and "seed 0" in text
    assert "--question: expected a question" in call("view", tmp_path / "team", code=1).output
    assert "--field: expected name=text, got 'a'" in call("view", tmp_path / "team", "--field", "a", code=1).output
    _, trace = saved(tmp_path)
    call("view", trace, "--output", out)
    assert '"attention":null' in out.read_text() and '"#' in out.read_text()
    call("view", trace, "--model", tmp_path / "base", "--output", out, "--sequence", 1)
    assert "lamp" in out.read_text()
    assert "expected none with a saved trace" in call("view", trace, "--question", "a", code=1).output
    said = call("view", tmp_path / "nothing", "--question", "a", code=1).output
    assert "nothing: expected the directory of a team or a saved trace, found none" in said
