"""`python -m flextok.evaluation --checkpoint RUN --data FOLDER`: metrics, plots and a report of one model."""

import argparse
import dataclasses
import logging
import re
from pathlib import Path

from ..utils.config import ConfigError
from ..utils.devices import chosen_device
from ..utils.errors import run_command
from .evaluate import Evaluator, Options
from .report import console_table, write_report
from .subjects import load_images, load_subject


def add_options(parser: argparse.ArgumentParser, data_required: bool = True) -> None:
    """The options that an evaluation alone and an ablation share."""
    images = "folder, `digits`, `photos`, or a config file, of which the validation images"
    parser.add_argument("--data", required=data_required, metavar="FOLDER", help=images)
    parser.add_argument("--n-images", type=int, metavar="N", help="images at most (default: all; photos: 256)")
    parser.add_argument("--tokens", metavar="K,K,...", help="token counts (default: powers of two up to the model's)")
    parser.add_argument("--encoder", metavar="NAME", help="for Frechet distance and CKNNA: any repa_encoder_type "
                        "(default: dinov2_vitl14, or efficientnet_lite0 where that cannot be had)")  # fmt: skip
    parser.add_argument("--encoder-weights", metavar="FILE", help="its weights, for machines without network")
    parser.add_argument("--encoder-image-size", type=int, metavar="PX", help="side of its images (default: its own)")
    parser.add_argument("--inference-steps", type=int, metavar="N", help="sampler steps (default: the training's, 25)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="of all reconstructions (default: metrics "
                        "the training's psnr_guidance_scale, else 1; grids its guidance_scale, else 7.5)")  # fmt: skip
    parser.add_argument("--norm-guidance", action=argparse.BooleanOptionalAction, default=None,
                        help="adaptive projected guidance (default: the training's, else yes)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per pass (default: 16)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that load images")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--bf16", action="store_const", dest="precision", const="bf16", default="fp32",
                        help="model (autocast) and encoder in bf16, else in fp32")  # fmt: skip
    parser.add_argument("--fp32", action="store_const", dest="precision", const="fp32", help="the default")


def options_of(arguments: argparse.Namespace) -> Options:
    """How to evaluate, from the command line; raises ConfigError."""
    tokens = None
    if arguments.tokens is not None:
        if not re.fullmatch(r"\d+(,\d+)*", arguments.tokens):
            raise ConfigError(f"--tokens is {arguments.tokens!r}, expected numbers with commas, e.g. 1,4,16")
        tokens = [int(k) for k in arguments.tokens.split(",")]
    for name in ("n_images", "inference_steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    given = {**vars(arguments), "tokens": tokens, "device": str(chosen_device(arguments.device))}
    return Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})


def default_folder(checkpoint: str) -> Path:
    """`evaluation` in a run folder, else `evaluation/NAME`."""
    path = Path(checkpoint).expanduser()
    if (path / "checkpoints").is_dir():
        return path / "evaluation"
    return Path("evaluation", re.sub(r"[^\w.-]+", "_", checkpoint).strip("_."))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flextok.evaluation",
        description="Evaluate a FlexTok model: reconstruction by token count, alignment, codes; writes report.html.",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint, export, .safetensors or Hub name")
    parser.add_argument("--raw", action="store_true", help="a checkpoint's weights as trained, not their average")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: `evaluation` in the run, or evaluation/NAME"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")
    add_options(parser)
    arguments = parser.parse_args(argv)
    options = options_of(arguments)
    subject = load_subject(arguments.checkpoint, averaged=not arguments.raw)
    images = load_images(arguments.data, subject.img_size, arguments.n_images)
    folder = arguments.output or default_folder(arguments.checkpoint)
    results = Evaluator(subject, images, options, folder).run()
    print(console_table(results))
    report = write_report(results, folder)
    if arguments.wandb is not None:
        log_to_wandb(arguments.wandb, results, folder)
    print(f"\n  results  {folder / 'results.json'}\n  report   {report}")


def log_to_wandb(project: str, results: dict, folder: Path) -> None:
    """One W&B run with the metrics by token count and the grids."""
    import wandb

    run = wandb.init(project=project, job_type="evaluation", config=results["about"], dir=folder)
    for k, row in results["reconstruction"].items():
        if k.isdecimal():
            run.log({"eval/tokens": int(k), **{f"eval/{name}": metric["value"] for name, metric in row.items()}})
    run.log({f"eval/grid_{name}": wandb.Image(str(folder / path)) for name, path in results["grids"].items()})
    run.finish()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    run_command(main)
