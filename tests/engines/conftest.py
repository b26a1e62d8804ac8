"""Starts of two processes, which all files here share."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """An engine's cases, all in one start of two processes -> the directory, and what they said."""

    @functools.cache
    def run(*cases: str):
        output = tmp_path_factory.mktemp("engines")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
        command += [str(Path(__file__).parent / "worker.py"), str(output), *cases]
        with subprocess.Popen(
            command, cwd=TESTS.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as started:
            try:
                said = started.communicate(timeout=1200)[1]
            except subprocess.TimeoutExpired:
                started.terminate()  # torchrun ends its processes, which a kill would leave
                raise
        return output, said

    return run
