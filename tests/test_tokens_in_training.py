"""Whether the tokens work: the read-out, validation by token count and noise level, warnings, measured precision."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings

from flextok import FlexTokFromHub
from flextok.training import models
from flextok.training.config import TrainConfig
from flextok.training.evaluator import VALIDATION_SEED
from flextok.training.readout import TokenReadout
from flextok.training.token_use import psnr, tokens_warning
from flextok.utils.config import ConfigError
from flextok.utils.random import BatchRandom

pytestmark = pytest.mark.usefixtures("no_curves")
CPU = torch.device("cpu")
DIGITS = dict(
    model=dict(
        encoder_depth=2, decoder_depth=2, encoder_width=64, decoder_width=64, head_dim=32, n_registers=4, vae="dct",
        vae_factor=4, dct_coefficients=[4, 0], patch_size=1, keep_k_mode="pow2",
    ),
    dataset_name="digits", img_size=16, use_augmentation=False, batch_size=16, use_repa=False, vis_token_counts=[1, 4],
    readout_weight=None,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- read-out


def test_readout_predicts_latents_from_the_first_k_registers_alone():
    readout = TokenReadout(4, 3, 8)
    torch.nn.init.normal_(readout.linear.weight)
    quants, latents = torch.randn(6, 4, 3), torch.randn(6, 2, 2, 2)
    random = BatchRandom(0, 5, torch.arange(6))
    counts = random.integers("readout/keep_k", 1, 4).tolist()
    assert len(set(counts)) > 1
    errors = []
    for i, k in enumerate(counts):
        kept = torch.cat([quants[i, :k].flatten(), torch.zeros((4 - k) * 3)])
        errors.append((readout.linear.weight @ kept + readout.linear.bias - latents[i].flatten()).square())
    assert float(readout(quants, latents, random)) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "changes, weight",
    [
        ({}, 1.0), ({"readout_weight": 0.5}, 0.5), ({"readout_weight": 0}, 0.0), ({"model": None}, 0.0),
        ({"model": None, "train_from_scratch": True}, 1.0), ({"model": None, "readout_weight": 2}, 2.0),
        ({"train_encoder": False, "readout_weight": 1.0}, 0.0),
    ],
)  # fmt: skip
def test_readout_is_on_for_new_models_and_off_for_published_ones_and_frozen_encoders(changes, weight):
    config = TrainConfig.from_dict({**settings(), "readout_weight": None, **changes})
    assert config.uses_readout == (weight > 0)
    assert config.settled_readout_weight == weight or not config.train_encoder
    assert ("readout" in config.learning_rates()) == (weight > 0)


def test_readout_is_part_of_the_training_loss_alone_and_has_an_optimizer_group():
    trainer = make_trainer(readout_weight=0.5, readout_lr=7e-3, warmup_steps=0)
    torch.nn.init.normal_(trainer.readout.linear.weight, std=0.1)
    trainer.model.train()
    losses = trainer.compute_loss(first_batch(trainer))
    total = losses["flow_loss"] + losses["repa_loss"] + 0.5 * losses["readout_loss"]
    assert losses["readout_loss"].item() > 0 and losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    losses["readout_loss"].backward()  # teaches the encoder and not the decoder
    assert trainer.model.encoder.module_dict["enc_to_latents"].proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.decoder.parameters())
    trainer.model.eval()
    assert "readout_loss" not in trainer.compute_loss(first_batch(trainer))
    group = trainer.optimizer.param_groups[-1]
    assert group["name"] == "readout" and group["lr"] == 7e-3
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.readout.parameters()}


def test_readout_steps_end_it():
    trainer = make_trainer(readout_weight=1.0, readout_steps=3)
    trainer.model.train()
    for step, expected in ((2, 1.0), (3, 0.0)):
        trainer.global_step = step
        losses = trainer.compute_loss(first_batch(trainer))
        rest = losses["flow_loss"] + losses["repa_loss"]
        assert (losses["loss"] - rest).item() == pytest.approx(expected * losses["readout_loss"].item(), abs=1e-5)


def test_readout_is_in_checkpoints_and_not_in_exports(tmp_path):
    trainer = make_trainer(tmp_path, readout_weight=1.0, use_repa=False)
    trainer.train(max_steps=2)
    state = read_latest(tmp_path)["readout_state_dict"]
    assert same(state, trainer.readout.state_dict()) and state["linear.weight"].abs().sum() > 0
    exported = FlexTokFromHub.from_pretrained(tmp_path / "export").state_dict()
    assert exported.keys() == trainer.model.state_dict().keys()


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_logs_flow_loss_by_token_count_and_noise_level_and_pictures_psnr(tmp_path):
    trainer = make_trainer(tmp_path, **DIGITS, val_token_images=8, num_psnr_images=5)
    trainer.train(max_steps=1)
    records = read_metrics(tmp_path)
    record = next(r for r in reversed(records) if "val/flow_loss_k1" in r)
    levels = [f"val/flow_loss_t{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for name in ("val/flow_loss_k1", "val/flow_loss_k4", *levels, "val/codes_distinct_1", "val/codes_entropy_4"):
        assert math.isfinite(record[name]), name
    assert "val/flow_loss_k2" not in record  # powers of four, up to all
    record = records[-1]
    assert record["step"] == 1 and {"val/psnr_k1", "val/psnr_k4", "val/psnr_mean_image"} < record.keys()
    images = torch.stack([item["image"] for item in trainer.train_loader.dataset])
    shown = torch.stack([trainer.val_loader.dataset[i * 297 // 5]["image"] for i in range(5)])
    expected = psnr(images.mean(0, keepdim=True).expand_as(shown), shown).mean()
    assert record["val/psnr_mean_image"] == pytest.approx(float(expected), abs=0.02)


def test_psnr_is_of_reconstructions_without_guidance_and_pictures_have_theirs(tmp_path):
    """Of other numbers of images, and by a function of its own where the scales agree."""
    trainer = make_trainer(tmp_path, **DIGITS, num_psnr_images=6, num_vis_images=2, guidance_scale=4.0)
    randomise(trainer.model.decoder)
    columns, by_count, _ = trainer.evaluator.reconstructions()
    assert [len(column) for column in columns.values()] == [2] * 4
    found = {}
    for scale in (1.0, 4.0):
        for name in ("psnr_guidance_scale", "guidance_scale"):
            setattr(trainer.config, name, scale)
        found[scale] = trainer.evaluator.reconstructions()
    assert by_count == found[1.0][1] and by_count[4] != pytest.approx(found[4.0][1][4], abs=1e-3)
    of_4, of_1 = (found[scale][0]["4 tokens"][0] for scale in (4.0, 1.0))
    assert torch.allclose(columns["4 tokens"][0], of_4, atol=1e-3) and not torch.allclose(of_4, of_1, atol=0.1)


def test_flow_losses_are_those_of_an_independent_computation():
    trainer = make_trainer(**DIGITS, val_token_images=8)
    for p in trainer.model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    metrics, tokens = trainer.evaluator.tokens()
    model, dataset = trainer.model.eval(), trainer.val_loader.dataset
    images = torch.stack([dataset[i * len(dataset) // 8]["image"] for i in range(8)])
    random = BatchRandom(VALIDATION_SEED, -3, torch.arange(8))
    noise = random.normal("flow_noise", (4, 4, 4))
    with torch.no_grad():
        encoded = model.encode({"rgb": images})
        assert torch.equal(encoded["tokens"], tokens)
        for level, k in ((0.3, 4), (0.9, 4)):
            noised = level * noise + (1 - level) * encoded["vae_latents"]
            data = {
                "enc_registers_quant": encoded["enc_registers_quant"], "vae_latents_noised": noised,
                "timesteps": torch.full((8,), level), "eval_keep_k": [k] * 8,
            }  # fmt: skip
            velocity = model.decoder(data)["vae_latents_reconst"]
            expected = F.mse_loss(velocity, noise - encoded["vae_latents"])
            assert metrics[f"val/flow_loss_t{level}"] == pytest.approx(float(expected), rel=1e-4)
    assert metrics["val/flow_loss_k1"] != metrics["val/flow_loss_k4"]


def test_validation_of_tokens_can_be_switched_off(tmp_path):
    trainer = make_trainer(tmp_path, **DIGITS, val_token_images=0)
    assert not any("_k" in key or "codes" in key for key in trainer.validate())


def test_psnr_is_that_of_the_definition():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0], b[1] = 0.2, 1.0
    assert psnr(a, b).tolist() == pytest.approx([20.0, 10 * math.log10(4)])


def test_a_run_ends_by_saying_what_was_learned(tmp_path, capsys):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, **DIGITS)
    printed = capsys.readouterr().out
    assert "PSNR [dB]" in printed and "from 1 token," in printed and "mean image" in printed
    assert "as many different first codes as images" in printed


@pytest.mark.parametrize("metric, larger_wins", [("val/flow_loss_k1", False), ("val/psnr_k4", True)])
def test_best_is_chosen_by_best_metric(tmp_path, monkeypatch, metric, larger_wins):
    values = iter([3.0, 5.0, math.nan, 4.0, 1.0] + 9 * [math.nan])
    trainer = make_trainer(tmp_path, **DIGITS, best_metric=metric, val_every_steps=1)
    measure = lambda: trainer.latest.update({metric: next(values)})  # noqa: E731
    monkeypatch.setattr(trainer, "validate", measure if not larger_wins else lambda: None)
    monkeypatch.setattr(trainer, "visualize", measure if larger_wins else lambda: None)
    best, evaluate = [], trainer.validate_and_draw

    def note_best():
        evaluate()
        best.append(torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)["global_step"])

    monkeypatch.setattr(trainer, "validate_and_draw", note_best)
    trainer.train(max_steps=5)
    assert best == ([1, 2, 2, 2, 2] if larger_wins else [1, 1, 1, 1, 5])


@pytest.mark.parametrize(
    "changes",
    [dict(best_metric="val/fid"), dict(best_metric="val/repa_loss"), dict(best_metric="val/psnr_k3"),
     dict(best_metric="val/flow_loss_k1", val_token_images=0)],
)  # fmt: skip
def test_a_best_metric_that_is_not_logged_is_refused_before_training(changes):
    with pytest.raises(ConfigError, match="best_metric is .*, which this run does not log.*expected one of val/loss"):
        make_trainer(**DIGITS, **changes)


# ------------------------------------------------------------------------------------------------------------- warnings


def test_tokens_that_carry_nothing_are_said_to():
    same_codes, different = torch.full((5, 4), 7), torch.arange(20).view(5, 4)
    assert "all 5 images have the same code at every position" in tokens_warning(same_codes)
    assert tokens_warning(different) == "" and tokens_warning(same_codes[:1]) == ""
    assert "9.57 dB from 1, 9.58 dB from 32" in tokens_warning(psnr_by_count={1: 9.57, 32: 9.58})
    assert tokens_warning(psnr_by_count={1: 9.5, 32: 11.0}) == "" and tokens_warning(psnr_by_count={4: 9.5}) == ""


def test_training_warns_of_tokens_that_carry_nothing_once_and_after_the_warm_up(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **{**DIGITS, "readout_weight": 0.0}, val_token_images=8, warmup_steps=2)
    with caplog.at_level(logging.WARNING, "flextok"):
        trainer.validate()
        assert "carry nothing" not in caplog.text  # a new model: nothing is expected of it yet
        trainer.global_step = 2
        trainer.validate()
        trainer.validate()
    assert caplog.text.count("the tokens carry nothing: all 8 images have the same code") == 1


# ----------------------------------------------------------------------------------------------------------- codes kept


def test_a_fine_tuning_says_what_share_of_the_codes_it_kept(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "first", max_steps=2, **DIGITS)
    tuned = {**DIGITS, "model": None, "model_name": str(tmp_path / "first" / "export"), "val_token_images": 16}
    run_main(tmp_path, run_dir=tmp_path / "kept", max_steps=1, learning_rate=1e-12, min_lr=0.0, **tuned)
    assert [r["val/codes_kept"] for r in read_metrics(tmp_path / "kept") if "val/codes_kept" in r] == [1.0]
    for max_steps in (1, 3):
        run_main(tmp_path, run_dir=tmp_path / "lost", max_steps=max_steps, resume="latest", learning_rate=1e-1, **tuned)
    kept = [r["val/codes_kept"] for r in read_metrics(tmp_path / "lost") if "val/codes_kept" in r]
    assert len(kept) == 2 and kept[-1] < 1.0  # the codes of the start are remembered by the checkpoint
    assert not any("val/codes_kept" in r for r in read_metrics(tmp_path / "first"))


# ------------------------------------------------------------------------------------------------------------ precision


def test_the_measured_precision_is_kept_by_a_resume_whatever_the_machine(tmp_path, monkeypatch, capsys):
    changes = dict(use_amp="auto", repa_encoder_dtype="auto")
    for faster, resume in ((False, None), (True, "latest")):
        monkeypatch.setattr(models, "faster_in_bf16", lambda *_, faster=faster: faster)
        run_main(tmp_path, run_dir=tmp_path / "run", max_steps=2 if resume else 1, resume=resume, **changes)
        assert "cpu, fp32" in capsys.readouterr().out
    config = read_latest(tmp_path / "run")["config"]
    assert config["use_amp"] is False and config["repa_encoder_dtype"] in ("fp32", "bf16")


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def test_the_study_of_fine_tuning_rates_keeps_codes_at_small_ones(tmp_path, capsys, monkeypatch):
    from flextok.evaluation import finetuning

    def few_digits(*arguments):
        digits = digits_of(*arguments)
        digits.pixels, digits.names, digits.labels = digits.pixels[:32], digits.names[:32], digits.labels[:32]
        return digits

    digits_of, tiny = finetuning.digits_of, TrainConfig.from_dict(settings(**DIGITS, inference_steps=1))
    monkeypatch.setattr(finetuning, "digits_of", few_digits)
    monkeypatch.setattr(finetuning, "load_config", lambda file: tiny)
    finetuning.main(["--steps", "2", "--tuning-steps", "2", "--rates", "1e-9", "1e-1", "--output", str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["not fine-tuned", "1e-09", "0.1"]
    kept = [float(row[2].strip(" %")) for row in rows[2:]]
    assert kept[0] == 100 and kept[1] > 99 > kept[2]


def test_a_run_that_is_resumed_at_its_end_logs_nothing_twice(tmp_path):
    for _ in range(2):
        run_main(tmp_path, run_dir=tmp_path / "run", resume="latest", **{**DIGITS, "num_epochs": 1, "batch_size": 500})
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "val/psnr_k1" in record]
    assert steps == [3]
