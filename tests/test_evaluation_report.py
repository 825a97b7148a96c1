"""Reports of evaluations and ablations: tables, plots and self-contained HTML pages from plain dicts."""

import base64
import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from flextok.evaluation import ablation_report, report

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Page(HTMLParser):
    """Balanced tags, visible text, and whatever a browser would load."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.texts, self.sources, self.links, self.tags = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("src", "srcset", "href", "data", "poster", "action"):
                self.sources.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def measure(value, low=None, high=None, n=40, **more):
    return {"value": value, "n": n, "low": low, "high": high, **more}


def results(**parts) -> dict:
    return {
        "format": 1,
        "about": {"checkpoint": "runs/a", "model": "small", "data": "photos", "n_images": 40, "img_size": 64,
                  "seed": 7, "inference_steps": 25, "guidance_scale": 7.5, "perform_norm_guidance": True,
                  "encoder": "dinov2_vits14 at 224 px", "device": "cpu", "dtype": "fp32", "date": "2025-01-02",
                  "averaged_weights": True},
        "reconstruction": {
            "vae": {"psnr": measure(31.25, 30.5, 32.0), "rfid": measure(4.75)},
            "1": {"psnr": measure(14.21, 13.91, 14.51), "rfid": measure(95.5, warning="too few images: 40")},
            "16": {"psnr": measure(22.87, 22.57, 23.17), "rfid": measure(35.25, n=39)},
            "4": {"psnr": measure(17.03, 16.73, 17.33), "rfid": measure(60.125)},
        },
        "skipped": {"lpips": "weights of AlexNet are missing"},
        "alignment": {"encoder": "dinov2_vits14", "cosine": measure(0.612, 0.601, 0.623), "constant": 0.374,
                      "layers": [{"layer": 0, "cknna": 0.211}, {"layer": 1, "cknna": 0.342}], "k": 10, "n": 40,
                      "tokens_cknna": 0.157, "aligned_layers": [1]},
        "probes": {"classes": ["cat", "dog"], "n_train": 61, "n_test": 23, "chance": 0.513,
                   "features": {"decoder layer 1": {"knn": 0.715, "linear": 0.826},
                                "tokens, first 1": {"knn": 0.637, "linear": 0.648}}},
        "codes": {"codebook_size": 64000, "n": 40, "used": [33, 38], "entropy_bits": [4.91, 5.22],
                  "perplexity": [30.1, 37.3], "used_overall": 67, "silhouette": {"1": 0.123, "2": None},
                  "silhouette_by": "classes"},
        "grids": {"best": "grids/best.png", "worst": "grids/worst.png"},
        "cost": {"seconds": 83.0, "peak_memory_bytes": 1_650_000_000},
        **parts,
    }  # fmt: skip


NUMBERS = """14.21 13.91 14.51 22.87 17.03 31.25 95.50 35.25 60.12 4.75 0.612 0.601 0.623 0.374 0.157 71.5 82.6
63.7 64.8 51.3 61 23 67 64000 0.123""".split()


def save_grids(folder, names=("best", "worst")):
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (300, 40), "orange").save(folder / "grids" / f"{name}.png")


def run(seed=0, shift=0.0, **parts) -> dict:
    found = results()
    for row in found["reconstruction"].values():
        for value in row.values():
            for end in ("value", "low", "high"):
                value[end] = None if value[end] is None else value[end] + shift
    return {"seed": seed, "results": found, "seconds": 100.0 + seed, "peak_memory_bytes": 2e9,
            "grids": {"median": "grids/best.png"},
            "curves": {"step": [1, 2, 3], "train/flow_loss": [1.0, 0.5, 0.25 + shift / 100],
                       "val/flow_loss": [[2, 0.6], [3, 0.3 + shift / 100]]}, **parts}  # fmt: skip


def ablation(baseline, other, **parts) -> dict:
    arms = [{"name": "baseline", "overrides": {}, "runs": baseline},
            {"name": "repa", "overrides": {"use_repa": True, "repa_layers": [1, 5]}, "runs": other}]  # fmt: skip
    return {"format": 1, "config": "configs/a.yaml", "arms": arms, "notes": ["short runs"], **parts}


def psnr_verdict(given: dict, name="PSNR, 16 tokens") -> ablation_report.Verdict:
    row = next(row for row in ablation_report.final_rows(given) if row.name == name)
    return ablation_report.verdict(row, 1, [arm["name"] for arm in given["arms"]])


# One evaluation


def test_every_number_is_in_the_console_and_on_the_page(tmp_path):
    save_grids(tmp_path)
    page = read(report.write_report(results(), tmp_path))
    console = report.console_table(results())
    for number in [*NUMBERS, "0.211", "0.342", "n=39"]:
        assert number in console, number
        assert number in page.text, number
    for number in "33 38 4.91 5.22 30.1 37.3".split():
        assert number in page.text, number
    for setting in ("runs/a", "small", "photos", "25", "7.5", "dinov2_vits14 at 224 px", "fp32", "2025-01-02", "seed 7",
                    "1 min 23 s", "1.65 GB", "too few images: 40"):  # fmt: skip
        assert setting in page.text, setting


def test_rows_are_ascending_with_the_vae_last():
    lines = report.console_table(results()).splitlines()
    first_words = [line.split()[0] for line in lines if re.match(r"(\d+|vae) +40 ", line)]
    assert first_words == ["1", "4", "16", "vae"]


def test_headline_says_what_the_numbers_say():
    assert report.headline(results()).startswith("PSNR rises from 14.21 dB with 1 token to 22.87 dB with 16;")
    assert "31.25 dB" in report.headline(results())
    falling = {"1": {"psnr": measure(20.0)}, "2": {"psnr": measure(19.0)}}
    assert "more tokens are worse" in report.headline(results(reconstruction=falling))
    lower = {"1": {"lpips": measure(0.5)}, "2": {"lpips": measure(0.4)}}
    assert report.headline(results(reconstruction=lower)) == "LPIPS falls from 0.500 with 1 token to 0.400 with 2."
    overlap = {"1": {"psnr": measure(20.0, 19, 21)}, "2": {"psnr": measure(20.5, 19.5, 21.5)}}
    assert "no clear difference" in report.headline(results(reconstruction=overlap))
    peak = {str(n): {"psnr": measure(value)} for n, value in ((1, 10.0), (2, 30.0), (4, 20.0))}
    assert "best with 2: 30.00 dB" in report.headline(results(reconstruction=peak))
    assert report.headline(results(reconstruction={})) == "No reconstruction metric has a value."


def test_plots_hold_what_the_results_hold(tmp_path):
    plots = report.write_plots(results(), tmp_path)
    assert set(plots) == {"psnr", "rfid", "cknna", "used", "entropy_bits"}
    for path in plots.values():
        assert Image.open(path).width >= 800
    bare = results(reconstruction={}, alignment=None, codes=None)
    assert report.write_plots(bare, tmp_path / "bare") == {}


def test_the_page_loads_nothing_from_outside(tmp_path):
    save_grids(tmp_path)
    page = read(report.write_report(results(), tmp_path))
    assert len(page.sources) == 7 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for source in page.sources:
        assert base64.b64decode(source.split(",")[1], validate=True).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(re.match(r"https://(arxiv\.org/abs|doi\.org)/", link) for link in page.links) and page.links
    assert "@import" not in report.CSS and "url(" not in report.CSS


def test_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    given = results(skipped={evil: evil}, grids={evil: f"{evil}.png"})
    given["about"].update(checkpoint=evil, model=evil)
    given["alignment"]["encoder"] = given["codes"]["silhouette_by"] = evil
    given["probes"] = {**given["probes"], "classes": [evil], "features": {evil: {"knn": 0.5, "linear": 0.5}}}
    given["reconstruction"]["1"]["psnr"]["warning"] = evil
    page = read(report.write_report(given, tmp_path))
    assert "script" not in page.tags and page.text.count(evil) >= 8
    compared = ablation([run(results=given)], [run()], notes=[evil], config=evil)
    compared["arms"][1].update(name=evil, overrides={evil: evil})
    page = read(ablation_report.write_ablation_report(compared, tmp_path / "ablation"))
    assert "script" not in page.tags and page.text.count(evil) >= 6


def test_missing_parts_are_named(tmp_path):
    given = results(probes=None, alignment=None, codes=None, grids={}, cost={})
    given["skipped"]["probes"] = "the images have no classes"
    del given["reconstruction"]["1"]["rfid"]
    texts = [report.console_table(given), read(report.write_report(given, tmp_path)).text]
    for text in texts:
        for said in ("the images have no classes", "weights of AlexNet are missing",
                     "use of the codes", "alignment with the vision encoder", "pictures", "SSIM",
                     "latent MSE", "FD", "not computed"):  # fmt: skip
            assert said in text, said
        assert re.search(r"probes \(classes from frozen features\)\s+the images have no classes", text)
    page = read(report.write_report(results(), tmp_path / "no_grids"))
    assert "grids/best.png" in page.text and "is missing" in page.text


def test_a_metric_that_nobody_knows_is_shown_under_its_key():
    given = results(reconstruction={"1": {"my_metric": measure(0.125)}})
    assert "my_metric" in report.console_table(given) and "0.1250" in report.console_table(given)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_missing_numbers_are_dashes(tmp_path, nothing):
    given = results(reconstruction={"1": {"psnr": measure(nothing, nothing, nothing)}})
    given["alignment"].update(
        cosine=None, constant=nothing, tokens_cknna=nothing, layers=[{"layer": 0, "cknna": nothing}]
    )
    given["probes"]["features"] = {"decoder layer 1": {"knn": nothing, "linear": nothing}}
    given["codes"].update(used=[nothing], entropy_bits=[nothing], perplexity=[nothing], silhouette={"1": nothing})
    given["cost"] = {"seconds": nothing, "peak_memory_bytes": nothing}
    console, page = report.console_table(given), read(report.write_report(given, tmp_path))
    assert not re.search(r"\b(nan|None)\b", console + page.text)
    assert re.search(r"^1 +40 +–$", console, re.M) and "cosine of a constant prediction  –" in console
    assert report.write_plots(given, tmp_path) == {}


def test_one_image_and_one_token_count(tmp_path):
    warning = "psnr of 1 image: use more"
    given = results(reconstruction={"4": {"psnr": measure(17.0, n=1, warning=warning)}}, codes=None)
    page = read(report.write_report(given, tmp_path))
    assert page.text.count(warning) == 1 and "PSNR is 17.00 dB with 4 tokens." in page.text
    assert (tmp_path / "plots" / "psnr.png").is_file()


def test_numbers_are_rounded_but_never_to_nothing():
    assert report.number(14.205, 1) == "14.2"
    assert report.number(0.00004, 2) == "4e-05"
    assert report.number(-0.0, 2, sign=True) == "+0.00"
    assert report.number(1e-15, 2) == "0.00"
    assert report.number(math.inf) == report.DASH
    assert report.duration(8000) == "2 h 13 min" and report.size(3e6) == "3 MB"


# Arms against each other


def test_beyond_the_spread_is_better_or_worse():
    baseline = [run(seed, shift) for seed, shift in enumerate((0.0, 0.1, -0.1))]
    up = [run(seed, shift + 1) for seed, shift in enumerate((0.01, 0.1, -0.11))]
    verdict = psnr_verdict(ablation(baseline, up))
    assert verdict.kind == "better"
    assert verdict.text.startswith("repa better: higher by 1.00 dB, beyond the spread over seeds")
    verdict = psnr_verdict(ablation(up, baseline))
    assert verdict.kind == "worse" and verdict.text.startswith("repa worse: lower by 1.00 dB")
    assert psnr_verdict(ablation(baseline, up), "rFID, 16 tokens").kind == "worse"  # higher is worse


def test_within_the_spread_no_difference_is_shown():
    baseline = [run(seed, shift) for seed, shift in enumerate((0.0, 0.5, -0.5))]
    other = [run(seed, shift + 0.05) for seed, shift in enumerate((0.4, -0.5, 0.1))]
    verdict = psnr_verdict(ablation(baseline, other))
    assert verdict.kind == "same" and "higher by 0.05 dB, within the spread over seeds" in verdict.text
    assert verdict.text.endswith("no difference shown.")
    assert psnr_verdict(ablation(baseline, copy.deepcopy(baseline))).kind == "same"


def test_two_seeds_that_agree_by_chance_are_not_enough():
    verdict = psnr_verdict(ablation([run(0), run(1)], [run(0, 0.2), run(1, 0.3)]))
    assert verdict.kind == "same"  # 0.25 +- 12.7 * 0.07 / sqrt(2)


def test_difference_is_paired_where_seeds_are_shared():
    first, arm = {0: 1.0, 1: 5.0, 2: 9.0}, {0: 1.5, 1: 5.7, 2: 9.6}
    paired = ablation_report.difference(first, arm)
    assert (paired.mean, paired.std) == (pytest.approx(0.6), pytest.approx(0.1))
    assert paired.margin == pytest.approx(4.303 * 0.1 / 3**0.5)
    apart = ablation_report.difference(first, {seed + 10: value for seed, value in arm.items()})
    assert apart.mean == pytest.approx(0.6) and apart.margin > 10
    assert ablation_report.difference(first, {}) is None


def test_one_seed_never_says_better():
    given = ablation([run()], [run(0, 0.1)])
    verdict = psnr_verdict(given)
    assert verdict.kind == "same" and "one seed" in verdict.text and "intervals over images overlap" in verdict.text
    verdict = psnr_verdict(ablation([run()], [run(0, 5.0)]))
    assert verdict.kind == "open" and "another seed may not show it" in verdict.text
    assert psnr_verdict(ablation([run()], [run(0, 5.0)]), "rFID, 16 tokens").kind == "open"
    for text in (ablation_report.console_table(given), ablation_report.markdown_table(given)):
        assert "no spread over seeds" in text and "±" not in text


def test_a_curve_ends_with_its_last_validation_or_the_mean_of_its_last_tenth():
    values = [1.0] * 18 + [0.25, 0.75]
    curves = {"step": list(range(20)), "train/flow_loss": values, "val/flow_loss": [[5, 0.5], [19, 0.375], [20, None]]}
    assert ablation_report.final_value({"curves": curves}, "train/flow_loss").value == 0.5
    assert ablation_report.final_value({"curves": curves}, "val/flow_loss").value == 0.375


def test_a_loss_that_no_arm_has_is_not_drawn():
    curves = {"step": [1, 2], "train/flow_loss": [1.0, 0.5], "train/repa_loss": [None, None], "val/repa_loss": []}
    given = ablation([run(curves=curves)], [run(curves=curves)])
    assert ablation_report.curve_keys(given) == ["train/flow_loss"]


def test_pictures_of_arms_say_whether_they_show_the_same_images(tmp_path):
    save_grids(tmp_path)
    ranked = ablation([run()], [run()])
    fixed = ablation([run(grids={"first": "grids/best.png"})], [run(grids={"first": "grids/worst.png"})])
    texts = [read(ablation_report.write_ablation_report(given, tmp_path)).text for given in (ranked, fixed)]
    assert "arms may show other images" in texts[0] and "The same images and noise" not in texts[0]
    assert "The same images and noise in every arm." in texts[1]


def test_what_one_arm_lacks_is_said():
    bare = run(results={**results(), "reconstruction": {}, "probes": None}, curves={}, grids={})
    del bare["results"]["grids"]
    given = ablation([run()], [bare])
    assert psnr_verdict(given).text == "repa not compared: no value for repa."
    console = ablation_report.console_table(given)
    for said in ("curves: not recorded", "pictures: not recorded", "reconstruction metrics: not computed"):
        assert f"{said} [repa, seed 0]" in console, said


def test_ablation_page_holds_the_numbers(tmp_path):
    save_grids(tmp_path, ["best"])
    given = ablation([run(0), run(1, 0.2)], [run(0, 1.0), run(1, 1.2)])
    path = ablation_report.write_ablation_report(given, tmp_path)
    page, console = read(path), ablation_report.console_table(given)
    markdown = ablation_report.markdown_table(given)
    for number in ("22.97 ± 0.14", "23.97 ± 0.14", "+1.00 ± 0.00", "0.3010 ± 0.0014", "82.6 ± 0.0"):
        for text in (page.text, console, markdown):
            assert number in text, number
    for said in ("use_repa=true, repa_layers=[1, 5]", "2.00 GB", "1.00x", "1 min 40 s ± 0.7 s", "short runs",
                 "all runs", "17.13 ± 0.14", "Two seeds show only very large differences"):  # fmt: skip
        assert said in page.text or said in console, said
    assert "17.13 ± 0.14" in page.text  # counts between the fewest and the most
    assert page.text.count("seed 0") >= 2 and all(source.startswith("data:") for source in page.sources)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "train_flow_loss", "val_flow_loss", "psnr", "rfid", "cknna"
    }  # fmt: skip


def test_markdown_is_a_table_whatever_the_names():
    given = ablation([run()], [run()])
    given["arms"][1]["name"] = "a|b"
    lines = [line for line in ablation_report.markdown_table(given).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and len(lines) > 10


def test_ablation_of_almost_nothing(tmp_path):
    empty = {"seed": 0, "results": None, "curves": {}, "seconds": None, "peak_memory_bytes": None, "grids": {}}
    nan = run(1, curves={"step": [1], "train/flow_loss": [math.nan], "val/flow_loss": []})
    for i, given in enumerate((ablation([empty], []), ablation([nan], [empty]), ablation([run()], [run()]))):
        given["arms"] = given["arms"][: 1 if i == 2 else 2]
        page = read(ablation_report.write_ablation_report(json.loads(json.dumps(given)), tmp_path / str(i)))
        assert not re.search(r"\b(nan|None)\b", page.text + ablation_report.console_table(given))
    assert "repa: no runs" in read(tmp_path / "0" / "report.html").text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"arms": []}, "expected at least one"),
        ({"arms": [{"name": "a", "runs": []}, {"name": "a", "runs": []}]}, "each with its own name"),
        ({"arms": [{"name": "a", "runs": [{"seed": 3}, {"seed": 3}]}]}, r"'a' has runs with seeds \[3, 3\]"),
    ],
)
def test_wrong_ablations_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ablation_report.write_ablation_report({**ablation([run()], [run()]), **change}, tmp_path)
