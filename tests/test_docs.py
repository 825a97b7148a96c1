"""What the documentation says is true: tables, configs, and the Python it prints."""

import re
from pathlib import Path

import pytest
import yaml

from flextok.data.record_cache import cache_bytes
from flextok.model.utils.repa_loss import encoder_facts, known_encoders
from flextok.training.config import TrainConfig, settings_table
from train_flextok import FlexTokTrainer

ROOT = Path(__file__).parent.parent
DOCS = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.md"))}
README_REPA, README_RECIPES = DOCS["README_REPA"], DOCS["README_RECIPES"]
CELEBAHQ = yaml.safe_load((ROOT / "configs/train_celebahq.yaml").read_text())
DOCUMENTED_KEYS = """model_name train_encoder train_decoder train_vae train_from_scratch fsq_levels
gradient_checkpointing dataset_name data_path img_size use_augmentation num_epochs batch_size val_batch_size
max_val_batches num_workers gradient_accumulation_steps use_amp max_grad_norm optimizer learning_rate encoder_lr
decoder_lr vae_lr betas weight_decay eps scheduler warmup_steps min_lr use_ema ema_decay inference_steps guidance_scale
perform_norm_guidance vis_token_counts checkpoint_dir resume save_every use_wandb wandb_project wandb_run_name
wandb_tags log_every visualize_every use_repa repa_weight repa_encoder_type repa_encoder_dim repa_target_size
repa_lr""".split()
NAMES = list(TrainConfig.model_fields)
REPA_SIX = [name for name in DOCUMENTED_KEYS if "repa" in name]
REPA_HEADINGS = [
    "Overview", "Implementation Details", "Files", "Configuration Parameters", "Usage", "Memory Considerations",
    "Expected Behavior", "Debugging", "Implementation Notes", "Ablation Studies", "Future Improvements", "References",
    "License",
]  # fmt: skip


@pytest.mark.parametrize("document, of_repa", [("README_SETTINGS", False), ("README_REPA", True)])
def test_tables_list_every_setting_with_default_and_meaning(document, of_repa):
    names = [name for name in NAMES if ("repa" in name) == of_repa and name not in REPA_SIX]
    assert settings_table(names) in DOCS[document], "python -m flextok.training.config prints the rows"


def test_the_six_settings_of_repa_stand_first_as_in_the_celebahq_config():
    block = re.search(r"```yaml\n(.*?)```", README_REPA, re.DOTALL)[1]
    assert yaml.safe_load(block) == {name: CELEBAHQ[name] for name in REPA_SIX} and len(REPA_SIX) == 6


def test_the_repa_document_has_its_headings_in_their_order():
    assert re.findall("^## (.+)", README_REPA, re.MULTILINE)[: len(REPA_HEADINGS)] == REPA_HEADINGS


def test_the_functions_of_repa_are_in_the_files_that_the_table_names():
    rows = re.findall(r"^\| .+? \| `(\S+\.py)`.*? \| `(\w+)`", README_REPA, re.MULTILINE)
    assert len(rows) == 5
    for file, name in rows:
        assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), (file, name)


@pytest.mark.parametrize(
    "source, documents",
    [
        ("train_flextok.py", ["README"]),
        ("flextok/evaluation/__main__.py", ["README", "README_EXPERIMENTS"]),
        ("flextok/evaluation/ablation.py", ["README", "README_EXPERIMENTS"]),
        ("flextok/data/tokens.py", ["README_OPERATIONS"]),
    ],
)
def test_every_command_line_option_is_in_the_documentation(source, documents):
    options = re.findall(r'\badd(?:_argument)?\(\s*"(--[a-z0-9-]+)"', (ROOT / source).read_text())
    text = "".join(DOCS[document] for document in documents)
    assert len(options) >= 5
    for option in options:
        assert f"`{option}" in text or f"{option} " in text, option


def test_cache_sizes_in_the_readme_are_those_of_the_files():
    names = {"DINOv2-S": "dinov2_vits14", "DINOv2-B": "dinov2_vitb14", "DINOv2-L": "dinov2_vitl14",
             "DINOv2-G": "dinov2_vitg14", "EfficientNet-Lite0": "efficientnet_lite0"}  # fmt: skip
    for title, name in names.items():
        row = next(line for line in README_RECIPES.splitlines() if line.startswith(f"| {title} |"))
        for cell, px in zip(row.strip("|").split("|")[1:], (518, 224), strict=True):
            if cell.strip():
                facts = encoder_facts(name, px)
                size = cache_bytes(1000, 2, (*facts.grid, facts.dim)) / 1e9
                assert float(cell.split()[0]) == pytest.approx(size, abs=0.006), (name, px)


def test_the_encoder_table_has_the_right_numbers():
    for name, facts in known_encoders().items():
        if not name.endswith("_reg"):
            row = next(line for line in README_REPA.splitlines() if line.startswith(f"| `{name}`"))
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert int(cells[1]) == facts.dim
            assert float(cells[2].split()[0]) == pytest.approx(facts.parameters / 1e6, abs=0.06)
            assert float(cells[3].split()[0]) == pytest.approx(facts.parameters * 4 / 1e9, abs=0.006)
            assert float(cells[4].split()[0]) == pytest.approx(facts.parameters * 2 / 1e9, abs=0.006)
            grid = facts.image_size // facts.patch_size
            assert cells[5:] == [f"{facts.image_size} px", f"{grid}x{grid}"]


def test_celebahq_config_holds_every_documented_key_and_repa_off():
    assert set(CELEBAHQ) >= set(DOCUMENTED_KEYS)
    assert CELEBAHQ["use_repa"] is False and CELEBAHQ["model_name"] == "EPFL-VILAB/flextok_d18_d18_in1k"


def test_linked_files_and_headings_exist():
    for name, text in DOCS.items():
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text):
            assert (ROOT / target).exists(), target
        for document, heading in re.findall(r"\]\((\w+\.md)?#([^)]+)\)", text):
            titles = re.findall("^#+ (.+)", DOCS[document.removesuffix(".md") or name], re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading
        for target in re.findall(r"configs/\w+\.yaml", text):
            assert (ROOT / target).exists(), target


def test_the_debugging_snippets_run_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README_REPA.split("## Debugging")[1], flags=re.DOTALL)
    shapes = blocks.pop(1)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README_REPA.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "REPA module loaded: True" in printed and "REPA loss: " in printed
    encoder = namespace["trainer"].repa_module.encoder
    assert f"Encoder params: {sum(p.numel() for p in encoder.parameters())}\n" in printed
    names = re.findall(r"{(\w+)\.shape}", shapes)
    assert len(names) == 3
    for name in names:  # the names that the printed lines use in compute_repa_loss
        assert name in FlexTokTrainer.compute_repa_loss.__code__.co_varnames
