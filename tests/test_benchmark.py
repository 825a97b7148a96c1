"""The benchmark's own arithmetic; no test depends on how long anything takes."""

import argparse
import json
import sys

import pytest
import torch
from tiny_runs import settings
from torch.utils.flop_counter import FlopCounterMode

from flextok import vae_wrapper
from flextok.benchmark import processes, repa, sample, scale, timing, train
from flextok.benchmark.__main__ import BENCHMARKS, main
from flextok.model.utils.repa_loss import load_encoder
from flextok.training.config import TrainConfig
from flextok.training.models import new_model_config
from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError, run_command

CPU = torch.device("cpu")


def test_arms_take_turns_and_the_first_round_is_not_counted():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.alternate(arms, rounds=2, device=CPU, at_least=0)
    assert "".join(order) == "abcabcabc"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_short_arm_is_repeated_and_its_mean_counts(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def arm(seconds):
        calls.append(seconds)
        now[0] += seconds

    arms = {"long": lambda: arm(2.0), "short": lambda: arm(0.125)}
    times = timing.alternate(arms, rounds=1, device=CPU, at_least=0.5)
    assert calls == [2.0, 0.125, 2.0, 0.125, 0.125, 0.125, 0.125]
    assert times == {"long": [2.0], "short": [0.125]}


def test_ratios_are_within_a_round():
    assert timing.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_the_matmul_arm_knows_its_operations():
    run, flops = timing.matmul_arm(CPU, torch.float32, size=64)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == flops > 0


def test_a_limit_is_the_most_or_if_negative_the_least(capsys):
    rows = [("a", (1.0, 0.5, 2.0), 0.9), ("b", (1.0, 0.5, 2.0), -0.9), ("c", (1.0, 0.5, 2.0), None)]
    assert timing.report_ratios(rows) == {name: values for name, values, _ in rows}
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(")")[-1].strip() for line in lines] == ["at most 0.90: NO", "at least 0.90: yes", ""]


def test_what_autograd_keeps_is_counted_once_and_without_parameters():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)
    assert train.kept_for_backward(lambda: torch.nn.functional.silu(x @ weight), [weight]) == 2 * 4 * 8 * 4


def tiny_config(_preset="", **changes) -> dict:
    changes.pop("vae_hub_path", None)
    model = {key: value for key, value in settings()["model"].items() if key != "vae_factor"}
    model |= dict(vae="stable_diffusion", patch_size=2, latent_channels=4, vae_hub_path=None, **changes)
    return new_model_config(TrainConfig.from_dict(settings(model=model, img_size=64, train_vae=True)))


def make_tiny(set_attribute):
    for module in (train, scale):
        set_attribute(module, "IMG_SIZE", 64)
    for module in (train, scale, sample):
        set_attribute(module, "preset_config", tiny_config)
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    set_attribute(vae_wrapper, "AUTOENCODER_KL", {**vae_wrapper.AUTOENCODER_KL, **small})


@pytest.fixture
def tiny(monkeypatch):
    """The benchmarks' model is a tiny one, for images of 64 px."""
    make_tiny(monkeypatch.setattr)


def test_operations_of_a_forward_pass_are_those_of_its_products():
    """2 * inputs * outputs for each row of a linear layer, 4 * queries * keys * width for attention."""
    layer, q, k = torch.nn.Linear(16, 32), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    assert train.forward_flops(lambda: layer(torch.randn(3, 16))) == 2 * 3 * 16 * 32
    attention = torch.nn.functional.scaled_dot_product_attention
    assert train.forward_flops(lambda: attention(q, k, k)) == 4 * 5 * 7 * 16


def test_a_report_divides_work_by_time_and_by_the_peak_of_the_same_round(capsys):
    times = {"fp32 peak": [1.0, 2.0, 1.0], "fp32, batch 2": [4.0, 8.0, 2.0], "fp32, batch 4": [8.0, 16.0, 8.0]}
    arms = train.report_steps(times, flops=1000, peak_flops={"fp32": 1000.0})
    assert arms["fp32, batch 2"]["mfu"] == (0.5, 0.5, 1.0)
    assert arms["fp32, batch 2"]["images_per_second"] == (0.5, 0.25, 1.0)
    rows = {name: values for name, values, _ in train.step_ratios(arms, times, [2, 4], ["fp32"])}
    assert rows["fp32, time per image, batch 4 / batch 2"] == (1.0, 1.0, 2.0)


