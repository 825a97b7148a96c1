"""Whole runs are those of a second, independent trainer: every number that is logged, every weight that is kept."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import make_images, randomise, tiny_config
from PIL import Image
from reference_trainer import reference_run
from tiny_runs import read_latest, read_metrics, run_main, settings, whole_and_parts
from torch.utils.data import DataLoader, TensorDataset

import train_flextok
from flextok import FlexTokFromHub
from flextok.data.sources import build_datasets
from flextok.model.utils.repa_loss import load_encoder
from flextok.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("no_curves")

CLOSE = dict(rtol=1e-5, atol=1e-5)
NAN_STEP = 1
SETTINGS = dict(
    model=None, seed=3, batch_size=4, gradient_accumulation_steps=2, photos_train_crops=21, num_epochs=4,  # 8, 8, 2 + 3
    flow=dict(stratified_sigmas=True, logit_normal_sigmas=True, logit_normal_mean=-0.2, shift=1.5),
    warmup_steps=3, scheduler="wsd", decay_steps=4, learning_rate=3e-3, encoder_lr=2e-4, repa_lr=4e-3, readout_lr=1e-2,
    min_lr=1e-4, betas=[0.8, 0.95], eps=1e-3, weight_decay=0.3, max_grad_norm=2.0, use_ema=True, ema_decay=0.4,
    readout_weight=0.5, readout_steps=10, repa_layers=[2, 0], repa_weight=0.7, repa_target_size=[3, 5],
    repa_warmup_steps=3, repa_cooldown_steps=3, repa_stop=8, repa_constant_images=10,
    val_every_steps=4, photos_val_crops=7, val_images=5, val_batch_size=3, val_token_images=6, visualize_every=4,
    best_metric="val/repa_loss", vis_token_counts=[1, 4, 8], num_psnr_images=6, guidance_scale=3.0,
    psnr_guidance_scale=1.5, perform_norm_guidance=False, save_every_steps=0, repa_encoder_dtype="fp32",
)  # fmt: skip
RESUMED = dict(learning_rate=5e-3, encoder_lr=8e-4, weight_decay=0.6, decay_all=False, eps=1e-2, max_grad_norm=1.0)


def published_model(folder) -> FlexTokFromHub:
    """A model of random weights that no layer hides, also of one dimension, as its folder holds it."""
    config = tiny_config(decoder_depth=3, fsq_levels=[8, 5, 5], null_condition_prob=0.3)
    norm = {"_target_": "flextok.model.layers.norm.Fp32LayerNorm", "_partial_": True}
    for part, name in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
        config[part]["module_dict"][name]["norm_layer"] = norm
    model = randomise(FlexTokFromHub(config))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
            module.weight.data += 1
    model.save_pretrained(folder)
    return FlexTokFromHub.from_pretrained(folder)


def break_a_step(monkeypatch, step: int) -> None:
    """Let the loss of one training step, counted from 0, be NaN."""
    compute_loss = train_flextok.FlexTokTrainer.compute_loss

    def with_nan(trainer, batch, random=None):
        losses = compute_loss(trainer, batch, random)
        if trainer.model.training and trainer.global_step == step:
            losses["loss"] = losses["loss"] * math.nan
        return losses

    monkeypatch.setattr(train_flextok.FlexTokTrainer, "compute_loss", with_nan)


def assert_same_run(run_dir, expected_records: list, expected: dict) -> None:
    """Metrics by step, whatever their order in it; weights, averages, moments and tokens; the last picture."""
    found, records = (
        {step: {key: value for record in group for key, value in record.items()}
         for step, group in itertools.groupby(all_of_them, lambda record: record["step"])}
        for all_of_them in (read_metrics(run_dir), expected_records)
    )  # fmt: skip
    assert found.keys() == records.keys()
    for step, metrics in records.items():
        assert found[step].keys() - {"train/step"} == metrics.keys(), step
        for name, value in metrics.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-5) if math.isfinite(value) else None
            assert found[step][name] == close, f"{name} after step {step}"

    checkpoint = read_latest(run_dir)
    torch.testing.assert_close(checkpoint["model_state_dict"], expected["model"], **CLOSE)
    exported = FlexTokFromHub.from_pretrained(run_dir / "export").state_dict()
    for averaged in (exported, *filter(None, [checkpoint["ema_model_state_dict"]])):
        torch.testing.assert_close(dict(averaged), expected["averaged"], **CLOSE)
    beside = {f"repa_{name}": value for name, value in (checkpoint["repa_module_state_dict"] or {}).items()}
    beside |= {f"readout.{name}": value for name, value in checkpoint["readout_state_dict"].items()}
    torch.testing.assert_close(beside, expected["beside"], **CLOSE)
    groups, state = (checkpoint["optimizer_state_dict"][key] for key in ("param_groups", "state"))
    names = itertools.chain(*(group["parameter_names"] for group in groups))
    moments = {n: [state[i][k] for k in ("exp_avg", "exp_avg_sq", "step")] for i, n in enumerate(names) if i in state}
    torch.testing.assert_close(moments, expected["moments"], **CLOSE, check_dtype=False)
    assert torch.load(run_dir / "checkpoints" / "best.pt", weights_only=True)["global_step"] == expected["best"][1]

    last = max((run_dir / "pictures").glob("*.png"))
    with Image.open(last) as picture:
        for i, column in enumerate(expected["picture"]):
            for j, image in enumerate(column):  # rows end at the lower border
                x, y = 4 + i * 132, picture.height - (len(column) - j) * 132
                cell = picture.crop((x, y, x + 128, y + 128)).resize(image.shape[1:], Image.Resampling.NEAREST)
                difference = np.asarray(cell) - (image.permute(1, 2, 0).numpy() + 1) * 127.5
                assert np.abs(difference).max() <= 1, (i, j)


def test_a_run_with_everything_is_that_of_the_reference(tmp_path, monkeypatch, caplog):
    """REPA on two layers until it stops, read-out, an uneven last batch, accumulation, averages, a NaN step, and
    resumes, the first with other settings."""
    model = published_model(tmp_path / "model")
    first = {**SETTINGS, "model_name": str(tmp_path / "model")}
    rest = {**first, **RESUMED}
    break_a_step(monkeypatch, NAN_STEP)
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=5, **first)
    with caplog.at_level("INFO", "flextok"):
        for stop in (6, None):  # in mid-epoch, and between two
            run_main(tmp_path, run_dir=tmp_path / "run", max_steps=stop, resume="latest", **rest)
    assert "weight_decay was 0.3 and is now 0.6" in caplog.text

    configs = {step: TrainConfig.from_dict(settings(**changes)) for step, changes in ((0, first), (5, rest), (6, rest))}
    flow = model.flow_matching_noise_module
    flow.stratisfied, flow.ln, flow.ln_mean, flow.shift = True, True, -0.2, 1.5
    encoder = load_encoder("efficientnet_lite0", image_size=64)
    expected = reference_run(configs, model, *build_datasets(configs[0]), encoder=encoder, nan_step=NAN_STEP)
    assert_same_run(tmp_path / "run", *expected)
    layers = FlexTokFromHub.from_pretrained(tmp_path / "run" / "export").decoder.module_dict["dec_transformer"]
    assert layers.intermediate_layers == [1]  # an export is none of the alignment's


def test_a_run_of_other_loaders_is_that_of_the_reference(tmp_path):
    """Batches of images and no more: accumulated, uneven, continued in mid-epoch; Adam, cosine, no averages."""
    config = settings(
        use_repa=False, dataset_name="folder", batch_size=2, gradient_accumulation_steps=3, num_epochs=3,
        optimizer="adam", weight_decay=0.1, eps=1e-3, readout_weight=1.0, num_psnr_images=5, vis_token_counts=[2, 8],
        guidance_scale=2.0, psnr_guidance_scale=2.0, val_token_images=4,
    )  # fmt: skip
    model = randomise(FlexTokFromHub(tiny_config(stratified_sigmas=True, fsq_levels=[8, 5, 5])))
    train, val = TensorDataset(make_images(10), torch.arange(10)), TensorDataset(make_images(7, seed=2))
    for stop in (3, None):
        loaders = DataLoader(train, batch_size=2), DataLoader(val, batch_size=3)
        trainer = train_flextok.FlexTokTrainer(config, copy.deepcopy(model), *loaders, "cpu", tmp_path)
        if stop is None:
            trainer.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")
        trainer.train(stop)
    expected = reference_run(dict.fromkeys((0, 3), TrainConfig.from_dict(config)), model, train, val, addressed=False)
    assert_same_run(tmp_path, *expected)


def test_the_loss_scale_of_fp16_goes_on_at_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(train_flextok, "autocast_dtype", lambda device: torch.float16)
    break_a_step(monkeypatch, 0)
    whole, parts = whole_and_parts(tmp_path, 2, 3, use_amp=True, use_repa=False, val_token_images=0)
    assert whole["scaler_state_dict"] == parts["scaler_state_dict"]
    assert whole["scaler_state_dict"]["scale"] == 2**15 and whole["scaler_state_dict"]["_growth_tracker"] == 2
