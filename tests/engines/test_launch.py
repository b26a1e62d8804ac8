"""examples/accelerate: `diffmas train`, launched with each of the configs as the page on many GPUs says, by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_systems as tiny
from cases import DEEPSPEED, FSDP, LAUNCHED
from launched import write_team
from test_engines import needs_deepspeed

from diffmas.training import check_checkpoint
from diffmas.training.checkpoint import check_engine_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
ENGINES = {"ddp": "one process or DDP", "fsdp2": "FSDP", "fsdp2_kept": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed"}


def check_run(directory: Path, name: str) -> None:
    check_checkpoint(directory / "checkpoint-1")
    check_engine_of(directory / "checkpoint-1", ENGINES[name])
    assert (directory / "checkpoint-1" / "rng_state_1.pth").is_file()
    assert json.loads((directory / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_all_configs_are_launched():
    assert CONFIGS == sorted(ENGINES) == sorted(["zero2", *(name.removeprefix("launch ") for name in LAUNCHED)])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_kept", pytest.param("zero3", marks=needs_deepspeed)])
def test_training_in_the_environment_of_a_launch(results, name):
    output, said = results(*(DEEPSPEED if name == "zero3" else FSDP))
    assert (output / f"launch {name}-1.pt").is_file(), said[-3000:]
    check_run(output / f"launch {name}", name)


@needs_deepspeed
def test_accelerate_launches_training_and_an_error_of_one_process_ends_all(tmp_path):
    """Of an engine whose processes meet at their gradients alone, and tell each other nothing before."""
    tiny.save_base(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(8))
    tiny.write_jsonl(tmp_path / "long.jsonl", [*tiny.rows(7), {"question": "lamp " * 200, "answer": "the key"}])
    configs = [write_team(tmp_path / "config.yaml", "run"), write_team(tmp_path / "other.yaml", "other", "long.jsonl")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/accelerate/zero2.yaml"]
    command += ["--num_processes", "2", str(Path(__file__).parent / "launched.py"), "train", *map(str, configs)]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    check_run(tmp_path / "run", "zero2")
    assert done.returncode == 1 and "to fit in the context of 128 positions" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "other" / "checkpoint-1").exists()
