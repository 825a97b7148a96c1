"""Does it help? Train the arms of a comparison, evaluate each, and write one report.

    python -m flextok.evaluation.ablation --config configs/quickstart.yaml --arms baseline,repa

Arms differ in their settings alone: seed, data order, noise, timesteps, token counts and validation are functions of
(seed, step, position) and the same in all of them; all are evaluated alike. Before the first trains, a new model of
each is evaluated on two images, so that what an evaluation refuses shows at once. An arm that is finished is not run
again.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..training.config import TrainConfig, load_config, parse_yaml
from ..training.models import build_repa_module, load_model
from ..utils.config import ConfigError
from ..utils.errors import UserError, run_command
from .__main__ import add_options, options_of
from .ablation_report import console_table, write_ablation_report
from .evaluate import FORMAT, Evaluator, Options, read_json, write_json
from .subjects import Subject, load_images

log = logging.getLogger(__name__)

TRAINER = Path(__file__).parents[2] / "train_flextok.py"
NAMED_ARMS = {
    "baseline": {"use_repa": False},
    "repa": {"use_repa": True},
    "irepa": {
        "use_repa": True, "repa_projector": "conv", "repa_spatial_norm": True, "repa_project": "before_resize",
    },
}  # fmt: skip


def parse_arms(text: str) -> dict[str, dict[str, Any]]:
    """Arms by name: `baseline`, `repa`, `irepa`, or settings `KEY=VALUE+KEY=VALUE`, with a name as `NAME:KEY=VALUE`.

    Settings of REPA (`repa_...`) without `use_repa` switch it on.

    Raises:
        ConfigError: An unknown arm, or a name given twice.
    """
    arms: dict[str, dict[str, Any]] = {}
    for part in map(str.strip, re.split(r",(?![^\[]*\])", text)):  # commas within [ ] belong to a value
        named = re.fullmatch(r"([\w.-]+):([\w.]+=.*)", part)
        name, settings = named.groups() if named else (part, part)
        if settings in NAMED_ARMS:
            overrides = dict(NAMED_ARMS[settings])
        elif "=" in settings:
            pairs = [pair.partition("=") for pair in settings.split("+")]
            overrides = {key.strip(): parse_yaml(value) for key, _, value in pairs}
            if any(key.startswith("repa_") for key in overrides):
                overrides.setdefault("use_repa", True)
        else:
            raise ConfigError(
                f"--arms: {part!r} is neither {', '.join(NAMED_ARMS)} nor KEY=VALUE (several: KEY=VALUE+KEY=VALUE)"
            )
        if name in arms:
            raise ConfigError(f"--arms: {name!r} is given twice")
        arms[name] = overrides
    return arms


def try_evaluation(config: TrainConfig, data: str, options: Options) -> None:
    """Evaluate a new model of an arm on two images, as its trained one will be; leaves nothing on the disk.

    Raises:
        UserError: What the evaluation of the trained model would raise.
    """
    model, projector = load_model(config).eval(), None
    if config.use_repa:
        projector = build_repa_module(config, model, torch.device("cpu")).state_dict()
    subject = Subject("an arm's new model", model, config=config, projector_state=projector)
    images = load_images(data, subject.img_size, n_images=2, n_train=2)
    with tempfile.TemporaryDirectory() as folder:
        Evaluator(subject, images, options, Path(folder)).run()
    del model, subject
    if options.device != "cpu":
        torch.cuda.empty_cache()  # the arms are trained by other processes


def finished_arm(config: TrainConfig, evaluation: list[str], folder: Path) -> dict | None:
    """What the report needs of an arm that was trained and evaluated so before; None if it was not."""
    arm = read_json(folder / "arm.json")
    return arm if arm is not None and arm.pop("about", None) == about_arm(config, evaluation) else None


def about_arm(config: TrainConfig, evaluation: list[str]) -> dict:
    return {"format": FORMAT, "settings": config.to_dict(), "evaluation": evaluation}


def run_arm(config_file: Path, overrides: list[str], config: TrainConfig, evaluation: list[str], folder: Path) -> dict:
    """Train one arm with one seed and evaluate it, as far as that is not done; what the report needs of it.

    Args:
        config_file: The YAML file that all arms share.
        overrides: Settings KEY=VALUE of the arm, the seed included.
        config: What they make together.
        evaluation: Arguments of `python -m flextok.evaluation`, without checkpoint and output.
        folder: Of this arm and seed.
    """
    finished, about = finished_arm(config, evaluation, folder), about_arm(config, evaluation)
    if finished is not None:
        log.info("%s: finished already", folder)
        return finished
    stored = read_json(folder / "about.json")
    if stored is not None and stored["settings"] != about["settings"]:
        raise ConfigError(f"{folder} holds an arm of other settings: give another --output, or delete it")
    write_json(folder / "about.json", about)
    log.info("%s: training", folder)
    train = [str(TRAINER), "--config", str(config_file), "--run-dir", str(folder / "run"), "--resume", "latest"]
    run_python([*train, *(f"--set={override}" for override in overrides)], folder / "train.log", folder / "cost.json")
    log.info("%s: evaluation", folder)
    evaluate = ["-m", "flextok.evaluation", "--checkpoint", str(folder / "run")]
    run_python([*evaluate, "--output", str(folder / "evaluation"), *evaluation], folder / "evaluation.log")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    arm = {
        "seed": config.seed,
        "results": read_json(folder / "evaluation" / "results.json"),
        "curves": curves_of(records),
        "seconds": read_json(folder / "cost.json")["seconds"],
        "peak_memory_bytes": peak_of(records),
    }
    write_json(folder / "arm.json", {**arm, "about": about})
    return arm


def run_python(arguments: list[str], output: Path, cost_file: Path | None = None) -> None:
    """Run Python in a process of its own; its seconds are added to what `cost_file` holds.

    Raises:
        UserError: It fails; with the last line of its output.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TRAINER.parent), os.environ.get("PYTHONPATH", "")])}
    cost = cost_file and read_json(cost_file) or {"seconds": 0.0}
    start = time.perf_counter()
    try:
        with open(output, "ab") as file:
            command = [sys.executable, *arguments]
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    finally:  # also when interrupted: the time counts
        cost["seconds"] += time.perf_counter() - start
        if cost_file is not None:
            write_json(cost_file, cost)
    if status != 0:
        last = output.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{' '.join(arguments[:3])} ended with {status}: {' '.join(last)} ({output})")


