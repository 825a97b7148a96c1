"""Make a model for `FlexTokFromHub.from_pretrained` out of a training checkpoint.

python -m flextok.training.export runs/NAME/checkpoints/best.pt my_model
"""

import argparse
import sys
from pathlib import Path

from ..flextok_wrapper import build_model
from ..utils.checkpoint import CheckpointError
from ..utils.errors import UserError
from .checkpoints import read_checkpoint


def load_trained_model(path: Path, averaged: bool = True):
    """The model of a training checkpoint, in evaluation mode on the CPU; `averaged`: its EMA weights if it has any.

    Raises:
        FileNotFoundError, CheckpointError: Not there, unreadable, or without the model's config.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("model_config") is None:
        raise CheckpointError(f"{path} has no model_config")
    weights = checkpoint.get("ema_model_state_dict") if averaged else None
    return build_model(checkpoint["model_config"], weights or checkpoint["model_state_dict"], str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training checkpoint as config.json and model.safetensors.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--raw", action="store_true", help="the weights as trained, not their moving average")
    arguments = parser.parse_args()
    try:
        load_trained_model(arguments.checkpoint, averaged=not arguments.raw).save_pretrained(arguments.folder)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"exported to {arguments.folder}")


if __name__ == "__main__":
    main()
