"""Images that come without a download: scikit-learn's digits and rendered emoji; folders too small for validation."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flextok.data import openmoji
from flextok.data.digits import Digits
from flextok.data.sources import build_datasets
from flextok.training.config import TrainConfig
from flextok.utils.config import ConfigError


def datasets(**settings):
    return build_datasets(TrainConfig.from_dict({"num_workers": 0, **settings}))


def test_digits_are_those_of_scikit_learn_each_once():
    train, val = Digits("train", 8), Digits("val", 8)
    assert (len(train), len(val)) == (1500, 297)
    grey = np.concatenate([train.pixels, val.pixels])[..., 0]
    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, grey)) == sorted(map(bytes, expected))
    numbers = [int(name.split()[1]) for name in train.names + val.names]
    assert sorted(numbers) == list(range(1797))
    assert train.labels == load_digits().target[numbers[:1500]].tolist() and train.classes == list("0123456789")


@pytest.mark.parametrize("img_size", [7, 65])
def test_sizes_that_digits_cannot_fill_are_refused(img_size):
    with pytest.raises(ConfigError, match=f"img_size is {img_size}.*8x8 pixels: expected 8 to 64, e.g. 16"):
        datasets(dataset_name="digits", img_size=img_size)


def write_images(folder, n: int):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (20, 20), (i * 10, 0, 0)).save(folder / f"{i}.png")


def test_a_folder_too_small_for_validation_is_refused_with_advice(tmp_path):
    write_images(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match="holds 1 image: too few to keep one for validation.*val_fraction: 0"):
        datasets(data_path=str(tmp_path / "one"), img_size=16)
    train, val = datasets(data_path=str(tmp_path / "one"), img_size=16, val_fraction=0.0)
    assert len(train) == 1 and val is None


def test_variants_of_an_emoji_have_one_base_which_is_on_one_side_of_the_split():
    base = openmoji.base_emoji
    assert base("1F44B-1F3FB") == base("1F44B") == "1F44B" and base("1F600") != base("1F601")
    assert base("1F468-1F3FF-200D-1F9B0") == base("1F469-200D-1F9B0") == base("1F9D1-1F3FB-200D-1F9B0")
    assert base("1F3C3-200D-2640-FE0F") == base("1F3C3-1F3FC-200D-2642-FE0F") == "1F3C3"
    codes = [f"{base:X}{tone}" for base in range(0x1F400, 0x1F464) for tone in ("", "-1F3FB", "-1F3FF")]
    train, val = openmoji.split_codes(codes)
    assert sorted(train + val) == sorted(codes) and len(val) == 30
    assert not {code[:5] for code in train} & {code[:5] for code in val}
