"""Does it help? Train the arms of a comparison, evaluate each, and write one report.

    python -m flextok.evaluation.ablation --config configs/quickstart.yaml --arms baseline,repa

Arms differ in their settings alone: seed, data order, noise, timesteps, token counts and validation are functions of
(seed, step, position) and the same in all of them. An arm that is finished is not run again.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..training.config import TrainConfig, load_config, parse_yaml
from ..utils.config import ConfigError
from ..utils.errors import UserError, run_command
from .__main__ import add_options, options_of
from .ablation_report import console_table, write_ablation_report
from .evaluate import read_json, write_json

log = logging.getLogger(__name__)

TRAINER = Path(__file__).parents[2] / "train_flextok.py"
NAMED_ARMS = {
    "baseline": {"use_repa": False},
    "repa": {"use_repa": True},
    "irepa": {
        "use_repa": True, "repa_projector": "conv", "repa_spatial_norm": True, "repa_project": "before_resize",
    },
}  # fmt: skip
CURVES = ("train/flow_loss", "train/repa_loss")  # and val/flow_loss, val/repa_loss


def parse_arms(text: str) -> dict[str, dict[str, Any]]:
    """Arms by name: `baseline`, `repa`, `irepa`, or settings `KEY=VALUE+KEY=VALUE`, with a name as `NAME:KEY=VALUE`.

    Settings of REPA (`repa_...`) without `use_repa` switch it on.

    Raises:
        ConfigError: An unknown arm, a setting that is no KEY=VALUE, a name given twice, or fewer than one arm.
    """
    arms: dict[str, dict[str, Any]] = {}
    for part in re.split(r",(?![^\[]*\])", text):  # commas within [ ] belong to a value
        name, _, settings = (
            part.strip().rpartition(":") if re.match(r"[\w.-]+:[\w.]+=", part.strip()) else ("", "", part.strip())
        )
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
        name = name or settings
        if name in arms:
            raise ConfigError(f"--arms: {name!r} is given twice")
        arms[name] = overrides
    return arms


class Ablation:
    """Runs the arms and gathers what they gave.

    Args:
        config: The YAML file that all arms share.
        overrides: Settings KEY=VALUE for all arms.
        evaluation: Arguments of `python -m flextok.evaluation`, without checkpoint and output.
    """

    def __init__(
        self, config: Path, arms: dict[str, dict[str, Any]], seeds: list[int], overrides: list[str],
        evaluation: list[str], folder: Path,
    ):  # fmt: skip
        self.config, self.arms, self.seeds, self.overrides = config, arms, seeds, overrides
        self.evaluation, self.folder = evaluation, folder
        for name in arms:  # every arm is checked before the first one trains
            for seed in seeds:
                self._config(name, seed)

    def _overrides(self, name: str, seed: int) -> list[str]:
        settings = {**self.arms[name], "seed": seed, "use_wandb": False}
        return [*self.overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]

    def _config(self, name: str, seed: int) -> TrainConfig:
        try:
            return load_config(self.config, self._overrides(name, seed))
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from error

    def run(self) -> dict:
        result = {"format": 1, "config": str(self.config), "arms": [], "notes": []}
        for name, overrides in self.arms.items():
            runs = [self._run_arm(name, seed) for seed in self.seeds]
            result["arms"].append({"name": name, "overrides": overrides, "runs": runs})
        write_json(self.folder / "ablation.json", result)
        return result

    def _run_arm(self, name: str, seed: int) -> dict:
        folder = self.folder / re.sub(r"[^\w.=-]+", "_", name) / f"seed{seed}"
        about = {"settings": self._config(name, seed).to_dict(), "evaluation": self.evaluation}
        finished = read_json(folder / "arm.json")
        if finished is not None and finished.pop("about", None) == about:
            log.info("%s, seed %d: finished already", name, seed)
            return finished
        stored = read_json(folder / "about.json")
        if stored is not None and stored["settings"] != about["settings"]:
            raise ConfigError(f"{folder} holds an arm of other settings: give another --output, or delete it")
        write_json(folder / "about.json", about)
        log.info("%s, seed %d: training in %s", name, seed, folder / "run")
        train = [str(TRAINER), "--config", str(self.config), "--run-dir", str(folder / "run"), "--resume", "latest"]
        for override in self._overrides(name, seed):
            train += ["--set", override]
        cost = self._call(train, folder / "train.log", folder / "cost.json")
        log.info("%s, seed %d: evaluation", name, seed)
        evaluate = [
            "-m",
            "flextok.evaluation",
            "--checkpoint",
            str(folder / "run"),
            "--output",
            str(folder / "evaluation"),
        ]
        self._call([*evaluate, *self.evaluation], folder / "evaluation.log")
        results = read_json(folder / "evaluation" / "results.json")
        grids = {grid: str(folder / "evaluation" / path) for grid, path in results["grids"].items()}
        arm = {
            "seed": seed,
            "results": results,
            "curves": read_curves(folder / "run" / "metrics.jsonl"),
            "grids": grids,
            **cost,
        }
        write_json(folder / "arm.json", {**arm, "about": about})
        return arm

    def _call(self, arguments: list[str], output: Path, cost_file: Path | None = None) -> dict:
        """Run Python in a process of its own: seconds and peak memory, summed over the times it was started."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TRAINER.parent), os.environ.get("PYTHONPATH", "")])}
        start, usage = time.perf_counter(), None
        with open(output, "ab") as file:
            process = subprocess.Popen([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=env)
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if usage is None:
                    process.kill()
                    process.wait()
                cost = {"seconds": time.perf_counter() - start, "peak_memory_bytes": 0}
                if usage is not None:
                    cost["peak_memory_bytes"] = usage.ru_maxrss * 1024
                if cost_file is not None:
                    earlier = read_json(cost_file) or {"seconds": 0.0, "peak_memory_bytes": 0}
                    cost["seconds"] += earlier["seconds"]
                    cost["peak_memory_bytes"] = max(cost["peak_memory_bytes"], earlier["peak_memory_bytes"])
                    write_json(cost_file, cost)
        if process.returncode != 0:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{' '.join(arguments[:3])} ended with {process.returncode}: {' '.join(last)} ({output})")
        return cost


def read_curves(path: Path) -> dict:
    """The losses of a metrics.jsonl: lists for the training steps, [step, value] pairs for validation."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record for record in records if "train/flow_loss" in record]
    curves: dict[str, Any] = {"step": [record["step"] for record in steps]}
    for name in CURVES:
        curves[name] = [record.get(name) for record in steps]
        validation = name.replace("train/", "val/")
        curves[validation] = [[r["step"], r[validation]] for r in records if r.get(validation) is not None]
    return curves


def parse_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those among them that are for the evaluation."""
    parser = argparse.ArgumentParser(
        prog="python -m flextok.evaluation.ablation",
        description="Train and evaluate the arms of a comparison, and write one report.",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file that all arms share")
    parser.add_argument("--arms", default="baseline,repa", metavar="ARM,ARM,...",
                        help="baseline, repa, irepa, or settings such as repa_stop=500 or "
                        "name:repa_weight=0.5+repa_lr=1e-3 (default: baseline,repa)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each arm, with seeds 0 to N - 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="a setting for all arms; repeatable")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: ablation/NAME of the config")
    add_options(parser, data_required=False)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds is {arguments.seeds}, expected at least 1")
    options_of(arguments)
    given = argparse.ArgumentParser(add_help=False)
    add_options(given, data_required=False)
    return arguments, _as_arguments(given.parse_known_args(argv)[0])


def _as_arguments(options: argparse.Namespace) -> list[str]:
    """What was given, as a command line."""
    result = []
    for name, value in sorted(vars(options).items()):
        flag = "--" + name.replace("_", "-")
        if value is True:
            result.append(flag)
        elif value is False and name == "norm_guidance":
            result.append("--no-norm-guidance")
        elif value not in (None, False):
            result += [flag, str(value)]
    return result


def main(argv: list[str] | None = None) -> None:
    arguments, evaluation = parse_command_line(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.data is None:
        if config.dataset_name not in ("digits", "photos"):
            raise ConfigError("--data is missing: a folder of images that no arm was trained on")
        evaluation += ["--data", config.dataset_name]
    folder = arguments.output or Path("ablation", arguments.config.stem)
    arms = parse_arms(arguments.arms)
    ablation = Ablation(
        arguments.config, arms, list(range(arguments.seeds)), arguments.overrides, evaluation, folder
    ).run()
    print(console_table(ablation))
    print(f"\n  report   {write_ablation_report(ablation, folder)}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(main)
