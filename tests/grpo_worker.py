"""One rank of a two-process run over gloo, for test_rl.py: one step of plain gradient descent by GRPO, written to a file.

torchrun --nproc_per_node 2 grpo_worker.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import tiny_systems as tiny
import torch
from test_rl import config, step_of

from diffmas.training import end_processes

if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    rank = config(output).process_index
    options = dict(per_device_train_batch_size=4, num_generations=8, ddp_backend="gloo")  # a group is both processes'
    graded, moved, _ = step_of(tiny.system(alpha=8), output, **options)
    found = {"prompts": graded.prompts, "tokens": graded.tokens, "rewards": graded.rewards, "moved": moved}
    torch.save(found, output / f"{rank}.pt")
    end_processes()
