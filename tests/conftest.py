import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; "auto" does not take the interpreter
os.environ["COLUMNS"] = "200"  # before rich looks for a terminal: tables are the same wherever the tests run


@pytest.fixture(autouse=True)
def reproducible():
    """One thread and one seed: what a test sees does not depend on which tests ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
