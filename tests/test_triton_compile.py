"""The Triton kernels compile for a GPU that is not there, without spills, and one compilation serves every length."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: kernels that were imported under TRITON_INTERPRET=1 cannot be compiled.
CODE = """
import json
ATTENTION = ["attention", "attention, latent step, shifted", "attention_backward, latent step"]
from diffmas.kernels.report import OPS, compiled, launches
for op in OPS:
    if op.startswith("attention") and op not in ATTENTION:
        continue  # make kernel-report has them all
    for i, launch in enumerate(launches(op)):
        same = [launches(op, n=n)[i] == launch for n in (1, 17)]
        print(json.dumps([op, launch.kernel.__name__, same, compiled(launch, 90) if "interleaved" not in op else {}]))
"""
SHARED = 232448  # bytes a program can have on sm_90; compiling does not check it


def test_kernels_compile_for_sm_90():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(map(json.loads, run.stdout.splitlines()))
    assert len(rows) >= 9
    for op, kernel, same, cost in rows:
        assert all(same), f"{op}: {kernel} is compiled anew for another length"
        assert cost.get("stack", 0) == cost.get("spills", 0) == 0 and cost.get("shared", 0) <= SHARED, (kernel, cost)
