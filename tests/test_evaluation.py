"""Evaluation of a tiny trained model: what is measured, on what, and that it repeats; ablations of tiny runs."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import read_metrics, run_main, settings

from flextok.evaluation import __main__ as command
from flextok.evaluation import ablation, evaluate, metrics
from flextok.evaluation.evaluate import Evaluator, Options
from flextok.evaluation.subjects import load_images, load_subject
from flextok.model.utils.repa_encoders import EncoderUnavailable
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError

OPTIONS = dict(
    tokens=[1, 3, 8], encoder="efficientnet_lite0", encoder_image_size=64, inference_steps=2, guidance_scale=2.0,
    use_amp=False,
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


def numbers(results: dict) -> dict:
    """What an evaluation measured, without what it was called and what it cost."""
    return {key: value for key, value in results.items() if key not in ("about", "cost", "skipped")}


@pytest.fixture(scope="module")
def evaluator(run, no_weights, tmp_path_factory):
    return make_evaluator(run, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def results(evaluator):
    return evaluator.run()


@pytest.fixture(scope="module")
def encoded(evaluator):
    with torch.no_grad():
        return evaluator.encode(evaluator.images)


# -------------------------------------------------------------------------------------------------------- what is there


def test_every_part_of_an_evaluation_is_there(results):
    assert list(results["reconstruction"]) == ["vae", "1", "3", "8"]
    for row in results["reconstruction"].values():
        assert set(row) == {"psnr", "ssim", "latent_mse", "fd"}
        assert all(measure["n"] == 6 for measure in row.values())
        assert row["psnr"]["low"] <= row["psnr"]["value"] <= row["psnr"]["high"]
        assert "warning" in row["fd"] and "warning" in row["psnr"]
    assert set(results["skipped"]) == {"lpips", "rfid"}
    alignment = results["alignment"]
    assert [row["layer"] for row in alignment["layers"]] == [0, 1, 2] and alignment["aligned_layers"] == [1]
    assert -1 <= alignment["cosine"]["value"] <= 1 and alignment["cosine"]["n"] == 6 and 0 < alignment["constant"] <= 1
    assert results["codes"]["n"] == 6 and len(results["codes"]["used"]) == 8
    assert set(results["codes"]["silhouette"]) == {"1", "2", "4"}
    assert results["probes"]["n_train"] == 6 and "coffee" in results["probes"]["classes"]  # fitted to training crops
    assert json.loads(json.dumps(results)) == results


def test_the_vae_row_is_exact_for_a_lossless_vae(results):
    row = results["reconstruction"]["vae"]
    assert row["psnr"]["value"] == metrics.MAX_PSNR and row["latent_mse"]["value"] == 0
    assert row["fd"]["value"] == pytest.approx(0, abs=1e-3)


def test_psnr_is_that_of_the_pictures(evaluator, results, encoded):
    with torch.no_grad():
        images, _ = evaluator.decode(8, torch.arange(6), encoded)
    originals = torch.stack([evaluator.images.dataset[i]["image"] for i in range(6)])
    errors = ((images - originals) / 2).double().square().mean(dim=(1, 2, 3))
    expected = sum(-10 * math.log10(error) for error in errors.tolist()) / 6
    assert results["reconstruction"]["8"]["psnr"]["value"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_k_tokens_are_what_is_used_and_no_more(evaluator, encoded, k):
    size = evaluator.model.regularizer.codebook_size
    later, last = ({**encoded, "tokens": encoded["tokens"].clone()} for _ in range(2))
    later["tokens"][:, k:] = (later["tokens"][:, k:] + 17) % size
    last["tokens"][:, k - 1] = (last["tokens"][:, k - 1] + 17) % size
    with torch.no_grad():
        images, changed_later, changed_last = (
            evaluator.decode(k, torch.arange(6), tokens)[0] for tokens in (encoded, later, last)
        )
    assert torch.equal(images, changed_later)
    assert not torch.equal(images, changed_last)


# -------------------------------------------------------------------------------------------------------- repeatability


def test_numbers_do_not_depend_on_the_batch_size(run, results, tmp_path):
    again = make_evaluator(run, tmp_path, batch_size=4).run()
    for k, row in results["reconstruction"].items():
        for name, measure in row.items():
            assert again["reconstruction"][k][name]["value"] == pytest.approx(measure["value"], rel=1e-4, abs=1e-3)
    assert again["codes"] == results["codes"]


def test_the_export_and_the_checkpoint_give_the_same_numbers(run, results, tmp_path):
    exported = make_evaluator(run / "export", tmp_path).run()
    checkpoint = make_evaluator(run / "checkpoints" / "latest.pt", tmp_path / "checkpoint").run()
    assert numbers(checkpoint) == numbers(results)
    assert exported["reconstruction"] == results["reconstruction"] and exported["codes"] == results["codes"]
    assert exported["alignment"]["layers"] == results["alignment"]["layers"]
    assert exported["alignment"]["cosine"] is None and "alignment cosine" in exported["skipped"]


def test_raw_weights_are_others_than_the_average(run):
    raw, averaged = load_subject(str(run), averaged=False), load_subject(str(run))
    assert averaged.averaged and not raw.averaged
    assert any(not torch.equal(a, b) for a, b in zip(raw.model.parameters(), averaged.model.parameters(), strict=True))


def test_a_stopped_evaluation_goes_on_where_it_was(run, results, tmp_path, monkeypatch):
    ssim, calls = metrics.ssim, []

    def stop_at_the_last_count(*images):
        calls.append(1)  # one batch for each token count
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ssim(*images)

    monkeypatch.setattr(metrics, "ssim", stop_at_the_last_count)
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(run, tmp_path).run()
    assert numbers(make_evaluator(run, tmp_path).run()) == numbers(results)
    assert len(calls) == 5
    make_evaluator(run, tmp_path, tokens=[1, 2]).run()  # another count joins those that are there
    assert len(calls) == 6
    other = make_evaluator(run, tmp_path, tokens=[1], seed=5).run()  # other settings start afresh
    assert len(calls) == 8
    assert other["reconstruction"]["1"]["psnr"] != results["reconstruction"]["1"]["psnr"]  # other noise
    assert other["reconstruction"]["vae"]["psnr"] == results["reconstruction"]["vae"]["psnr"]


# --------------------------------------------------------------------------------------------------------------- images


def make_classes(folder: Path) -> Path:
    for i, colour in enumerate(("red", "green", "blue")):
        (folder / colour).mkdir(parents=True)
        for j in range(6):
            Image.new("RGB", (40, 36), tuple(40 + 30 * j if i == c else 20 * j for c in range(3))).save(
                folder / colour / f"{j}.png"
            )
    return folder


def test_sub_folders_are_classes_and_probes_are_fitted_to_every_other_image(run, tmp_path):
    data = str(make_classes(tmp_path / "images"))
    evaluator = make_evaluator(run, tmp_path / "out", n_images=None, data=data, tokens=[8])
    evaluator.subject.projector_state = None
    decoded = []  # the features of the whole folder serve both halves: each image is decoded once, with its own noise
    evaluator.model.decoder.register_forward_hook(lambda *_: decoded.append(evaluator.transformer.intermediate_layers))
    results = evaluator.run()
    assert decoded.count([0, 1, 2]) == 2  # 18 images in batches of 16
    probes = results["probes"]
    assert probes["classes"] == ["blue", "green", "red"] and probes["n_train"] == probes["n_test"] == 9
    assert probes["chance"] == pytest.approx(1 / 3)
    assert {"decoder layer 0", "decoder layer 2", "tokens, first 1", "tokens, first 8"} <= set(probes["features"])
    assert results["codes"]["silhouette_by"] == "classes"


def test_a_config_file_names_its_validation_images_and_their_classes(tmp_path):
    for i in range(24):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (10 * i, 0, 90 * (i % 2))).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    file = tmp_path / "images.yaml"
    file.write_text(f"dataset_name: imagefolder\ndata_path: {tmp_path / 'data'}\nval_fraction: 0.5\ncrop: random\n")
    images = load_images(str(file), 32, n_images=8)
    assert len(images) == 8 and len(images.train) == 12 and images.classes == ["a", "b"]
    assert set(images.labels) == {0, 1} and images.dataset.identity() != images.train.dataset.identity()
    names = [images.dataset.dataset.name(i) for i in images.dataset.indices]
    assert ["ab".index(Path(name).parent.name) for name in names] == images.labels
    file.write_text("dataset_name: photos\nphotos_val_crops: 0\n")
    with pytest.raises(ConfigError, match="images.yaml keeps no images for validation"):
        load_images(str(file), 32, n_images=8)


def test_a_flat_folder_has_no_classes_and_a_broken_image_is_replaced(run, tmp_path, caplog):
    folder = make_classes(tmp_path / "images") / "red"
    (folder / "2.png").write_bytes(b"no image")
    results = make_evaluator(run, tmp_path / "out", n_images=None, data=str(folder), tokens=[8]).run()
    assert results["reconstruction"]["8"]["psnr"]["n"] == 6
    assert sum("cannot read the image" in message and "2.png" in message for message in caplog.messages) == 1
    assert results["probes"] is None and "no classes" in results["skipped"]["probes"]
    assert "k-means" in results["codes"]["silhouette_by"]
    again = make_evaluator(run, tmp_path / "out", n_images=None, data=str(folder), tokens=[8]).run()
    assert again["skipped"] == results["skipped"]  # from what is stored


def test_one_image_is_evaluated_as_far_as_that_goes(run, tmp_path):
    results = make_evaluator(run, tmp_path, n_images=1).run()
    assert results["reconstruction"]["8"]["psnr"]["n"] == 1 and results["reconstruction"]["8"]["psnr"]["low"] is None
    assert "fd" in results["skipped"] and "cknna" in results["skipped"]


def test_a_limited_choice_of_a_folder_is_always_the_same_and_mixes_its_classes(tmp_path):
    folder = str(make_classes(tmp_path / "images"))
    chosen = [load_images(folder, 32, 9).dataset.paths for _ in range(2)]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 9
    assert {path.parent.name for path in chosen[0]} == {"red", "green", "blue"}


# ---------------------------------------------------------------------------------------------------- encoders, metrics


def test_without_dinov2_another_encoder_is_used_and_named(run, tmp_path, monkeypatch):
    original = evaluate.load_encoder

    def load(name, *args, **kwargs):
        if name.startswith("dinov2"):
            raise EncoderUnavailable("dinov2 could not be loaded: no network.\nCopy ...")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(evaluate, "load_encoder", load)
    evaluator = make_evaluator(run, tmp_path, encoder=None, encoder_image_size=None)
    assert evaluator.encoder.name == "efficientnet_lite0"
    assert "efficientnet_lite0 is used instead" in evaluator.skipped["fd with dinov2_vitl14"]
    with pytest.raises(EncoderUnavailable):
        make_evaluator(run, tmp_path, encoder="dinov2_vits14")


def test_lpips_and_rfid_are_there_where_their_networks_are(run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "load_lpips", lambda device: lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    monkeypatch.setattr(metrics, "INCEPTION_DIM", 3)
    monkeypatch.setattr(metrics, "load_inception", lambda device: lambda images: images.mean(dim=(2, 3)))
    results = make_evaluator(run, tmp_path, tokens=[8]).run()
    assert results["skipped"] == {}
    assert results["reconstruction"]["8"]["lpips"]["value"] > 0 and results["reconstruction"]["8"]["rfid"]["value"] > 0
    assert results["reconstruction"]["vae"]["lpips"]["value"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_results_plots_grids_and_one_report_and_logs_them(run, tmp_path, monkeypatch, capsys):
    logged, finished = [], []

    class Run:
        log = staticmethod(logged.append)
        finish = staticmethod(lambda: finished.append(True))

    fake = SimpleNamespace(init=lambda **given: logged.append(given) or Run, Image=lambda path: f"picture {path}")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "out"
    command.main(["--checkpoint", str(run), "--output", str(out), "--data", "photos", "--wandb", "project", *QUICK])
    said = capsys.readouterr().out
    assert "PSNR" in said and "lpips" in said.lower() and str(out / "report.html") in said
    results = json.loads((out / "results.json").read_text())
    assert list(results["reconstruction"]) == ["vae", "1", "8"]
    for name in ("best", "median", "worst"):
        assert Image.open(out / "grids" / f"{name}.png").size[0] > 200
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and report.count("<svg") >= 5 and "<script" not in report
    assert logged[0]["project"] == "project" and logged[0]["config"]["seed"] == 0
    assert [record["eval/tokens"] for record in logged[1:-1]] == [1, 8]
    assert logged[1]["eval/psnr"] == results["reconstruction"]["1"]["psnr"]["value"]
    assert logged[-1]["eval/grid_best"].endswith("grids/best.png") and finished


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--device", "tpu"], ConfigError, "--device is 'tpu', expected cpu, cuda or cuda:N"),
        (["--tokens", "1,9"], ConfigError, "but the model has 1 to 8 tokens"),
        (["--tokens", "one"], ConfigError, "--tokens is 'one', expected numbers with commas"),
        (["--n-images", "0"], ConfigError, "--n-images is 0, expected at least 1"),
        (["--data", "nowhere"], FileNotFoundError, "nowhere, which does not exist"),
        (["--checkpoint", "/nowhere"], FileNotFoundError, "there is nothing at /nowhere"),
        (["--checkpoint", "nowhere"], FileNotFoundError, "no Hub name"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(run, tmp_path, arguments, error, message):
    given = ["--checkpoint", str(run), "--data", "photos", "--encoder", "efficientnet_lite0", "--device", "cpu",
             "--output", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(error, match=message):
        command.main([*given, *arguments])
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is neither a run"):
        load_subject(str(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_subject(str(tmp_path / "a.pt"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="there is nothing at runs/nix"):  # mistyped, and no Hub name
        load_subject("runs/nix")


# ------------------------------------------------------------------------------------------------------------- ablation


def test_arms_are_names_or_settings():
    arms = ablation.parse_arms("baseline,repa,irepa,repa_stop=5,light:repa_weight=0.5+repa_lr=1e-3,repa_layers=[0,2]")
    assert arms["baseline"] == {"use_repa": False} and arms["repa"] == {"use_repa": True}
    assert arms["repa_stop=5"] == {"repa_stop": 5, "use_repa": True}
    assert arms["light"] == {"repa_weight": 0.5, "repa_lr": 1e-3, "use_repa": True}
    assert arms["repa_layers=[0,2]"]["repa_layers"] == [0, 2]
    assert arms["irepa"]["repa_projector"] == "conv"
    for text, message in (("baseline,baseline", "given twice"), ("best", "'best' is neither baseline, repa")):
        with pytest.raises(ConfigError, match=message):
            ablation.parse_arms(text)


@pytest.mark.slow
def test_an_ablation_trains_evaluates_and_reports_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "ablate.yaml"
    config.write_text(yaml.safe_dump(settings(num_epochs=1, photos_train_crops=8, use_repa=False)))
    arguments = ["--config", str(config), "--arms", "baseline,repa", *QUICK]
    ablation.main(arguments)
    out = tmp_path / "ablation" / "ablate"
    result = json.loads((out / "ablation.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == ["baseline", "repa"]
    for arm in result["arms"]:
        (run,) = arm["runs"]
        assert run["seconds"] > 0 and run["peak_memory_bytes"] > 1e7 and run["curves"]["step"] == [1, 2]
        assert set(run["results"]["reconstruction"]) == {"vae", "1", "8"}
        assert all((out / path).is_file() for path in run["grids"].values())
    records = [read_metrics(out / name / "seed0" / "run") for name in ("baseline", "repa")]
    first = [next(r["train/flow_loss"] for r in arm if "train/flow_loss" in r) for arm in records]
    assert first[0] == first[1]  # the arms start from the same draws
    report = (out / "report.html").read_text()
    assert "baseline" in report and report.count("data:image/png;base64,") == 8
    monkeypatch.setattr(ablation.subprocess, "Popen", None)  # nothing is run again
    ablation.main(arguments)
    assert "repa" in capsys.readouterr().out


def test_the_time_before_an_interruption_counts(tmp_path, monkeypatch):
    wait = ablation.os.wait4
    monkeypatch.setattr(ablation.os, "wait4", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ablation.run_python(["-c", "import time; time.sleep(60)"], tmp_path / "log", tmp_path / "cost.json")
    first = json.loads((tmp_path / "cost.json").read_text())["seconds"]
    monkeypatch.setattr(ablation.os, "wait4", wait)
    ablation.run_python(["-c", "pass"], tmp_path / "log", tmp_path / "cost.json")
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["seconds"] > first > 0 and cost["peak_memory_bytes"] > 1e6


def test_an_arm_with_a_bad_setting_is_refused_before_any_arm_trains(tmp_path):
    with pytest.raises(ConfigError, match="arm 'repa_stopp=5': unknown setting: 'repa_stopp'"):
        ablation.main(["--config", "configs/quickstart.yaml", "--arms", "baseline,repa_stopp=5", "--output",
                       str(tmp_path)])  # fmt: skip
    assert not list(tmp_path.iterdir())
