import contextlib
import gc
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; "auto" does not take the interpreter
    with contextlib.suppress(ImportError):
        from quick_interpreter import quicken

        quicken()
os.environ["COLUMNS"] = "200"  # before rich looks for a terminal: tables are the same wherever the tests run


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """pytest reports an error of a finalizer when the test is over, and keeps its frames until then: those of whatever thread
    was collecting garbage, with all that their locals hold. A test that waits for objects to go would wait for ever."""
    report = sys.unraisablehook

    def without_frames(error):
        report(error)  # its text is made here
        if error.exc_value is not None:
            error.exc_value.__traceback__ = None

    sys.unraisablehook = without_frames
    config.add_cleanup(lambda: setattr(sys, "unraisablehook", report))
    config.add_cleanup(gc.unfreeze)  # or packages would speak of leaks at the end


@pytest.fixture(autouse=True, scope="module")
def little_to_look_through():
    """Whoever collects garbage (transformers' Trainer does, many tests do) looks at no object of the packages that are loaded,
    nor at what tests of other files left: millions, which took seconds each time."""
    gc.collect()
    gc.freeze()


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
    """Steps are captured and replayed without a GPU (fake_graph). -> the graphs."""
    from fake_graph import FakeGraph

    from diffmas import patch_model
    from diffmas.models import capture

    graphs = []
    monkeypatch.setattr(capture, "_on_one_gpu", lambda *_: True)
    monkeypatch.setattr(capture, "_capture_stream", lambda device: None)
    monkeypatch.setattr(capture, "captured", lambda *args: graphs.append(FakeGraph(*args)) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setitem(patch_model.__kwdefaults__, "training_graphs", True)
    return graphs


@pytest.fixture
def programs():
    """For tests that run programs; skips where the system cannot isolate them (root, without namespaces)."""
    from diffmas.evaluation import sandbox

    try:
        sandbox.run("")
    except PermissionError as error:
        pytest.skip(str(error))
