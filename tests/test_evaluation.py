"""Evaluation of a tiny trained model: what is measured, on what, and that it repeats; ablations of tiny runs."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import draw_no_curves, read_metrics, run_main, settings

import train_flextok
from flextok.data.images import ImageFolderDataset
from flextok.evaluation import __main__ as command
from flextok.evaluation import ablation, evaluate, metrics, subjects
from flextok.evaluation.evaluate import Evaluator, Options
from flextok.evaluation.subjects import load_images, load_subject
from flextok.model.utils.repa_encoders import EncoderUnavailable
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError

OPTIONS = dict(
    tokens=[1, 8], encoder="efficientnet_lite0", encoder_image_size=64, inference_steps=2,
)  # fmt: skip
QUICK = "--n-images 5 --tokens 1,8 --inference-steps 2 --encoder efficientnet_lite0 --device cpu".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a few steps with REPA and averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    run_main(folder, run_dir=folder / "run", max_steps=4, use_ema=True, ema_decay=0.5, learning_rate=3e-3)
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def no_weights():
    """LPIPS and Inception weights out of reach, without waiting for it."""

    def unavailable(device):
        raise metrics.MetricUnavailable("no weights in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load_lpips", unavailable)
        patch.setattr(metrics, "load_inception", unavailable)
        yield


def make_evaluator(run, folder, n_images=6, data="photos", **changes) -> Evaluator:
    subject = load_subject(str(run))
    return Evaluator(subject, load_images(data, subject.img_size, n_images), Options(**{**OPTIONS, **changes}), folder)


@pytest.fixture(scope="module")
def results(run, no_weights, tmp_path_factory):
    return make_evaluator(run, tmp_path_factory.mktemp("evaluation")).run()


# -------------------------------------------------------------------------------------------------------- what is there


def test_what_is_skipped_and_too_few_images_are_named(results):
    assert set(results["skipped"]) == {"lpips", "rfid"}
    for row in results["reconstruction"].values():
        assert "6 images" in row["fd"]["warning"] and "30" in row["psnr"]["warning"]
    assert results["probes"]["n_train"] == 6 and "coffee" in results["probes"]["classes"]  # fitted to training crops


@pytest.mark.parametrize(
    "given, measured, drawn",
    [({}, 1.0, 7.5), ({"guidance_scale": 2.0}, 2.0, 2.0)],
)
def test_metrics_are_without_guidance_and_grids_with_the_pictures_unless_one_is_given(
    run, tmp_path, monkeypatch, given, measured, drawn
):
    evaluator, scales = make_evaluator(run, tmp_path, n_images=2, tokens=[8], **given), []
    decode = evaluator.model.decode

    def note(data, guidance_scale, **sampler):
        scales.append(guidance_scale)
        return decode(data, guidance_scale=guidance_scale, **sampler)

    monkeypatch.setattr(evaluator.model, "decode", note)
    about = evaluator.run()["about"]
    assert scales == [measured] + 4 * [drawn]  # one token count; four grids
    assert (about["guidance_scale"], about["picture_guidance_scale"]) == (measured, drawn)


def test_everything_is_in_fp32_unless_bf16_is_asked_for_and_parts_belong_to_a_precision(run, tmp_path, monkeypatch):
    monkeypatch.setattr("flextok.model.utils.repa_encoders.faster_in_bf16", lambda *_: True)
    monkeypatch.setattr("flextok.utils.dtypes.computes_bf16", lambda *_: True)
    settings = []
    for changes, dtype in (({}, torch.float32), ({"precision": "bf16"}, torch.bfloat16)):
        evaluator = make_evaluator(run, tmp_path, n_images=2, tokens=[8], **changes)
        module = evaluator.subject.repa_module(evaluator.device, evaluator.options.precision)
        assert evaluator.encoder.dtype == module.load_encoder().dtype == dtype
        settings.append(evaluator.settings())
        seen = set()
        note = lambda *_, seen=seen: seen.add(torch.is_autocast_enabled("cpu"))  # noqa: E731
        evaluator.model.encoder.register_forward_pre_hook(note)
        evaluator.run()
        assert seen == {dtype == torch.bfloat16}
        assert json.loads((tmp_path / "parts" / "settings.json").read_text()) == settings[-1]
    assert [(one["device"], one["precision"]) for one in settings] == [("cpu", "fp32"), ("cpu", "bf16")]


# -------------------------------------------------------------------------------------------------------- repeatability


def test_digits_are_a_random_choice():
    images = load_images("digits", 16, 50)
    assert len(images) == 50 and images.indices == sorted(images.indices) and max(images.indices) > 150
    assert set(images.classes.values()) == set("0123456789") and len(images.train) == 1500


def test_a_checkpoint_is_the_average_of_the_run_unless_raw_weights_are_asked_for(run):
    subjects = [load_subject(str(run)), load_subject(str(run / "checkpoints/latest.pt"))]
    raw, (averaged, checkpoint) = load_subject(str(run), averaged=False), subjects
    assert averaged.averaged and checkpoint.averaged and not raw.averaged
    weights = [torch.cat([p.flatten() for p in subject.model.parameters()]) for subject in (averaged, checkpoint, raw)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_stopped_evaluation_goes_on_where_it_was(run, results, tmp_path, monkeypatch):
    ssim, calls = metrics.ssim, []

    def stop_at_the_last_count(*images):
        calls.append(1)  # one batch for each token count
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ssim(*images)

    monkeypatch.setattr(metrics, "ssim", stop_at_the_last_count)
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(run, tmp_path).run()
    resumed = make_evaluator(run, tmp_path).run()
    measured = set(results) - {"about", "cost", "skipped"}
    assert {key: resumed[key] for key in measured} == {key: results[key] for key in measured}
    assert len(calls) == 4
    other = make_evaluator(run, tmp_path, tokens=[1], seed=5).run()  # other settings start afresh
    assert other["reconstruction"]["1"]["psnr"] != results["reconstruction"]["1"]["psnr"]  # other noise


# --------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Six pictures in each of three sub-folders."""
    folder = tmp_path_factory.mktemp("coloured")
    for c, colour in enumerate(("blue", "green", "red")):
        (folder / colour).mkdir()
        for j in range(6):
            pixel = tuple(40 + 30 * j if i == c else 20 * j for i in range(3))
            Image.new("RGB", (40, 36), pixel).save(folder / colour / f"{j}.png")
    return folder


