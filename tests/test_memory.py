"""Memory over a long run."""

import os
import resource
from pathlib import Path

import pytest
import torch
from processes import start
from tiny_runs import run_main

import train_flextok


def train_long(folder: Path) -> None:
    """200 steps with W&B offline, pictures and validation; prints the resident size at 100 and at the end."""
    sizes = []
    os.environ["WANDB_MODE"] = "offline"
    original = train_flextok.FlexTokTrainer.train_step

    def step(self, *arguments):
        losses = original(self, *arguments)
        if self.global_step in (100, 200):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * resource.getpagesize() / 1e6)
        return losses

    train_flextok.FlexTokTrainer.train_step = step
    torch.set_num_threads(1)
    run_main(
        folder, run_dir=folder / "run", max_steps=200, num_epochs=50, photos_train_crops=100, use_wandb=True,
        visualize_every=50, save_every_steps=0,
    )  # fmt: skip
    print(f"resident size at step 100: {sizes[0]:.0f} MB, at step 200: {sizes[1]:.0f} MB")
    (folder / "growth").write_text(str(sizes[1] - sizes[0]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the resident size as Linux tells it")
def test_memory_does_not_grow_over_hundreds_of_steps(tmp_path):
    process = start(train_long, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert float((tmp_path / "growth").read_text()) < 20  # MB
