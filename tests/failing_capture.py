"""A capture that fails in the second layer, for decoding by system.generate and by model.generate."""

import warnings

import torch

from diffmas.models.patch import patch_of
from diffmas.trace.layer_work import LayerWork


def check_a_capture_that_fails(monkeypatch, model, decode, repeating) -> None:
    """Tried once, with one warning, and nothing else changed. decode: compares two generations, with graphs and without."""
    attend, passes = LayerWork.attend, []

    def fails(work, layer, *args):
        if torch._C._len_torch_dispatch_stack():
            passes.append(work)
            if layer.index == 1:
                raise RuntimeError("it waits")
        return attend(work, layer, *args)

    monkeypatch.setattr(LayerWork, "attend", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            decode()
    caught = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(caught) == 1 and caught[0].startswith("decoding steps run without a CUDA graph")
    assert not repeating and len(passes) == 2 and patch_of(model).tries == {"decoding steps": 0}
