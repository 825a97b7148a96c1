"""The benchmarks on tiny models, and their arithmetic; no test depends on how long anything takes."""

import json

import pytest
import torch
from tiny_runs import settings

from flextok import vae_wrapper
from flextok.benchmark import data, repa, scale, timing, train
from flextok.benchmark.__main__ import main
from flextok.model.utils.repa_loss import load_encoder
from flextok.training.config import TrainConfig
from flextok.training.models import new_model_config

CPU = torch.device("cpu")


def test_figures_are_of_one_round_and_of_the_operations_and_tensors_that_torch_counts(capsys):
    """2 * inputs * outputs for each row of a linear layer, 4 * queries * keys * width for attention."""
    assert timing.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == (3.0, 2.0, 4.0)
    layer, q, k = torch.nn.Linear(16, 32), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    assert train.forward_flops(lambda: layer(torch.randn(3, 16))) == 2 * 3 * 16 * 32
    attention = torch.nn.functional.scaled_dot_product_attention
    assert train.forward_flops(lambda: attention(q, k, k)) == 4 * 5 * 7 * 16
    weight, x = torch.nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8)
    assert train.kept_for_backward(lambda: torch.nn.functional.silu(x @ weight), [weight]) == 2 * 4 * 8 * 4
    times = {"fp32 peak": [1.0, 2.0, 1.0], "fp32, batch 2": [4.0, 8.0, 2.0], "fp32, batch 4": [8.0, 16.0, 8.0]}
    arms = train.report_steps(times, flops=1000, peak_flops={"fp32": 1000.0})
    assert arms["fp32, batch 2"]["mfu"] == (0.5, 0.5, 1.0)
    assert arms["fp32, batch 2"]["images_per_second"] == (0.5, 0.25, 1.0)


def tiny_config(_preset="", **changes) -> dict:
    changes.pop("vae_hub_path", None)
    model = {key: value for key, value in settings()["model"].items() if key != "vae_factor"}
    model |= dict(vae="stable_diffusion", patch_size=2, latent_channels=4, vae_hub_path=None, **changes)
    return new_model_config(TrainConfig.from_dict(settings(model=model, img_size=64, train_vae=True)))


@pytest.fixture
def tiny(monkeypatch):
    """The benchmarks' model is a tiny one, for images of 64 px."""
    for module in (train, scale, data):
        monkeypatch.setattr(module, "IMG_SIZE", 64, raising=False)
        monkeypatch.setattr(module, "preset_config", tiny_config)
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    monkeypatch.setattr(vae_wrapper, "AUTOENCODER_KL", {**vae_wrapper.AUTOENCODER_KL, **small})


def test_every_arm_of_the_step_benchmark_runs_and_does_what_its_name_says(tmp_path, tiny):
    """On a tiny model and EfficientNet: which arms run the encoder, and which train the projector."""
    encoder = load_encoder("efficientnet_lite0", image_size=64)
    calls = []
    encoder.register_forward_hook(lambda *args: calls.append(1))
    trainer = repa.build_repa_trainer("d12-d12", False, CPU, encoder)
    batches = repa.CachedBatches(tmp_path, (2, 2), 1280, 2, (4, 8, 8), n_images=4)
    arms = repa.step_arms(trainer, batches, encoder)
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


def test_scale_counts_what_a_real_step_takes(tiny, monkeypatch):
    """On tensors without data: the operations that torch counts, activations that grow with the batch alone."""
    monkeypatch.setattr(scale, "PRESETS", {"d12-d12": scale.PRESETS["d12-d12"]})
    counts = scale.count("d12-d12", 64, checkpointing=False)
    trainer = train.build_trainer("d12-d12", CPU)
    assert counts["trained"] == sum(parameter.numel() for parameter in trainer.trained_parameters)
    assert counts["flops"] == 3 * train.forward_flops(lambda: trainer.compute_loss(train.latent_batch(trainer, 1)))
    assert counts["sequence"] == 4 * 4 + 8  # patches and registers
    assert scale.memory(counts, 4) - scale.memory(counts, 2) == 2 * counts["kept"]
    assert scale.memory(counts, 4, parts=64) < scale.memory(counts, 4)


def test_both_ways_of_loading_give_nearly_the_same_images(tmp_path):
    """From the command line, with the numbers in a file."""
    numbers = tmp_path / "numbers.json"
    main(["data", "--device", "cpu", "--dtype", "fp32", "--json", str(numbers), "--source-size", "128", "--files", "2",
          "--image-size", "32", "--rounds", "2", "--wait-steps", "0"])  # fmt: skip
    result = json.loads(numbers.read_text())
    rates = result["images_per_second"]
    assert len(rates) == 6 and all(len(values) == 2 for values in rates.values())
    for name in ("ratio", "ratio_parquet", "ratio_shards"):
        assert result[name][1] <= result[name][0] <= result[name][2]
    difference = result["difference"]  # in units of a 255th
    assert 0 < difference["mean"] <= difference["largest_mean_of_a_file"] < 2
    assert difference["mean"] < difference["maximum"] < 30
