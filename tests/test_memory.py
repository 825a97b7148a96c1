"""Memory over a long run."""

import os
import resource
from pathlib import Path

import pytest
import torch
from processes import start
from tiny_runs import draw_no_curves, run_main

import train_flextok


def train_long(folder: Path) -> None:
    """120 steps with W&B offline, pictures and validation; prints the resident size at 60 and at the end."""
    sizes = []
    os.environ["WANDB_MODE"] = "offline"
    original = train_flextok.FlexTokTrainer.train_step

    def step(self, *arguments):
        losses = original(self, *arguments)
        if self.global_step in (60, 120):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * resource.getpagesize() / 1e6)
        return losses

    train_flextok.FlexTokTrainer.train_step = step
    torch.set_num_threads(1)
    draw_no_curves()
    run_main(
        folder, run_dir=folder / "run", max_steps=120, num_epochs=50, batch_size=2, photos_train_crops=40,
        photos_val_crops=4, repa_image_size=32, use_wandb=True, visualize_every=20, save_every_steps=0,
    )  # fmt: skip
    print(f"resident size at step 60: {sizes[0]:.0f} MB, at step 120: {sizes[1]:.0f} MB")
    (folder / "growth").write_text(str(sizes[1] - sizes[0]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the resident size as Linux tells it")
def test_memory_does_not_grow_from_step_to_step(tmp_path):
    process = start(train_long, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert float((tmp_path / "growth").read_text()) < 12  # MB
