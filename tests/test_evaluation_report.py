"""Reports of evaluations and ablations: console tables, plots and self-contained HTML pages from plain dicts."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from flextok.evaluation import ablation_report, report

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Page(HTMLParser):
    """Balanced tags, visible text, and whatever a browser would load or look up."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open, self.texts, self.sources, self.tags = [], [], [], []
        self.feed(self.html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))
        self.plots = {plot.stem for plot in (path.parent / "plots").glob("*.png")}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "data", "poster", "action") and tag != "a":
                self.sources.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def page_of(write, given: dict, folder) -> Page:
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    for name in ("best", "worst"):
        Image.new("RGB", (300, 40), "orange").save(folder / "grids" / f"{name}.png")
    return Page(write(given, folder))


def measure(value, low=None, high=None, n=40, **more):
    return {"value": value, "n": n, "low": low, "high": high, **more}


def results(**parts) -> dict:
    return {
        "format": 2,
        "about": {"checkpoint": "runs/a&b <new>", "model": "small", "data": "photos", "n_images": 40, "img_size": 64,
                  "seed": 7, "inference_steps": 25, "guidance_scale": 1.0, "picture_guidance_scale": 7.5,
                  "perform_norm_guidance": True, "encoder": "dinov2_vits14 at 224 px", "device": "cuda (NVIDIA H100)",
                  "precision": "fp32, products in TF32", "date": "2025-01-02",
                  "averaged_weights": True},
        "reconstruction": {
            "vae": {"psnr": measure(31.25, 30.5, 32.0), "rfid": measure(4.75)},
            "1": {"psnr": measure(14.21, 13.91, 14.51), "rfid": measure(95.5, warning="too few images: 40")},
            "16": {"psnr": measure(22.87, 22.57, 23.17), "rfid": measure(35.25)},
            "4": {"psnr": measure(17.03, 16.73, 17.33), "rfid": measure(60.125)},
        },
        "skipped": {"lpips": "weights of AlexNet are missing"},
        "tokens_warning": None,
        "alignment": {"encoder": "dinov2_vits14", "cosine": measure(0.612, 0.601, 0.623), "constant": 0.374,
                      "mean": 0.298,
                      "layers": [{"layer": 0, "cknna": 0.211}, {"layer": 1, "cknna": 0.342}], "k": 10, "n": 40,
                      "tokens_cknna": 0.157, "aligned_layers": [1]},
        "probes": {"classes": ["cat", "dog"], "n_train": 61, "n_test": 23, "n_unlabelled": 5, "chance": 0.513,
                   "features": {"decoder layer 1": {"knn": 0.715, "linear": 0.826},
                                "tokens, first 1": {"knn": 0.637, "linear": 0.648}}},
        "codes": {"codebook_size": 64000, "n": 40, "used": [33, 38], "entropy_bits": [4.91, 5.22],
                  "perplexity": [30.1, 37.3], "used_overall": 67, "silhouette": {"1": 0.123, "2": None},
                  "silhouette_by": "classes"},
        "grids": {"best": "grids/best.png", "worst": "grids/worst.png"},
        "cost": {"seconds": 83.0, "peak_memory_bytes": 1_650_000_000},
        **parts,
    }  # fmt: skip


NUMBERS = """14.21 13.91 14.51 22.87 17.03 31.25 95.50 35.25 60.12 4.75 0.612 0.601 0.623 0.374 0.298 0.157 71.5 82.6
63.7 64.8 51.3 61 23 67 64000 0.123""".split()


def run(seed=0, shift=0.0, **parts) -> dict:
    found = results()
    for row in found["reconstruction"].values():
        for value in row.values():
            for end in ("value", "low", "high"):
                value[end] = None if value[end] is None else value[end] + shift
    return {"seed": seed, "results": found, "seconds": 100.0 + seed, "peak_memory_bytes": 2e9,
            "grids": {"best": "grids/best.png"},
            "curves": {"step": [1, 2, 3], "train/flow_loss": [1.0, 0.5, 0.25 + shift / 100], "train/repa_loss": [],
                       "val/flow_loss": [[2, 0.6], [3, 0.3 + shift / 100]], "val/repa_loss": []}, **parts}  # fmt: skip


