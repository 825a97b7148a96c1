"""The benchmark's own arithmetic; no test depends on how long anything takes."""

import subprocess
import sys
from pathlib import Path

import torch
from tiny_runs import settings

from flextok.benchmark import repa, timing
from flextok.model.utils.repa_encoders import load_encoder

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_arms_take_turns_and_the_first_round_is_not_counted():
    order = []
    times = timing.alternate({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2, device=CPU)
    assert "".join(order) == "abcabcabc"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_within_a_round():
    assert timing.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_matmul_peak_is_a_number_of_operations_per_second():
    assert 1e6 < timing.matmul_peak(CPU, torch.float32, size=64, seconds=0.01) < 1e15


def test_what_autograd_keeps_is_counted_once_and_without_parameters():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)
    assert repa.kept_for_backward(lambda: torch.nn.functional.silu(x @ weight), [weight]) == 2 * 4 * 8 * 4


def test_a_checkpoint_grows_by_the_projector_and_its_moments_alone():
    sizes = repa.checkpoint_growth(CPU)
    growth = sizes["with"] - sizes["without"]
    assert sizes["projector_and_moments"] < growth <= 1.01 * sizes["projector_and_moments"]


def test_every_arm_of_the_step_benchmark_runs_and_does_what_its_name_says(tmp_path, monkeypatch):
    """On a tiny model and EfficientNet: which arms run the encoder, and which train the projector."""
    monkeypatch.setattr(repa, "IMG_SIZE", 64)
    encoder = load_encoder("efficientnet_lite0", image_size=64)
    calls = []
    encoder.register_forward_hook(lambda *args: calls.append(1))
    model = {**settings()["model"], "vae": "stable_diffusion", "patch_size": 2, "latent_channels": 4}
    monkeypatch.setattr(repa, "preset_config", lambda preset, **kwargs: _config(model))
    trainer = repa.build_trainer("d12-d12", 2, False, CPU, encoder)
    data = repa.CachedBatches(tmp_path, (2, 2), 1280, 2, (4, 8, 8), n_images=4)
    arms = repa.step_arms(trainer, data, encoder)
    for name, run in arms.items():
        projector = trainer.repa_module.projector.layers[0].weight.detach().clone()
        decoder = [p.detach().clone() for p in trainer.model.decoder.parameters()]
        calls.clear()
        run()
        assert len(calls) == (1 if "online" in name or "encoder" in name else 0), name
        trained = not torch.equal(projector, trainer.repa_module.projector.layers[0].weight)
        assert trained == ("cached" in name or "online" in name or "projector" in name), name
        same = [torch.equal(a, b) for a, b in zip(decoder, trainer.model.decoder.parameters())]
        assert all(same) == ("alone" in name), name


def _config(model):
    from flextok.training.config import TrainConfig
    from flextok.training.models import new_model_config

    arguments = {key: value for key, value in model.items() if key != "vae_factor"}
    config = settings(model={**arguments, "vae_hub_path": None}, img_size=64, train_vae=True)
    return new_model_config(TrainConfig.from_dict(config))


def test_sizes_follow_from_grids_and_widths():
    rows = {(row["encoder"], row["image_size"]): row for row in repa.memory_tables()}
    large = rows["dinov2_vitl14", 518]
    assert large["cache_bytes_per_1000_images"] == 1000 * (2 * 37 * 37 * 1024 * 2 + 1)
    assert large["projector_parameters"][1152] == 8_655_872


def test_help_lists_the_benchmarks():
    call = [sys.executable, "-m", "flextok.benchmark", "repa", "--help"]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and all(option in result.stdout for option in ("--batch-sizes", "--dtype", "--json"))


def test_an_unknown_device_is_one_line():
    call = [sys.executable, "-m", "flextok.benchmark", "repa", "--device", "tpu"]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.strip() == "error: --device is 'tpu', expected cpu, cuda or cuda:N"
