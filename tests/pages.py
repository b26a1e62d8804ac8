"""The documentation's pages: their code, commands and links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "commands", "links"]

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language ("" for none), its first line in the page, and what is in it."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[2], text[: m.start()].count("\n") + 2, m[3]) for m in FENCE.finditer(text)]


def commands(page: Path) -> list[list[str]]:
    """The diffmas commands of a page, in blocks without a language and between backticks, as words without the first one."""
    fenced = [line for b in blocks(page) if b.language in ("", "bash") for line in b.text.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python -m )?diffmas [^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    found = []
    for line in (*fenced, *(" ".join(text.split()) for text in inline)):
        for part in re.split(r";|\|(?! )", line):
            if m := re.search(r"^ *(?:[A-Z_]+=\S+ )*(?:accelerate launch .*-m |python -m )?diffmas (.*)", part):
                found.append(shlex.split(m[1], comments=True))
    return [words for words in found if words]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def links(page: Path) -> list[tuple[str, str]]:
    """The relative links and pictures of a page: path ("" for the page itself) and anchor."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [(t.partition("#")[0], t.partition("#")[2]) for t in found if not re.match(r"\w+:", t)]
