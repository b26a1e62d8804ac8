"""The CPU kernels' other forms: which one runs is picked when the library is loaded, so each in a process of its own."""

import os
import subprocess
import sys

import pytest

FORMS = ["generic", "avx2", "avx512", "avx512_bf16", "amx", "arm_bf16"]


def run_again(form: str, file: str, which: str) -> None:
    """A file's tests that `which` selects, once more with this form; skips where it is not to be had."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", which]
    done = subprocess.run(command, env={**os.environ, "DIFFMAS_CPU_ISA": form}, capture_output=True, text=True)
    if "DIFFMAS_CPU_ISA: expected" in done.stdout + done.stderr:
        pytest.skip(f"this CPU, or this build, has no {form}")
    assert done.returncode == 0, done.stdout[-2000:]
