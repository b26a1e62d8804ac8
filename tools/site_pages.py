"""mkdocs's hooks: pages that stand outside docs/, as README.md, and files there that pages link to, come along; the page of
commands is written.

mkdocs knows docs/ alone, and a link to ../benchmarks leads out of the site. Pages have the links that work in the repository;
here they are led to where the site has the file.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

from tools.site_commands import page as commands

__all__ = ["PAGES", "linked", "moved", "on_files", "on_page_markdown", "place"]

ROOT = Path(__file__).parent.parent
PAGES = {  # in the repository -> in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(#[^)\s]*)?\))")  # the path of a relative link, or of a picture


def place(path: str) -> str:
    """Where the site has a file of the repository. path: from the repository's root."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def _origin(uri: str) -> str:
    """The file of the repository that a page is made of."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def _parts(markdown: str) -> list[str]:
    """Text and fenced code in turns; links are in the text only."""
    return re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)


def linked(markdown: str, origin: str) -> list[str]:
    """The files of the repository that a page links to, from the root. origin: the page's own file."""
    found = [target for part in _parts(markdown)[::2] for target, _ in LINK.findall(part)]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)) for target in found]


def moved(markdown: str, uri: str) -> str:
    """A page's text with its links led to where the site has the files. uri: of the page in the site."""
    here, there = posixpath.dirname(_origin(uri)), posixpath.dirname(uri)

    def new(match: re.Match) -> str:
        target = place(posixpath.normpath(posixpath.join(here, match[0])))
        return posixpath.relpath(target, there or ".")

    parts = _parts(markdown)
    return "".join(LINK.sub(new, part) if i % 2 == 0 else part for i, part in enumerate(parts))


def on_files(files, config):
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=os.fspath(ROOT / path)))
    for file in list(files.documentation_pages()):
        for path in linked(Path(file.abs_src_path).read_text(encoding="utf-8"), _origin(file.src_uri)):
            uri = place(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / path)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown, page, config, files):
    return moved(markdown, page.file.src_uri)
