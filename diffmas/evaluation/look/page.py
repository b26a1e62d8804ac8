"""One HTML file that needs nothing else: the figures as JSON in it, and a script that draws them."""

import base64
import hashlib
import html
import json
from pathlib import Path

from diffmas.evaluation.look.figures import Look

__all__ = ["page"]

HERE = Path(__file__).parent
ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # no text of a model may end the script that holds it


def page(look: Look, path) -> Path:
    """Writes the page. What a model wrote is only ever text in it, and nothing is loaded: a policy in the page forbids all but
    its own script and style."""
    path, read = Path(path), lambda name: (HERE / name).read_text(encoding="utf-8")
    style, script = read("page.css"), read("page.figures.js") + read("page.js")
    allowed = f"script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'"
    filled = {
        "title": html.escape(look.title), "style": style, "script": script,
        "policy": f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
        "data": json.dumps(look.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPED),
    }  # fmt: skip
    pieces = read("page.html").split("{{")  # the template's own marks alone: what is filled in may hold some
    text = pieces[0] + "".join(filled[name] + rest for name, rest in (p.split("}}", 1) for p in pieces[1:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
