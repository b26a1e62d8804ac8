"""The CUDA kernels compile with nvcc for a GPU that is not there: no spills, 16-byte accesses, as the committed table says."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "tools" / "cuda_report.py"
spec = importlib.util.spec_from_file_location("cuda_report", PATH)
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


def test_the_table_is_whole_and_without_fault():
    rows = report.table().values()
    assert {(row["source"], row["target"]) for row in rows} == {
        (s.name, t) for s in report.SOURCES for t in report.targets_of(s)
    }
    assert not [(row, report.faults(row)) for row in rows if report.faults(row)]


def test_the_table_is_of_this_code():
    code = {source.name: report.code_of(source) for source in report.SOURCES}
    stale = {row["source"] for row in report.table().values() if row["code"] != code[row["source"]]}
    assert not stale, f"`make cuda-report` writes the table anew: {stale}"


def test_what_a_file_includes_is_part_of_its_code(tmp_path, monkeypatch):
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(report, "CSRC", tmp_path)
    source, beside, above = tmp_path / "cuda/a.cu", tmp_path / "cuda/b.h", tmp_path / "c.h"
    source.write_text('#include <cmath>\n#include "b.h"  // of ours\nint a;\n')
    beside.write_text('#include "c.h"\n#include "b.h"\n')
    above.write_text("int c;\n")
    code = report.code_of(source)
    above.write_text("// said\nint   c; /* and\nsaid */\n")
    assert report.code_of(source) == code
    above.write_text("int d;\n")
    assert report.code_of(source) != code


def to_compile():
    """The smallest file, which shows that the table is what this nvcc makes; all of them where the table is another nvcc's."""
    known = {row["nvcc"] for row in report.table().values()}
    every = report.nvcc() is not None and report.version() not in known
    return [source for source in report.SOURCES if every or source.name == "inject.cu"]


@pytest.mark.skipif(report.nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("source", to_compile(), ids=lambda s: s.name)
def test_kernels_compile_for_sm_90a(source):
    rows, table = report.compiled(source, "90a"), report.table()
    assert rows
    for row in rows:
        assert not report.faults(row), row
        assert row == {name: table.get(report.key(row), row)[name] for name in row}, "make cuda-report writes the table anew"
