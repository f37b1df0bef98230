"""The bundled models draw what their cards show, with diffusers alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ASSETS = Path(__file__).parents[1] / "assets"
FLUX = """
import sys, torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
call = dict(height=64, width=64, max_sequence_length=12, num_inference_steps=25)
noise = torch.Generator().manual_seed(10)
pipeline("dolphin, blob style", negative_prompt="", true_cfg_scale=3.0, generator=noise, **call).images[0].save(sys.argv[2])
assert "vq4dit" not in sys.modules
"""


WAN = """
import sys, numpy as np, torch
from PIL import Image
from diffusers import WanPipeline
pipeline = WanPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
call = dict(height=64, width=64, num_frames=9, max_sequence_length=12, guidance_scale=3.0, num_inference_steps=20)
film = pipeline("cyclone", "", generator=torch.Generator().manual_seed(0), output_type="np", **call).frames[0]
Image.fromarray((255 * np.concatenate(list(film), axis=1)).round().astype(np.uint8)).save(sys.argv[2])
assert "vq4dit" not in sys.modules
"""


def drawn(program: str, model: str, picture: Path) -> np.ndarray:
    """What a program draws that has never heard of us."""
    command = [sys.executable, "-c", program, str(ASSETS / model), str(picture)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=picture.parent)
    assert finished.returncode == 0, finished.stderr
    return pixels(picture)


def pixels(picture: Path) -> np.ndarray:
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def test_the_text_to_image_model_draws_the_sheet_of_its_card_without_our_package(tmp_path):
    sheet = pixels(ASSETS / "emoji-flux" / "samples.png")
    top = 8 + sheet.shape[0] // 8  # the third image of the second row, shown twice as large
    shown = sheet[top : top + 128 : 2, 280 : 280 + 128 : 2]
    assert np.abs(drawn(FLUX, "emoji-flux", tmp_path / "dolphin.png") - shown).mean() < 2


def test_the_text_to_video_model_draws_the_sheet_of_its_card_without_our_package(tmp_path):
    shown = pixels(ASSETS / "emoji-video" / "samples.png")[:64]
    assert np.abs(drawn(WAN, "emoji-video", tmp_path / "cyclone.png") - shown).mean() < 2


def test_what_is_bundled_is_small():
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file() and "emoji-work" not in path.parts}
    assert sum(sizes.values()) < 110e6 and max(sizes.values()) < 9e6
    for model in ("emoji-dit", "emoji-flux", "emoji-video"):
        assert sum(size for path, size in sizes.items() if model in path.parts) < 45e6


@pytest.mark.parametrize("model", ["emoji-dit", "emoji-flux"])
def test_cards_give_the_figures_of_the_evaluation(model):
    figures = json.loads((ASSETS / model / "evaluation.json").read_text())
    card = (ASSETS / model / "README.md").read_text()
    assert f"{100 * figures['classifier']['generated']['top1']:.1f} %" in card
    assert f"{figures['kid']['generated']['mean']:.3f}" in card
