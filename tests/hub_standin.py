"""A stand-in for DINOv2's torch.hub repository: the real entry names, widths, patch size and weight files, and models
of one convolution. It goes through the real torch.hub, in the layout of its cache. And a cached file of the Hugging
Face Hub."""

import io
import zipfile
from email.message import Message
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors.torch import save_file

FOLDER = "facebookresearch_dinov2_main"

HUBCONF = """
import warnings

import torch
from torch import nn

dependencies = ["torch"]

WIDTHS = {"dinov2_vits14": 384, "dinov2_vitb14": 768, "dinov2_vitl14": 1024, "dinov2_vitg14": 1536}


class TinyViT(nn.Module):
    def __init__(self, width, num_registers):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 14, stride=14)
        self.norm = nn.LayerNorm(width)
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))

    def forward_features(self, images):
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        return {"x_prenorm": tokens, "x_norm_patchtokens": self.norm(tokens)}


def _entry(backbone, num_registers):
    def build(*, pretrained=True):
        warnings.warn("xFormers is not available (Attention)")
        model = TinyViT(WIDTHS[backbone], num_registers)
        if pretrained:
            file = backbone + ("_reg4" if num_registers else "") + "_pretrain.pth"
            url = f"https://dl.fbaipublicfiles.com/dinov2/{backbone}/{file}"
            model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
        return model

    return build


for _backbone in WIDTHS:
    globals()[_backbone] = _entry(_backbone, 0)
    globals()[_backbone + "_reg"] = _entry(_backbone, 4)
"""


def write_repository(folder: Path) -> Path:
    """Write the repository into `folder`, e.g. `hub_dir / FOLDER`."""
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def make_weights(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that the stand-in's model `name` loads."""
    namespace: dict = {}
    exec(HUBCONF, namespace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = namespace["TinyViT"](namespace["WIDTHS"][name.removesuffix("_reg")], 4 * name.endswith("_reg"))
        return model.state_dict()


def weights_file(name: str) -> str:
    """The published file name of a model's weights."""
    return name.replace("_reg", "_reg4") + "_pretrain.pth"


def write_weights(hub_dir: Path, name: str, seed: int = 0) -> Path:
    """Write weights to where torch.hub caches them."""
    path = hub_dir / "checkpoints" / weights_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(make_weights(name, seed), path)
    return path


class FakeServers:
    """What GitHub and the weights server answer to `urlopen`: the zipped repository, and weights of seed 0.

    Only the URLs that the real ones have are answered; all that is asked for is kept in `requests`.
    """

    def __init__(self, name: str, revision: str = "main"):
        self.requests: list[str] = []
        archive, weights = io.BytesIO(), io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("facebookresearch-dinov2-0123abc/", "")
            file.writestr("facebookresearch-dinov2-0123abc/hubconf.py", HUBCONF)
        torch.save(make_weights(name), weights)
        weights_url = f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{weights_file(name)}"
        self.answers = {
            f"https://github.com/facebookresearch/dinov2/zipball/{revision}": archive.getvalue(),
            weights_url: weights.getvalue(),
        }

    def urlopen(self, request):
        url = request if isinstance(request, str) else request.full_url
        self.requests.append(url)
        if url not in self.answers:
            raise URLError(f"no such page: {url}")
        response = io.BytesIO(self.answers[url])
        response.info = Message
        return response


def write_hf_weights(
    hub_cache: Path, repository: str, state: dict[str, torch.Tensor], revision: str = "main", sha: str = "0" * 40
) -> Path:
    """Write weights into a cache of the Hugging Face Hub, as a download of `revision` leaves them; the snapshot's file.

    Without links to blobs: the cache of a file system that has none.
    """
    folder = hub_cache / ("models--" + repository.replace("/", "--"))
    path = folder / "snapshots" / sha / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    if revision != sha:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(sha)
    return path