def ablation(baseline, other, **parts) -> dict:
    arms = [{"name": "baseline", "overrides": {}, "runs": baseline},
            {"name": "repa", "overrides": {"use_repa": True, "repa_layers": [1, 5]}, "runs": other}]  # fmt: skip
    return {"format": 2, "config": "configs/a.yaml", "arms": arms, "notes": ["short runs"], **parts}


def verdict(given: dict, name="PSNR, 16 tokens: ") -> str:
    """What the console says of a metric: verdicts after a colon, else its row of the table."""
    lines = [line.strip() for line in ablation_report.console_table(given).splitlines()]
    (found,) = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return found


# One evaluation


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return page_of(report.write_report, results(), tmp_path_factory.mktemp("page"))


def test_every_number_is_in_the_console_and_on_the_page(page):
    console = report.console_table(results())
    for number in [*NUMBERS, "0.211", "0.342", "by classes", "guidance 1, 25 steps", "biased estimate",
                   "5 test images without a class are left out"]:  # fmt: skip
        assert number in console, number
        assert number in page.text, number
    for said in ("runs/a&b <new>", "small", "photos", "dinov2_vits14 at 224 px", "fp32, products in TF32", "2025-01-02",
                 "cuda (NVIDIA H100)", "seed 7", "Drawn with guidance 7.5", "16 tokens, guidance 1, 25 steps",
                 "It is the biased estimate", "Only what exceeds that is alignment",
                 "1 min 23 s", "1.65 GB", "too few images: 40", *"33 38 4.91 5.22 30.1 37.3".split()):  # fmt: skip
        assert said in page.text, said
    assert "PSNR [dB] ↑" in page.text and "rFID ↓" in page.text and "It favours blur" in page.text


# Arms against each other


def three_seeds(*shifts) -> list:
    return [run(seed, shift) for seed, shift in enumerate(shifts)]


def test_beyond_the_spread_is_better_or_worse_and_within_it_no_difference_is_shown():
    baseline, up = three_seeds(0.0, 0.1, -0.1), three_seeds(1.01, 1.1, 0.89)
    assert verdict(ablation(baseline, up)).startswith("repa better: higher by 1.00 dB, beyond the spread over seeds")
    assert verdict(ablation(up, baseline)).startswith("repa worse: lower by 1.00 dB")
    assert verdict(ablation(baseline, up), "rFID, 16 tokens: ").startswith("repa worse: higher by")
    said = verdict(ablation(three_seeds(0.0, 0.5, -0.5), three_seeds(0.45, -0.45, 0.15)))
    assert "higher by 0.05 dB, within the spread over seeds" in said and said.endswith("no difference shown.")


def test_difference_is_paired_over_the_seeds_that_both_have():
    paired = ablation(three_seeds(1.0, 5.0, 9.0), three_seeds(1.5, 5.7, 9.6))
    assert "higher by 0.60 dB" in verdict(paired) and "+0.60 ± 0.10" in verdict(paired, "PSNR, 16 tokens [dB]")
    assert "+0.35 to +0.85; 3 seeds, paired" in verdict(paired)  # 0.6 +- 4.303 * 0.1 / sqrt(3)


def test_one_seed_never_says_better():
    near, far = ablation([run()], [run(0, 0.1)]), ablation([run()], [run(0, 5.0)])
    assert "with one seed" in verdict(near) and "intervals over images overlap: no difference shown." in verdict(near)
    assert "do not overlap: these two models differ, but another seed may not show it." in verdict(far)


