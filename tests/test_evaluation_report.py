"""Reports of evaluations and ablations: console tables, plots and self-contained HTML pages from plain dicts."""

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
    """Balanced tags, visible text, and whatever a browser would load or look up."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open, self.texts, self.sources, self.links, self.tags, self.ids = [], [], [], [], [], []
        self.references = set(re.findall(r"url\(#([^)]*)\)", self.html))
        self.feed(self.html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)) and self.references <= set(self.ids)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))
        self.plots = {plot.stem for plot in (path.parent / "plots").glob("*.png")}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name == "id":
                self.ids.append(value)
            elif name == "xlink:href" and value.startswith("#"):
                self.references.add(value[1:])
            elif name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
                self.sources.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def ticks(self, metric: str) -> list[float]:
        """The numbers on the axes of a plot."""
        (svg,) = re.findall(rf'aria-label="Plot of {metric}">(.*?)</svg>', self.html, re.S)
        return [float(text) for text in re.findall(r">(-?\d+(?:\.\d+)?)</text>", svg)]


def page_of(results: dict, folder) -> Page:
    return Page(report.write_report(results, folder))


def ablation_page_of(ablation: dict, folder) -> Page:
    return Page(ablation_report.write_ablation_report(ablation, folder))


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


def verdict(given: dict, name="PSNR, 16 tokens: ") -> str:
    """What the console says of a metric: verdicts after a colon, else its row of the table."""
    lines = [line.strip() for line in ablation_report.console_table(given).splitlines()]
    (found,) = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return found


# One evaluation


def test_every_number_is_in_the_console_and_on_the_page(tmp_path):
    save_grids(tmp_path)
    page, console = page_of(results(), tmp_path), report.console_table(results())
    for number in [*NUMBERS, "0.211", "0.342", "n=39", "by classes"]:
        assert number in console, number
        assert number in page.text, number
    for said in ("runs/a", "small", "photos", "25", "7.5", "dinov2_vits14 at 224 px", "fp32", "2025-01-02", "seed 7",
                 "1 min 23 s", "1.65 GB", "too few images: 40", *"33 38 4.91 5.22 30.1 37.3".split()):  # fmt: skip
        assert said in page.text, said
    assert "PSNR [dB] ↑" in page.text and "rFID ↓" in page.text and "It favours blur" in page.text
    assert re.findall(r"^(\d+|VAE alone) +40 ", console, re.M) == ["1", "4", "16", "VAE alone"]


@pytest.mark.parametrize(
    "key, rows, said",
    [
        ("psnr", {1: (20.0,), 2: (19.0,)}, "to 19.00 dB with 2, so more tokens are worse here (higher is better)"),
        ("lpips", {1: (0.5,), 2: (0.4,)}, "LPIPS falls from 0.500 with 1 token to 0.400 with 2."),
        ("psnr", {1: (20.0, 19, 21), 2: (20.5, 19.5, 21.5)}, "no clear difference"),
        ("psnr", {1: (20.0,), 2: (20.001,)}, "PSNR stays at 20.00 dB from 1 token to 2."),
        ("psnr", {1: (10.0,), 2: (30.0,), 4: (20.0,)}, "and is best with 2: 30.00 dB"),
        ("psnr", {4: (17.0,)}, "PSNR is 17.00 dB with 4 tokens."),
        ("psnr", {}, "No reconstruction metric has a value."),
    ],
)
def test_headline_says_what_the_numbers_say(key, rows, said):
    given = results(reconstruction={str(count): {key: measure(*values)} for count, values in rows.items()})
    assert said in report.console_table(given).splitlines()[1]


def test_the_headline_and_tokens_that_carry_nothing_lead_the_page(tmp_path):
    said = "PSNR rises from 14.21 dB with 1 token to 22.87 dB with 16; the VAE alone, without tokens, gives 31.25 dB."
    given = results(tokens_warning="the tokens carry nothing: all images have the same code")
    page = page_of(given, tmp_path)
    order = [said, "The tokens carry nothing: all images", "too few images: 40", "<h2>"]
    places = [page.html.index(text) for text in order]
    assert places == sorted(places) and page.html.count("carry nothing") == 1
    assert all(text in report.console_table(given) for text in order[:3])


@pytest.mark.parametrize("psnr", [100.0, 99.4, math.inf])
def test_a_lossless_vae_is_called_so(tmp_path, psnr):
    given = results()
    given["reconstruction"]["vae"]["psnr"] = measure(psnr, psnr, psnr)
    console, page = report.console_table(given), page_of(given, tmp_path)
    for text in (console, page.text):
        assert "the VAE alone, without tokens, is lossless." in text
        assert not re.search(r"\b(100|99)\.\d+|\binf", text.replace("100.0 %", ""))
    assert re.search(r"^VAE alone +40 +lossless ", console, re.M) and "VAE alone: lossless" in page.text
    assert "lossless" not in report.console_table(results())


def test_a_plot_does_not_magnify_noise(tmp_path):
    first, last = ({"psnr": measure(30 + x), "rfid": measure(200 + x)} for x in (0.001, 0.014))
    page = page_of(results(reconstruction={"1": first, "16": last}), tmp_path)
    for name, value, span in (("PSNR", 30, 0.7), ("rFID", 200, 14)):
        ticks = [tick for tick in page.ticks(name) if tick > 16]  # those of y
        assert max(ticks) - min(ticks) >= span and min(ticks) <= value and max(ticks) >= value + 0.2


def test_plots_are_those_of_the_results(tmp_path):
    page = page_of(results(), tmp_path)
    assert page.plots == {"psnr", "rfid", "cknna", "used", "entropy_bits"} and page.tags.count("svg") == 5
    assert all(Image.open(path).width >= 800 for path in (tmp_path / "plots").iterdir())
    for said in ("decoder layer (0 is the first)", "aligned in training", "most possible with 40 images", "VAE alone"):
        assert said in page.text, said
    assert {1, 4, 16} <= set(page.ticks("PSNR")) and page.references
    assert "currentColor" in page.html and "#1b2129" not in page.html  # readable on light and dark
    bare = page_of(results(reconstruction={}, alignment=None, codes=None), tmp_path / "bare")
    assert "svg" not in bare.tags and not bare.plots


def test_the_page_loads_nothing_from_outside(tmp_path):
    save_grids(tmp_path)
    page = page_of(results(), tmp_path)
    assert len(page.sources) == 2 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for source in page.sources:
        assert base64.b64decode(source.split(",")[1], validate=True).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "@import" not in page.html
    assert all(re.match(r"https://(arxiv\.org/abs|doi\.org)/", link) for link in page.links) and page.links


def test_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert('x')</script>\"&$_"
    given = results(skipped={evil: evil}, grids={evil: f"{evil}.png"}, tokens_warning=evil)
    given["about"].update(checkpoint=evil, model=evil)
    given["alignment"]["encoder"] = given["codes"]["silhouette_by"] = evil
    given["probes"] = {**given["probes"], "classes": [evil], "features": {evil: {"knn": 0.5, "linear": 0.5}}}
    given["reconstruction"]["1"]["psnr"]["warning"] = evil
    given["reconstruction"]["1"][evil.replace("/", "")] = measure(0.5)
    page = page_of(given, tmp_path)
    assert "script" not in page.tags and page.text.count(evil) >= 14
    assert report.console_table(given).count(evil) >= 8  # as it is
    compared = ablation([run(results=given)], [run()], notes=[evil], config=evil)
    compared["arms"][1].update(name=evil, overrides={evil: evil})
    page = ablation_page_of(compared, tmp_path / "ablation")
    assert "script" not in page.tags and page.text.count(evil) >= 14


def test_missing_parts_are_named(tmp_path):
    given = results(probes=None, alignment=None, codes=None, grids={}, cost={})
    given["skipped"]["probes"] = "the images have no classes"
    del given["reconstruction"]["1"]["rfid"]
    for text in (report.console_table(given), page_of(given, tmp_path).text):
        for said in ("weights of AlexNet are missing", "use of the codes", "alignment with the vision encoder",
                     "pictures", "SSIM", "latent MSE", "FD", "not computed"):  # fmt: skip
            assert said in text, said
        assert re.search(r"probes \(classes from frozen features\)\s+the images have no classes", text)
    page = page_of(results(), tmp_path / "no_grids")
    assert "grids/best.png" in page.text and "is missing" in page.text


def test_a_metric_that_nobody_knows_is_shown_under_its_key(tmp_path):
    warning = "my_metric of 1 image: use more"
    given = results(reconstruction={"4": {"my_metric": measure(0.125, n=1, warning=warning)}}, codes=None)
    page = page_of(given, tmp_path)
    for text in (report.console_table(given), page.text):
        assert "my_metric" in text and "0.1250" in text and text.count(warning) == 1
    assert "my_metric" in page.plots  # of one point


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_missing_numbers_are_dashes(tmp_path, nothing):
    given = results(reconstruction={"1": {"psnr": measure(nothing, nothing, nothing)}})
    given["alignment"].update(
        cosine=None, constant=nothing, tokens_cknna=nothing, layers=[{"layer": 0, "cknna": nothing}]
    )
    given["probes"]["features"] = {"decoder layer 1": {"knn": nothing, "linear": nothing}}
    given["codes"].update(used=[nothing], entropy_bits=[nothing], perplexity=[nothing], silhouette={"1": nothing})
    given["cost"] = {"seconds": nothing, "peak_memory_bytes": nothing}
    console, page = report.console_table(given), page_of(given, tmp_path)
    assert not re.search(r"\b(nan|None)\b", console + page.text)
    assert re.search(r"^1 +40 +–$", console, re.M) and "cosine of a constant prediction  –" in console
    assert page.plots == set()


def test_numbers_are_rounded_but_never_to_nothing(tmp_path):
    rows = [{"psnr": measure(0.00004), "rfid": measure(math.inf)}, {"psnr": measure(14.206), "rfid": measure(-0.0)}]
    given = results(reconstruction={"1": rows[0], "2": rows[1]}, cost={"seconds": 8000, "peak_memory_bytes": 3e6})
    console, page = report.console_table(given), page_of(given, tmp_path)
    assert re.search(r"^1 +40 +4e-05 +–$", console, re.M) and re.search(r"^2 +40 +14.21 +0.00$", console, re.M)
    assert "2 h 13 min" in page.text and "0.003 GB" in page.text


# Arms against each other


def test_beyond_the_spread_is_better_or_worse(tmp_path):
    baseline = [run(seed, shift) for seed, shift in enumerate((0.0, 0.1, -0.1))]
    up = [run(seed, shift + 1) for seed, shift in enumerate((0.01, 0.1, -0.11))]
    given = ablation(baseline, up)
    assert verdict(given).startswith("repa better: higher by 1.00 dB, beyond the spread over seeds")
    assert verdict(ablation(up, baseline)).startswith("repa worse: lower by 1.00 dB")
    assert verdict(given, "rFID, 16 tokens: ").startswith("repa worse: higher by")
    html = ablation_page_of(given, tmp_path).html
    assert '<span class="good">repa better: higher by 1.00 dB' in html and '<span class="bad">repa worse' in html


def test_within_the_spread_no_difference_is_shown():
    baseline = [run(seed, shift) for seed, shift in enumerate((0.0, 0.5, -0.5))]
    other = [run(seed, shift + 0.05) for seed, shift in enumerate((0.4, -0.5, 0.1))]
    said = verdict(ablation(baseline, other))
    assert "higher by 0.05 dB, within the spread over seeds" in said and said.endswith("no difference shown.")
    assert verdict(ablation(baseline, copy.deepcopy(baseline))) == "repa equal (3 seeds, paired): no difference shown."
    two = verdict(ablation([run(0), run(1)], [run(0, 0.2), run(1, 0.3)]))
    assert two.endswith("no difference shown.") and "-0.39 to +0.89" in two  # 0.25 +- 12.706 * 0.0707 / sqrt(2)


def test_difference_is_paired_where_seeds_are_shared():
    first, second = (1.0, 5.0, 9.0), (1.5, 5.7, 9.6)
    baseline = [run(seed, shift) for seed, shift in enumerate(first)]
    paired = ablation(baseline, [run(seed, shift) for seed, shift in enumerate(second)])
    assert "higher by 0.60 dB" in verdict(paired) and "+0.60 ± 0.10" in verdict(paired, "PSNR, 16 tokens [dB]")
    assert "+0.35 to +0.85; 3 seeds, paired" in verdict(paired)  # 0.6 +- 4.303 * 0.1 / sqrt(3)
    apart = verdict(ablation(baseline, [run(seed, shift) for seed, shift in enumerate(second, 10)]))
    assert "-13.54 to +14.74; 3 and 3 other seeds" in apart  # 0.6 +- 4.303 * sqrt((4 ** 2 + 4.051 ** 2) / 3)


def test_one_seed_never_says_better():
    given = ablation([run()], [run(0, 0.1)])
    assert "with one seed" in verdict(given) and "intervals over images overlap: no difference shown." in verdict(given)
    far = ablation([run()], [run(0, 5.0)])
    assert "do not overlap: these two models differ, but another seed may not show it." in verdict(far)
    assert "without a confidence over images: it may be chance" in verdict(far, "rFID, 16 tokens: ")
    assert "differs, but not shown beyond one seed in" in ablation_report.console_table(far)
    for text in (ablation_report.console_table(given), ablation_report.markdown_table(given)):
        assert "no spread over seeds" in text and "±" not in text


def test_a_curve_ends_with_its_last_validation_or_the_mean_of_its_last_tenth(tmp_path):
    curves = {"step": list(range(20)), "train/flow_loss": [1.0] * 18 + [0.25, 0.75], "train/repa_loss": [None] * 20,
              "val/flow_loss": [[5, 0.5], [19, 0.375], [20, None]], "val/repa_loss": []}  # fmt: skip
    page = ablation_page_of(ablation([run(curves=curves)], [run()]), tmp_path)
    assert "flow loss, training (mean of the last tenth) ↓ 0.5000 " in page.text
    assert "flow loss, validation (last) ↓ 0.3750 " in page.text
    assert not page.plots & {"train_repa_loss", "val_repa_loss"} and "REPA loss" not in page.text  # no arm has it


def test_pictures_of_arms_say_whether_they_show_the_same_images(tmp_path):
    save_grids(tmp_path)
    ranked = ablation([run()], [run()])
    fixed = ablation([run(grids={"first": "grids/best.png"})], [run(grids={"first": "grids/worst.png"})])
    texts = [ablation_page_of(given, tmp_path).text for given in (ranked, fixed)]
    assert "arms may show other images" in texts[0] and "The same images and noise" not in texts[0]
    assert "The same images and noise in every arm." in texts[1]


def test_what_one_arm_lacks_is_said():
    bare = run(results={**results(), "reconstruction": {}, "probes": None}, curves={}, grids={})
    del bare["results"]["grids"]
    given = ablation([run()], [bare])
    assert verdict(given) == "repa not compared: no value for repa."
    console = ablation_report.console_table(given)
    for said in ("curves: not recorded", "pictures: not recorded", "reconstruction metrics: not computed"):
        assert f"{said} [repa, seed 0]" in console, said


def test_ablation_page_holds_the_numbers(tmp_path):
    save_grids(tmp_path, ["best"])
    given = ablation([run(0), run(1, 0.2)], [run(0, 1.0), run(1, 1.2)])
    for one in given["arms"][0]["runs"]:
        one["results"]["reconstruction"]["vae"]["psnr"] = measure(100.0)
    page, console = ablation_page_of(given, tmp_path), ablation_report.console_table(given)
    for number in ("22.97 ± 0.14", "23.97 ± 0.14", "+1.00 ± 0.00", "0.3010 ± 0.0014", "82.6 ± 0.0"):
        for text in (page.text, console, ablation_report.markdown_table(given)):
            assert number in text, number
    for said in ("use_repa=true, repa_layers=[1, 5]", "2.00 GB", "1.00x", "1 min 40 s ± 0.7 s", "short runs",
                 "too few images: 40 [all runs]", "Two seeds show only very large differences"):  # fmt: skip
        assert said in page.text and said in console, said
    assert "17.13 ± 0.14" in page.text and "lossless" in page.text  # counts between the ends, and the VAE
    assert page.text.count("seed 0") >= 2 and all(source.startswith("data:") for source in page.sources)
    expected = {"train_flow_loss", "val_flow_loss", "psnr", "rfid", "cknna", "used", "entropy_bits"}
    assert page.plots == expected and page.tags.count("svg") == 7


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
        page = ablation_page_of(json.loads(json.dumps(given)), tmp_path / str(i))
        assert not re.search(r"\b(nan|None)\b", page.text + ablation_report.console_table(given))
        assert i or "repa: no runs" in page.text
        assert ablation_report.markdown_table(given).startswith("| metric | baseline |")


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
