"""The CPU kernels' forms. Which one runs is picked when the library is loaded, so the tests that tell one from another run once
more with each, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffmas import ops

FORMS = ["generic", "avx2", "avx512", "avx512_bf16", "amx", "arm_bf16"]
TESTS = {  # of each file
    "test_ops.py": "(budget or nan or not_finite or head_sizes) and (float32 or bfloat16)",
    "test_quantized_ops.py": "(budget or nan or head_sizes or random or codes) and not float16",
    "test_low_rank_few.py": "(budget or head_sizes or nan) and not float16",
    "test_linear_op.py": "test_the_op",
    "test_layer_ops.py": "test_layers or one_row or large_numbers or test_norm_and_gate or test_a_gate",
    "test_few_rows_learning.py": "test_to_the_bit and not proj",
}


@pytest.mark.skipif(ops.available()["cpu"] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    files = [str(Path(__file__).with_name(name)) for name in TESTS]
    which = " or ".join(f"{name} and ({tests})" for name, tests in TESTS.items())
    run = lambda *arguments: subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "DIFFMAS_CPU_ISA": form}, capture_output=True, text=True
    )
    loaded = run("-c", "from diffmas.ops import extension; print(extension.cpu_form())")
    if "DIFFMAS_CPU_ISA: expected" in loaded.stderr:
        pytest.skip(f"this CPU, or this build, has no {form}")
    assert loaded.stdout == f"{form}\n", loaded.stderr
    done = run("-m", "pytest", "-v", "-x", *files, "-k", which)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not [name for name in TESTS if f"{name}::" not in done.stdout]  # a test may have another name now