def test_ablation_page_holds_the_numbers(tmp_path):
    given = ablation([run(0), run(1, 0.2)], [run(0, 1.0), run(1, 1.2)])
    given["arms"][1]["runs"][1]["results"]["skipped"] = {"cknna of tokens": "all the same"}
    curves = {"step": list(range(20)), "train/flow_loss": [1.0] * 18 + [0.25, 0.75], "train/repa_loss": [None] * 20,
              "val/flow_loss": [[5, 0.5], [19, 0.375]], "val/repa_loss": []}  # fmt: skip
    for one in given["arms"][0]["runs"]:
        one["curves"] = curves
    page = page_of(ablation_report.write_ablation_report, given, tmp_path)
    console = ablation_report.console_table(given)
    assert "flow loss, training (mean of the last tenth) ↓ 0.5000 " in page.text
    assert "flow loss, validation (last) ↓ 0.3750 " in page.text
    assert '<span class="good">repa better' in page.html
    for said in ("22.97 ± 0.14", "23.97 ± 0.14", "+1.00 ± 0.00", "82.6 ± 0.0", "use_repa=true, repa_layers=[1, 5]",
                 "2.00 GB", "1.00x", "1 min 40 s ± 0.7 s", "short runs", "too few images: 40 [all runs]",
                 "40 images of photos, 64 px; reconstructions with guidance 1, 25 steps, pictures with guidance 7.5; "
                 "encoder dinov2_vits14 at 224 px; fp32, products in TF32 on cuda (NVIDIA H100) [all runs]",
                 "a cosine of 0.374 needs no look at the image: the best constant at each position (0.298: one",
                 "cknna of tokens: all the same [repa, seed 1]"):  # fmt: skip
        assert said in page.text and said in console, said
    assert page.text.count("seed 0") >= 4 and all(source.startswith("data:") for source in page.sources)
    expected = {"train_flow_loss", "val_flow_loss", "psnr", "rfid", "cknna", "used", "entropy_bits"}
    assert page.plots == expected and page.tags.count("svg") == 7


def test_a_metric_without_an_explanation_is_shown_by_its_name(tmp_path):
    given, other = run(), run(0, 1.0)
    for one in (given, other):
        for row in one["results"]["reconstruction"].values():
            row["dists"] = dict(row["psnr"])
        for scores in one["results"]["probes"]["features"].values():
            scores["attentive"] = 0.912
    compared = ablation([given], [other])
    for text in (
        report.console_table(given["results"]),
        page_of(report.write_report, given["results"], tmp_path).text,
        ablation_report.console_table(compared),
        page_of(ablation_report.write_ablation_report, compared, tmp_path).text,
    ):
        assert "dists" in text and "22.8700" in text and "attentive" in text and re.search(r"91\.2 %|0\.912", text)
    seeds = ablation([run(0), run(1)], [run(0, 1.0), run(1, 1.0)])
    for one in (one for arm in seeds["arms"] for one in arm["runs"]):
        one["results"]["reconstruction"]["16"] = {
            "psnr": measure(20.0),
            "dists": one["results"]["reconstruction"]["16"]["psnr"],
        }
    assert "better is not known" in verdict(seeds, "dists, 16 tokens: ")


def test_names_of_arms_are_in_the_legends_as_they_were_given(tmp_path):
    given = ablation([run()], [run(0, 1.0)])
    names = ["_plain", "lr_$1e-3$_and_$2$"]
    for arm, name in zip(given["arms"], names):
        arm["name"] = name
    page = page_of(ablation_report.write_ablation_report, given, tmp_path)
    plots = re.findall(r"<svg.*?</svg>", page.html, flags=re.S)
    assert len(plots) == len(page.plots) and all(f">{name}</text>" in plot for plot in plots for name in names)


def test_memory_that_is_not_known_is_a_dash(tmp_path):
    given = ablation([run(peak_memory_bytes=None)], [run(), run(1, peak_memory_bytes=None)])
    baseline, repa = ablation_report.cost_table(given["arms"])[1:]
    assert baseline[-2:] == ["–", "–"] and repa[-2:] == ["2.00 GB", "–"]
