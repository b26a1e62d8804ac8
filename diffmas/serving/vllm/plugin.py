"""What vLLM calls in each of its processes (`vllm.general_plugins`): puts the wrappers of this package around its methods.

An engine without teams in its `additional_config` does what it did: the wrappers look, and pass on; its runner has none.
"""

import functools
import logging
import os
from importlib.metadata import entry_points
from importlib.util import find_spec

__all__ = ["TRIED", "check_installed", "load", "register"]

TRIED = "0.32"
log = logging.getLogger(__name__)


def load() -> None:
    """The entry point. A vLLM that lacks what is wrapped is left as it is: who brings no team shall not notice."""
    try:
        register()
    except (AttributeError, ImportError) as error:
        log.warning("teams of diffmas cannot run in this vLLM: expected one like %s (%s)", TRIED, error)


def register() -> None:
    """Once in a process; later calls change nothing. Raises AttributeError or ImportError, with nothing changed, where vLLM
    lacks what is wrapped."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    from diffmas.serving.vllm import limits, scheduling

    _wrap(
        (InputProcessor, "__init__", limits.engine),
        (InputProcessor, "process_inputs", limits.request),
        (Scheduler, "_reserve_prefill_lookahead", scheduling.chunk),
        (KVCacheManager, "get_computed_blocks", scheduling.cached),
        (kv_cache_utils, "generate_block_hash_extra_keys", scheduling.block_keys),
        (WorkerBase, "__init__", worker),
    )


def worker(original):
    """Around `WorkerBase.__init__`: only a worker with teams imports its runner and changes it."""

    def prepared(self, vllm_config, *args, **kwargs):
        from diffmas.serving.vllm.limits import teams_of

        if teams_of(vllm_config):
            (wrap_v2 if vllm_config.use_v2_model_runner else wrap_v1)()
        return original(self, vllm_config, *args, **kwargs)

    return prepared


def wrap_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from diffmas.serving.vllm import runner_v1

    _wrap(
        (GPUModelRunner, "initialize_kv_cache", runner_v1.start),
        (GPUModelRunner, "_preprocess", runner_v1.before_forward),
        (GPUModelRunner, "execute_model", runner_v1.after_forward),
        (GPUModelRunner, "set_active_loras", runner_v1.adapters),
        (GPUModelRunner, "sample_tokens", runner_v1.seeds),
    )


def wrap_v2() -> None:
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from diffmas.serving.vllm import runner_v2

    _wrap(
        (model_states, "resolve_model_state_cls", runner_v2.state_class),
        (GPUModelRunner, "update_requests", runner_v2.adapters),
        (GPUModelRunner, "execute_model", runner_v2.after_forward),
    )


def _wrap(*places) -> None:
    """places: (owner, name, what makes a wrapper of the original)."""
    originals = [getattr(owner, name) for owner, name, _ in places]  # all are there before the first one changes
    for original, (owner, name, around) in zip(originals, places):
        if not hasattr(original, "diffmas"):
            wrapper = functools.wraps(original)(around(original))
            wrapper.diffmas = True
            setattr(owner, name, wrapper)


def check_installed() -> None:
    """Raises ValueError unless vLLM is here, can be wrapped, and will load this plugin in its other processes too."""
    if find_spec("vllm") is None:
        raise ValueError("vllm: expected it to be installed, found none; pip install vllm")
    allowed = os.environ.get("VLLM_PLUGINS")
    found = [p for p in entry_points(group="vllm.general_plugins") if p.name == "diffmas"]
    if not found or (allowed is not None and "diffmas" not in allowed.split(",")):
        raise ValueError(
            "vllm.general_plugins: expected the plugin 'diffmas', found none; install diffmas and set no VLLM_PLUGINS"
        )
    try:
        register()
    except (AttributeError, ImportError) as error:
        raise ValueError(f"vllm: expected a version like {TRIED}, got another ({error})") from error
