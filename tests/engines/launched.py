"""The command line, launched by accelerate with CPUs that pass for accelerators: it shards a model over these alone.

launched.py train CONFIG.yaml SECOND.yaml: a run, and another one in which something goes wrong in one process.
"""

import os
import sys

import tiny_systems as tiny
import yaml


def no_compiling() -> None:
    """DeepSpeed would compile an all-reduce in shared memory, for minutes, which only its inference uses."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def write_team(path, output_dir: str, rows: str = "rows.jsonl"):
    """A config of `diffmas train`, beside the model `base` and the rows."""
    settings = {
        "model": "base", "output_dir": output_dir, "lora": {"r": 2, "alpha": 4}, "data": {"train": rows},
        "agents": [{"name": a.name, "prompt": a.prompt, "latent_steps": a.latent_steps} for a in tiny.agents()],
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True,
            "ddp_backend": "gloo", "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1,
        },
        "early_stopping_patience": None,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


if __name__ == "__main__":
    from diffmas.cli.main import app

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        no_compiling()
    first, *others = sys.argv[2:]
    assert not app([sys.argv[1], first], standalone_mode=False), "an exit status"
    for config in others:
        app([sys.argv[1], config])
