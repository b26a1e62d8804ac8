"""Which checkpoints stay."""

import pytest
import tiny_systems as tiny
import torch
from test_training import arguments, no_leftover_precision  # noqa: F401

from diffmas.training import Trainer, check_checkpoint, last_checkpoint


def test_an_older_checkpoint_goes_only_when_the_newest_is_whole(tmp_path, monkeypatch):
    from diffmas.training import files

    write = files.write_manifest

    def killed(path):
        if path.name == "checkpoint-3":
            raise KeyboardInterrupt
        write(path)

    monkeypatch.setattr(files, "write_manifest", killed)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(8)).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert last_checkpoint(tmp_path).name == "checkpoint-2" and args.save_total_limit == 1


def test_the_best_checkpoint_is_kept(tmp_path):
    args = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_total_limit=1)
    system = tiny.system()
    for p in system.parameters():
        if p.requires_grad:
            p.register_hook(torch.neg)  # uphill: the first is the best
    Trainer(system, args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6)).train()
    assert check_checkpoint(tmp_path / "checkpoint-1") and not (tmp_path / "checkpoint-2").exists()