def test_labels_keep_their_value_however_large(run, tmp_path, coloured, monkeypatch):
    paths = sorted(coloured.rglob("*.png"))
    labels = [-1, *[7] * 5, *[999_999] * 12]

    def build_datasets(config):
        return tuple(ImageFolderDataset(paths, config.img_size, labels, ["zero"]) for _ in range(2))

    monkeypatch.setattr(subjects, "build_datasets", build_datasets)
    (tmp_path / "images.yaml").write_text("data_path: .\n")
    data = str(tmp_path / "images.yaml")
    results = make_evaluator(run, tmp_path, n_images=None, data=data, tokens=[8]).run()
    assert results["probes"]["classes"] == ["7", "999999"] and results["probes"]["n_unlabelled"] == 1
    assert results["probes"]["chance"] == pytest.approx(12 / 17)


def test_folders_of_one_name_are_classes_of_their_own_in_natural_order(tmp_path, coloured):
    for i, folder in enumerate(("day/10", "day/2", "night/2")):
        shutil.copytree(coloured / "red", tmp_path / folder)
        (tmp_path / folder / "0.png").rename(tmp_path / folder / f"{9 - i}.png")
    images = load_images(str(tmp_path), 32, None)
    assert images.classes == {0: "day/2", 1: "day/10", 2: "night/2"}
    assert [images.labels.count(label) for label in images.classes] == [6, 6, 6]


def test_a_config_file_names_its_validation_images_and_their_classes(tmp_path, coloured):
    file = tmp_path / "images.yaml"
    file.write_text(f"dataset_name: imagefolder\ndata_path: {coloured}\nval_fraction: 0.5\ncrop: random\n")
    images = load_images(str(file), 32, n_images=8)
    assert len(images) == 8 and len(images.train) == 9 and list(images.classes.values()) == ["blue", "green", "red"]
    assert images.dataset.identity() != images.train.dataset.identity()


def test_a_flat_folder_has_no_classes_and_a_broken_image_is_replaced(run, tmp_path, coloured, caplog):
    shutil.copytree(coloured / "red", tmp_path / "flat")
    (tmp_path / "flat" / "2.png").write_bytes(b"no image")
    results = make_evaluator(run, tmp_path / "out", n_images=None, data=str(tmp_path / "flat"), tokens=[8]).run()
    assert results["reconstruction"]["8"]["psnr"]["n"] == 6
    assert sum("cannot read the image" in message and "2.png" in message for message in caplog.messages) == 1
    assert results["probes"] is None and "no classes" in results["skipped"]["probes"]


# ---------------------------------------------------------------------------------------------------- encoders, metrics