def curves_of(records: list[dict]) -> dict:
    """The losses of a metrics.jsonl: lists for the training steps, [step, value] pairs for validation."""
    steps = [record for record in records if "train/flow_loss" in record]
    curves: dict[str, Any] = {"step": [record["step"] for record in steps]}
    for name in ("flow_loss", "repa_loss"):
        curves[f"train/{name}"] = [record.get(f"train/{name}") for record in steps]
        validation = [(record["step"], record.get(f"val/{name}")) for record in records]
        curves[f"val/{name}"] = [[step, value] for step, value in validation if value is not None]
    return curves


def peak_of(records: list[dict]) -> int | None:
    """Peak memory of a training in bytes, over all its processes one after the other; None where it is not known."""
    peaks = [record["train/memory_gb"] for record in records if "train/memory_gb" in record]
    return round(max(peaks) * 1e9) if peaks else None


def own_parser(**options) -> argparse.ArgumentParser:
    """The options that an evaluation does not have."""
    parser = argparse.ArgumentParser(allow_abbrev=False, **options)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file that all arms share")
    parser.add_argument("--arms", default="baseline,repa", metavar="ARM,ARM,...",
                        help="baseline, repa, irepa, or settings such as repa_stop=500 or "
                        "name:repa_weight=0.5+repa_lr=1e-3 (default: baseline,repa)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each arm, with seeds 0 to N - 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="a setting for all arms; repeatable")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: ablation/NAME of the config")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = own_parser(
        prog="python -m flextok.evaluation.ablation",
        description="Train and evaluate the arms of a comparison, and write one report.",
    )
    add_options(parser, data_required=False)
    arguments = parser.parse_args(argv)
    evaluation = own_parser(add_help=False).parse_known_args(argv)[1]  # what is left is for the evaluation
    options = options_of(arguments)  # refuses what is wrong before anything is trained
    evaluation += ["--device", options.device]  # chosen once: all arms are evaluated alike
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds is {arguments.seeds}, expected at least 1")
    config = load_config(arguments.config, arguments.overrides)
    data = arguments.data or config.dataset_name
    if arguments.data is None:
        if data not in ("digits", "photos"):
            raise ConfigError(f"--data is missing: images that no arm was trained on, e.g. --data {arguments.config}")
        evaluation += ["--data", data]
    folder = arguments.output or Path("ablation", arguments.config.stem)

    arms = parse_arms(arguments.arms)
    overrides, configs, places = {}, {}, {}
    for name, settings in arms.items():
        for seed in range(arguments.seeds):
            changes = {**settings, "seed": seed, "use_wandb": False}
            overrides[name, seed] = [*arguments.overrides, *(f"{key}={json.dumps(v)}" for key, v in changes.items())]
            try:
                configs[name, seed] = load_config(arguments.config, overrides[name, seed])
            except ConfigError as error:
                raise ConfigError(f"arm {name!r}: {error}") from error
            places[name, seed] = Path(re.sub(r"[^\w.=-]+", "_", name), f"seed{seed}")
    for name in arms:
        of_arm = [(config, places[key]) for key, config in configs.items() if key[0] == name]
        if all(finished_arm(config, evaluation, folder / place) for config, place in of_arm):
            continue
        log.info("%s: evaluation of a new model on two images", name)
        try:
            try_evaluation(of_arm[0][0], data, options)
        except UserError as error:
            raise UserError(f"arm {name!r}: {error}") from error

    ablation: dict[str, Any] = {"format": FORMAT, "config": str(arguments.config), "arms": [], "notes": []}
    for name, settings in arms.items():
        runs = []
        for seed in range(arguments.seeds):
            key, place = (name, seed), places[name, seed]
            run = run_arm(arguments.config, overrides[key], configs[key], evaluation, folder / place)
            grids = run["results"]["grids"]
            run["grids"] = {grid: str(place / "evaluation" / path) for grid, path in grids.items()}
            runs.append(run)
        ablation["arms"].append({"name": name, "overrides": settings, "runs": runs})
    write_json(folder / "ablation.json", ablation)
    print(console_table(ablation))
    print(f"\n  report   {write_ablation_report(ablation, folder)}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(main)
