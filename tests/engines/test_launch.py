"""examples/accelerate: `diffmas train`, launched with each of the configs as the page on many GPUs says, by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_systems as tiny
import yaml
from test_engines import needs_deepspeed

from diffmas import MultiAgentSystem
from diffmas.training import check_checkpoint
from diffmas.training.checkpoint import check_engine_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
ENGINES = {"ddp": "one process or DDP", "fsdp2": "FSDP", "fsdp2_kept": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed"}


def test_all_configs_are_launched():
    assert CONFIGS == sorted(ENGINES)


@pytest.mark.parametrize("name", [pytest.param(x, marks=needs_deepspeed) if "zero" in x else x for x in CONFIGS])
def test_accelerate_launches_training(name, tmp_path):
    tiny.save_base(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(8))
    settings = {
        "model": "base", "output_dir": "run", "lora": {"r": 2, "alpha": 4}, "data": {"train": "rows.jsonl"},
        "agents": [{"name": a.name, "prompt": a.prompt, "latent_steps": a.latent_steps} for a in tiny.agents()],
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True,
            "ddp_backend": "gloo", "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1,
        },
        "early_stopping_patience": None,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{name}.yaml"]
    command += ["--num_processes", "2", str(Path(__file__).parent / "launched.py"), "train", str(tmp_path / "config.yaml")]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    check_checkpoint(tmp_path / "run" / "checkpoint-1")
    check_engine_of(tmp_path / "run" / "checkpoint-1", ENGINES[name])
    assert (tmp_path / "run" / "checkpoint-1" / "rng_state_1.pth").is_file()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert MultiAgentSystem.from_pretrained(tmp_path / "run", tmp_path / "base").generate(
        ["where is the key"], max_new_tokens=2
    )
