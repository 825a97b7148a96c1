"""Whether the tokens work: the read-out, the choice of the best, warnings, measured precision, fine-tuning."""

import functools
import logging
import math

import pytest
import torch
from tiny_runs import make_trainer, read_latest, read_metrics, run_main, settings

import train_flextok
from flextok.training import models, token_use
from flextok.training.config import TrainConfig
from flextok.training.token_use import tokens_warning
from flextok.utils.config import ConfigError

pytestmark = pytest.mark.usefixtures("no_curves")
DIGITS = dict(
    model=dict(
        encoder_depth=2, decoder_depth=2, encoder_width=64, decoder_width=64, head_dim=32, n_registers=4, vae="dct",
        vae_factor=4, dct_coefficients=[4, 0], patch_size=1, keep_k_mode="pow2",
    ),
    dataset_name="digits", img_size=16, use_augmentation=False, batch_size=16, use_repa=False, vis_token_counts=[1, 4],
    readout_weight=None,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- read-out


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


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_of_tokens_can_be_switched_off(tmp_path):
    trainer = make_trainer(tmp_path, **DIGITS, val_token_images=0)
    assert not any("_k" in key or "codes" in key for key in trainer.validate())


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

    @functools.cache
    def few_digits(*arguments):
        digits = digits_of(*arguments)
        digits.pixels, digits.names, digits.labels = digits.pixels[:32], digits.names[:32], digits.labels[:32]
        return digits

    digits_of, tiny = finetuning.digits_of, TrainConfig.from_dict(settings(**DIGITS, inference_steps=1))
    monkeypatch.setattr(finetuning, "digits_of", few_digits)
    monkeypatch.setattr(train_flextok.FlexTokTrainer, "visualize", lambda trainer: None)  # nothing of the study
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


def test_the_mean_image_is_of_images_from_all_over_the_set(monkeypatch):
    monkeypatch.setattr(token_use, "MEAN_IMAGES", 2)
    images = [torch.full((3, 2, 2), float(i)) for i in range(4)]
    assert token_use.mean_image(images, 1).unique().tolist() == [1.0]  # of 0 and 2


def test_more_codes_and_psnr_are_better_and_less_loss():
    better = [token_use.more_is_better(f"val/{name}") for name in ("codes_distinct_1", "psnr_k4", "flow_loss")]
    assert better == [True, True, False]