def test_without_dinov2_another_encoder_is_used_and_named(run, tmp_path, monkeypatch):
    original = evaluate.load_encoder

    def load(name, *args, **kwargs):
        if name.startswith("dinov2"):
            raise EncoderUnavailable("dinov2 could not be loaded: no network.\nCopy ...")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(evaluate, "load_encoder", load)
    evaluator = make_evaluator(run, tmp_path, encoder=None, encoder_image_size=None, precision="bf16")
    assert evaluator.encoder.name == "efficientnet_lite0" and evaluator.encoder.dtype == torch.bfloat16
    assert "efficientnet_lite0 is used instead" in evaluator.skipped["fd with dinov2_vitl14"]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--tokens", "1,9"], ConfigError, "but the model has 1 to 8 tokens"),
        (["--n-images", "0"], ConfigError, "--n-images is 0, expected at least 1"),
        (["--data", "nowhere"], FileNotFoundError, "nowhere, which does not exist"),
        (["--checkpoint", "/nowhere"], FileNotFoundError, "there is nothing at /nowhere"),
        (["--checkpoint", "README.md"], CheckpointError, "README.md .* copy or download it again"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(run, tmp_path, arguments, error, message):
    given = ["--checkpoint", str(run), "--data", "photos", "--encoder", "efficientnet_lite0", "--device", "cpu",
             "--output", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(error, match=message):
        command.main([*given, *arguments])
    assert not (tmp_path / "out" / "results.json").exists()


# ------------------------------------------------------------------------------------------------------------- ablation


def test_arms_are_names_or_settings():
    arms = ablation.parse_arms("baseline,repa,irepa,repa_stop=5,light:repa_weight=0.5+repa_lr=1e-3,repa_layers=[0,2]")
    assert arms["baseline"] == {"use_repa": False} and arms["repa"] == {"use_repa": True}
    assert arms["repa_stop=5"] == {"repa_stop": 5, "use_repa": True}
    assert arms["light"] == {"repa_weight": 0.5, "repa_lr": 1e-3, "use_repa": True}
    assert arms["repa_layers=[0,2]"]["repa_layers"] == [0, 2]
    assert arms["irepa"]["repa_projector"] == "conv"
    with pytest.raises(ConfigError, match="'best' is neither baseline, repa"):
        ablation.parse_arms("best")


def test_an_ablation_trains_evaluates_and_reports_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    def run_python(arguments, output, cost_file=None):
        """In this process."""
        if arguments[0] == "-m":
            assert arguments[arguments.index("--device") + 1] == "cpu"  # chosen once for all arms
            command.main(arguments[2:])
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            train_flextok.main(train_flextok.parse_arguments())
            cost_file.write_text('{"seconds": 2.5}')

    monkeypatch.setattr(ablation, "run_python", run_python)
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    draw_no_curves(monkeypatch.setattr)
    config = tmp_path / "ablate.yaml"
    config.write_text(yaml.safe_dump(settings(num_epochs=1, photos_train_crops=8, photos_val_crops=2, seed=7)))
    out = tmp_path / "ablation"
    options = "--n-images 4 --tokens 8 --inference-steps 1 --encoder efficientnet_lite0 --encoder-image-size 64".split()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--config", str(config), "--arms", "baseline,repa", "--output", str(out), *options]
    ablation.main(arguments)
    result = json.loads((out / "ablation.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == ["baseline", "repa"]
    for arm in result["arms"]:
        (run,) = arm["runs"]
        assert run["seconds"] == 2.5 and run["curves"]["step"] == [1, 2]
        assert yaml.safe_load((out / arm["name"] / "seed0" / "run" / "config.yaml").read_text())["seed"] == 0
        records = read_metrics(out / arm["name"] / "seed0" / "run", timing=True)
        peak = max(record.get("train/memory_gb", 0) for record in records)
        assert run["peak_memory_bytes"] == pytest.approx(1e9 * peak) and peak > 0.05
        assert set(run["results"]["reconstruction"]) == {"vae", "8"}
        assert all((out / path).is_file() for path in run["grids"].values())
    losses = [arm["runs"][0]["curves"]["train/flow_loss"] for arm in result["arms"]]
    assert losses[0][0] == losses[1][0]  # the arms start from the same draws
    report = (out / "report.html").read_text()
    assert "baseline" in report and report.count("data:image/png;base64,") >= 6
    monkeypatch.setattr(ablation, "run_python", None)  # nothing is run again
    monkeypatch.setattr(ablation, "try_evaluation", None)
    ablation.main(arguments)
    assert "repa" in capsys.readouterr().out


def test_a_process_of_an_arm_has_a_cost_and_says_why_it_failed(tmp_path):
    ablation.run_python(["-c", "pass"], tmp_path / "log", tmp_path / "cost.json")
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["seconds"] > 0
    with pytest.raises(UserError, match="ended with 1: no such data"):
        ablation.run_python(["-c", "raise SystemExit('no such data')"], tmp_path / "log")


@pytest.mark.parametrize(
    "options, error, message",
    [
        (["--tokens", "1,9"], UserError, "arm 'baseline': --tokens is .1, 9., but the model has 1 to 8 tokens"),
        (["--data", "nowhere"], FileNotFoundError, "nowhere, which does not exist"),
        (["--encoder-image-size", "-3"], UserError, "arm 'baseline': --encoder, --encoder-image-size: .* is -3, but"),
        ([], RuntimeError, "a bug"),
    ],
)
def test_an_evaluation_that_cannot_be_is_found_before_any_arm_trains(tmp_path, monkeypatch, options, error, message):
    def bug(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ablation, "run_python", lambda *_: pytest.fail("an arm trains"))
    monkeypatch.setattr(evaluate, "code_statistics", bug)
    config = tmp_path / "ablate.yaml"
    config.write_text(yaml.safe_dump(settings()))
    arguments = ["--config", str(config), "--arms", "baseline,repa", "--output", str(tmp_path / "out"), *QUICK]
    with pytest.raises(error, match=message):
        ablation.main([*arguments, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["ablate.yaml"]
