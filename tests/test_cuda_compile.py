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


@pytest.mark.skipif(report.nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("source", report.SOURCES, ids=lambda s: s.name)
def test_kernels_compile_for_sm_90a(source):
    rows, table = report.compiled(source, "90a"), report.table()
    assert rows
    for row in rows:
        assert not report.faults(row), row
        assert row == {name: table.get(report.key(row), row)[name] for name in row}, "make cuda-report writes the table anew"
