"""Engines of vLLM on a CPU, in the test's own process, as small as they go.

VLLM_USE_V2_MODEL_RUNNER=1 runs the tests of the engine with model runner V2. Its kernels are Triton's, whose wheels have no
compiler for CPUs: here its interpreter runs them, and vLLM is told that there is one.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
if importlib.util.find_spec("vllm") is not None:  # before it is imported
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_CI_ENV": "1",
    }  # fmt: skip
    if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.backends import Backend, backends

        backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
