"""The models that come with vq4dit, and what their pipelines' calls must be told where they draw in one way only."""

from __future__ import annotations

import os
from pathlib import Path

from vq4dit.config import CallValue

BUNDLED, BUNDLED_FLUX, BUNDLED_VIDEO = "assets/emoji-dit", "assets/emoji-flux", "assets/emoji-video"
CALLS: dict[str, dict[str, CallValue]] = {
    BUNDLED_FLUX: {"height": 64, "width": 64, "true_cfg_scale": 3, "negative_prompt": "", "max_sequence_length": 12},
    BUNDLED_VIDEO: {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3, "max_sequence_length": 12},
}


def suggested_call(model: str) -> dict[str, CallValue]:
    """What the call of a bundled model, or of a copy in a folder of that name, must be told; of others we do not know.

    Args:
        model: its name, or the path of its folder.
    """
    return dict(CALLS.get("/".join(Path(os.path.abspath(model)).parts[-2:]), {}))
