"""Trackers get what a team logs by transformers' own callbacks, agent by agent; TensorBoard: test_training.py."""

import sys

import pytest
import tiny_systems as tiny

from diffmas import Trainer, default_arguments

BY_AGENT = [f"gradient/{what}/{agent}/latent" for what in ("rows", "hidden") for agent in ("planner", "critic")]

# What of wandb transformers' callback uses; `logged` is ours.
WANDB = """
class Config(dict):
    def update(self, other, allow_val_change=False):
        super().update(other)

class Run:
    url, summary = "here", {}
    def _label(self, code):
        pass

run, config, logged = None, Config(), []

def init(**options):
    global run
    run = Run()

def log(values):
    logged.append(values)

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **options: None
"""


def train(path, report_to):
    arguments = default_arguments(
        path, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=1, report_to=report_to, use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(tiny.system(), arguments, train_dataset=tiny.rows(2), gradient_report_steps=1).train()


def test_weights_and_biases_has_metrics_by_agent(tmp_path, monkeypatch):
    """With a stand-in of the package: it takes what the callback gives it."""
    package = tmp_path / "packages" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    for name in ("sdk/__init__.py", "sdk/lib/__init__.py"):
        (package / name).write_text("")
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception):\n    pass\n")
    if any(name.partition(".")[0] == "wandb" for name in sys.modules):
        pytest.skip("the real wandb is loaded: nothing can stand in for it")
    monkeypatch.syspath_prepend(str(package.parent))
    try:
        train(tmp_path / "run", ["wandb"])
        wandb = sys.modules["wandb"]
        assert wandb.config["max_steps"] == 2
        for name in ("loss", *BY_AGENT):
            found = [values[f"train/{name}"] for values in wandb.logged if f"train/{name}" in values]
            assert len(found) == 2 and all(x > 0 for x in found), name
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
