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


@pytest.fixture
def repeating(monkeypatch):
    """Without a GPU the same latent steps run, one by one, where a GPU replays its graph. -> one entry for each capture."""
    from diffmas.agents import latent

    runs = []
    monkeypatch.setattr(latent, "_graphs", lambda *_: not torch.is_grad_enabled())
    monkeypatch.setattr(latent.Repeat, "capture", lambda self: runs.append(True) or True)
    return runs


@pytest.fixture
def programs():
    """For tests that run programs; skips where the system cannot isolate them (root, without namespaces)."""
    from diffmas.evaluation import sandbox

    try:
        sandbox.run("")
    except PermissionError as error:
        pytest.skip(str(error))
