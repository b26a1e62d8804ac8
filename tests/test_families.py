"""Every family of transformers' causal language models is exact on a trace, or refused and left as it was."""

import pytest
import transformers
from families import FAMILIES, PAGE, line, page


def said() -> dict[str, tuple[str, str]]:
    """The lines of docs/families.md."""
    rows = [row[2:-2].split(" | ", 2) for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    return {family: (found, why) for family, found, why in rows[1:]}


of_the_page = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE.read_text(encoding="utf-8"), reason="the page is of another version"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_or_refused(family):
    found = line(family)  # asserts that it is
    if f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8"):
        if "ImportError" not in said()[family][1]:  # who has that package sees more
            assert said()[family] == found, "run `make families`"


@of_the_page
def test_the_page_is_what_its_lines_make():
    assert PAGE.read_text(encoding="utf-8") == page(said())
