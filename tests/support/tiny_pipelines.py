"""Whole pipelines of twenty families, tiny and random, built from nothing: no download, a second each.

    python tiny_pipelines.py FOLDER [NAME ...]     writes FOLDER/NAME for each

Text encoders are a few layers of random weights, tokenizers know single characters. The transformers' layers are just large
enough (64 x 64) to be worth quantizing at 2 bits. `CALLS` has what `pipeline(...)` needs for a tiny picture or film; prompts,
steps and output type are for the caller to add. Needs `transformers` (5 or newer); WanPipeline also `ftfy`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_films
import tiny_pictures
import torch
from torch import nn

BUILDERS: dict[str, Callable[[], Any]] = {
    "pixart-sigma": tiny_pictures.pixart_sigma,
    "sd3": tiny_pictures.sd3,
    "flux": tiny_pictures.flux,
    "flux2-klein": tiny_pictures.flux2_klein,
    "sana": tiny_pictures.sana,
    "z-image": tiny_pictures.z_image,
    "qwen-image": tiny_pictures.qwen_image,
    "ltx": tiny_films.ltx,
    "wan": tiny_films.wan,
    "wan22": tiny_films.wan22,
    "cogvideox": tiny_films.cogvideox,
    "hunyuan-video": tiny_films.hunyuan_video,
    "lumina2": tiny_pictures.lumina2,
    "auraflow": tiny_pictures.auraflow,
    "mochi": tiny_films.mochi,
    "cogview4": tiny_pictures.cogview4,
    "chroma": tiny_pictures.chroma,
    "hunyuan-dit": tiny_pictures.hunyuan_dit,
    "latte": tiny_films.latte,
    "stable-audio": tiny_films.stable_audio,
    "ace-step": tiny_films.ace_step,
}

# What a call needs beyond prompt, steps, generator and output type: only the size, and a short text.
CALLS: dict[str, dict[str, Any]] = {
    "pixart-sigma": {"height": 16, "width": 16, "use_resolution_binning": False, "max_sequence_length": 16},
    "sd3": {"height": 32, "width": 32, "max_sequence_length": 16},
    "flux": {"height": 32, "width": 32, "max_sequence_length": 16},
    "flux2-klein": {"height": 32, "width": 32, "max_sequence_length": 48},
    "sana": {
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": 16,
    },
    "z-image": {"height": 32, "width": 32},
    "qwen-image": {"height": 32, "width": 32},
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    "wan22": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    "cogvideox": {"height": 32, "width": 32, "num_frames": 9},
    "hunyuan-video": {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16},
    "lumina2": {"height": 64, "width": 64, "system_prompt": "", "max_sequence_length": 48},
    "auraflow": {"height": 32, "width": 32, "max_sequence_length": 16},
    "mochi": {"height": 64, "width": 64, "num_frames": 7, "max_sequence_length": 16},
    "cogview4": {"height": 32, "width": 32, "max_sequence_length": 16},
    "chroma": {"height": 32, "width": 32, "max_sequence_length": 16},
    "hunyuan-dit": {"height": 64, "width": 64, "use_resolution_binning": False},
    "latte": {"height": 16, "width": 16, "video_length": 4},
    "stable-audio": {},
    "ace-step": {"audio_duration": 16.0, "max_text_length": 48},
}


@contextmanager
def unset_is_nan() -> Iterator[None]:
    """Memory that a model takes and does not set holds NaN, and not what was there before, which may be anything."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # that is why it fills what is new
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def build(name: str, seed: int = 0) -> Any:
    """The pipeline, its weights drawn from the seed; nothing is exactly zero, so that every layer counts."""
    torch.manual_seed(seed)
    with unset_is_nan():
        pipeline = BUILDERS[name]()
    for part in ("transformer", "transformer_2"):
        if (transformer := getattr(pipeline, part, None)) is not None:
            for p in transformer.parameters():
                if p.is_floating_point() and (not p.any() or not p.isfinite().all()):
                    nn.init.normal_(p, std=0.05)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(folder: str, *names: str) -> None:
    for name in names or BUILDERS:
        pipeline = build(name)
        pipeline.save_pretrained(Path(folder) / name)
        print(name, type(pipeline).__name__, sum(p.numel() for p in pipeline.transformer.parameters()))


if __name__ == "__main__":
    main(*sys.argv[1:])
