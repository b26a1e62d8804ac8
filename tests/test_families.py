"""Every family of transformers' causal language models is exact on a trace, or refused and left as it was."""

import functools
import re

import pytest
import transformers
from families import FAMILIES, PAGE, line, page


@functools.cache
def said() -> dict[str, tuple[str, str]]:
    """The lines of docs/families.md."""
    rows = [row[2:-2].split(" | ", 2) for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    return {family: (found, why) for family, found, why in rows[1:]}


VERSION = re.search(r"^transformers (\S+),", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]  # that the page is of


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_or_refused(family):
    found = line(family)  # asserts that it is
    if VERSION == transformers.__version__ and "ImportError" not in said()[family][1]:  # who has that package sees more
        assert said()[family] == found, "run `make families`"


def test_the_page_is_what_its_lines_make():
    assert PAGE.read_text(encoding="utf-8") == page(said(), VERSION)