def test_a_profile_divides_a_step_among_kinds_of_operations():
    x = torch.randn(64, 64, requires_grad=True)
    q = torch.randn(1, 1, 64, 64)

    def step():
        (x @ x).bfloat16().sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    shares = train.profile(step, CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[kind] > 0 for kind in ("matrix products", "attention", "casts, copies", "the rest"))
    assert shares["optimizer"] == shares["layer norms"] == 0


def test_memory_of_a_step_is_said_in_parts(tiny):
    parts = train.memory_of_a_step("d12-d12", 2, CPU, False)
    n_trained = train.build_trainer("d12-d12", CPU).trained_parameters
    assert parts["gradients"] == 4 * sum(p.numel() for p in n_trained) == parts["AdamW's moments"] // 2
    less = train.memory_of_a_step("d12-d12", 2, CPU, True)
    assert less["kept for the backward pass"] < parts["kept for the backward pass"] < parts["peak"]


def test_a_checkpoint_grows_by_the_projector_and_its_moments_alone():
    sizes = repa.checkpoint_growth(CPU)
    growth = sizes["with"] - sizes["without"]
    assert sizes["projector_and_moments"] < growth <= 1.01 * sizes["projector_and_moments"]


def test_every_arm_of_the_step_benchmark_runs_and_does_what_its_name_says(tmp_path, tiny):
    """On a tiny model and EfficientNet: which arms run the encoder, and which train the projector."""
    encoder = load_encoder("efficientnet_lite0", image_size=64)
    calls = []
    encoder.register_forward_hook(lambda *args: calls.append(1))
    trainer = repa.build_repa_trainer("d12-d12", False, CPU, encoder)
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


def test_sizes_follow_from_grids_and_widths():
    rows = {(row["encoder"], row["image_size"]): row for row in repa.memory_tables()}
    large = rows["dinov2_vitl14", 518]
    assert large["cache_bytes_per_1000_images"] == 1000 * (2 * 37 * 37 * 1024 * 2 + 1)
    assert large["projector_parameters"][1152] == 8_655_872


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, list(BENCHMARKS)),
        (["train", "--help"], 0, ["--batch-sizes", "--dtype", "--json"]),
        (["data", "--files", "0"], 2, ["argument --files: 0 is not at least 1"]),
    ],
)
def test_the_command_line_explains_itself(capsys, arguments, code, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = "".join(capsys.readouterr())
    assert ended.value.code == code and all(text in printed for text in said)


def test_an_unknown_device_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "repa", "--device", "tpu"])
    with pytest.raises(SystemExit, match="^error: --device is 'tpu', expected cpu, cuda or cuda:N$"):
        run_command(main)


def test_numbers_are_written_and_without_a_name_all_benchmarks_run(tmp_path, monkeypatch, capsys):
    ran = []

    def run(name):
        ran.append(name)
        if name == "processes" and len(ran) > 1:
            raise UserError("there is one GPU")
        return {"answer": (1.0, 2.0)}

    for name, (module, _) in BENCHMARKS.items():
        monkeypatch.setattr(module, "run", lambda *arguments, name=name: run(name))
    monkeypatch.chdir(tmp_path)
    main(["train", "--device", "cpu", "--json", "elsewhere/numbers.json"])
    numbers = json.loads((tmp_path / "elsewhere" / "numbers.json").read_text())
    assert numbers["benchmark"] == "train" and numbers["answer"] == [1.0, 2.0] and numbers["torch"] == torch.__version__
    main([])
    assert ran == ["train", *BENCHMARKS]
    assert {path.stem for path in (tmp_path / "benchmark").iterdir()} == set(BENCHMARKS) - {"processes"}
    said = capsys.readouterr().out
    assert "all numbers: benchmark/train.json" in said and "processes: there is one GPU" in said


def test_the_sampling_benchmark_compares_with_decoder_passes(tiny, capsys):
    arguments = argparse.Namespace(preset="d12-d12", steps=2, batch_sizes=[1, 2], rounds=1)
    result = sample.run(arguments, CPU, torch.float32)
    assert set(result["ratios"]) == {f"{name} / decoder passes, batch {n}" for name in ("APG", "CFG") for n in (1, 2)}
    assert all(len(seconds) == 1 for seconds in result["seconds"].values())
    assert "at most 1.05" in capsys.readouterr().out


def test_the_repa_benchmark_refuses_encoders_that_it_cannot_make():
    with pytest.raises(ConfigError, match="--encoder is efficientnet_lite0, expected a DINOv2"):
        repa.run(argparse.Namespace(encoder="efficientnet_lite0", image_size=None), CPU, torch.bfloat16)


@pytest.mark.parametrize("batch_sizes, n", [([3], 2), ([4], 3)])
def test_the_processes_benchmark_wants_batches_that_can_be_shared(batch_sizes, n):
    arguments = argparse.Namespace(processes=n, batch_sizes=batch_sizes, parallel=["ddp"])
    with pytest.raises(UserError, match=f"a batch of {batch_sizes[0]} cannot be shared by {n} processes"):
        processes.run(arguments, CPU, torch.float32)


def test_the_processes_benchmark_compares_shares_of_a_batch_with_all_of_it(monkeypatch, capsys):
    calls = []

    def in_fresh_processes(target, arguments):
        assert target is processes.send_step_seconds
        (_, n, _, threads, *_, settings, steps), *_ = arguments
        calls.append((len(arguments), n, threads, settings["batch_size"], settings.get("parallel")))
        return [3.0, 1.0, 2.0] if n == 1 else [8.0, 4.0, 3.0]

    monkeypatch.setattr(processes, "in_fresh_processes", in_fresh_processes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    arguments = argparse.Namespace(
        processes=2, batch_sizes=[4], parallel=["ddp", "fsdp"], rounds=2, steps=3, preset="d12-d12"
    )
    result = processes.run(arguments, CPU, torch.float32)
    assert calls == [(1, 1, 4, 4, None), (2, 2, 2, 2, "ddp"), (2, 2, 2, 2, "fsdp")] * 2
    assert set(result["ratios"].values()) == {(2.0, 2.0, 2.0)} and len(result["ratios"]) == 2
    monkeypatch.setattr(processes, "in_fresh_processes", lambda *_: None)
    with pytest.raises(UserError, match="ended early"):
        processes.run(arguments, CPU, torch.float32)


def send_tiny_step_seconds(connection, *arguments):
    make_tiny(setattr)
    processes.send_step_seconds(connection, *arguments)


@pytest.mark.slow
def test_steps_are_timed_in_processes_that_exchange_gradients():
    settings = dict(batch_size=1, preset="d12-d12", parallel="ddp")
    common = (2, processes.free_port(), 1, "cpu", torch.float32, settings, 2)
    seconds = train.in_fresh_processes(send_tiny_step_seconds, [(i, *common) for i in range(2)])
    assert len(seconds) == 2 and min(seconds) > 0


def test_scale_counts_what_a_real_step_takes(tiny, capsys):
    """On tensors without data: the operations that torch counts, activations that grow with the batch alone."""
    counts = scale.count("d12-d12", 64, checkpointing=False)
    trainer = train.build_trainer("d12-d12", CPU)
    assert counts["trained"] == sum(parameter.numel() for parameter in trainer.trained_parameters)
    assert counts["flops"] == 3 * train.forward_flops(lambda: trainer.compute_loss(train.latent_batch(trainer, 1)))
    assert 0 < scale.count("d12-d12", 64, checkpointing=True)["kept"] < counts["kept"]
    assert scale.memory(counts, 4) - scale.memory(counts, 2) == 2 * counts["kept"]
    assert scale.memory(counts, 4, parts=64) < scale.memory(counts, 4)
    scale.run(argparse.Namespace(gpus=[8], tflops=300, link=50, global_batch_size=64, image_kb=110,
                                 gradient_checkpointing=True, image_size=64), CPU, torch.float32)  # fmt: skip
    assert "7.18 TB" in capsys.readouterr().out


def test_scale_counts_larger_images(tiny):
    small, large = (scale.count("d12-d12", size, checkpointing=True) for size in (32, 64))
    assert large["trained"] == small["trained"]
    assert [small["sequence"], large["sequence"]] == [2 * 2 + 8, 4 * 4 + 8]  # patches and registers
    assert large["flops"] > small["flops"] and large["kept"] > small["kept"]
