"""What programs may ask of the page's server: questions only, nothing that works or changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from vq4dit.projects.catalog import ModelCard
from vq4dit.projects.messages import on_page
from vq4dit.web import links
from vq4dit.web.choice import Choice
from vq4dit.web.studio import Studio


class Endpoints:
    """One method per question."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def inspect(self, model: str) -> dict:
        """What a model is and what it would weigh at each width, read from its headers.

        Args:
            model: a Hub id such as facebook/DiT-XL-2-256, or assets/emoji-dit, the bundled one.
        """
        try:
            return inspection_values(self.studio.card(model))
        except Exception as error:
            raise gr.Error(on_page(error), print_exception=False) from error

    def estimate(self, model: str, bits: int = 2, recipe: str = "best") -> dict:
        """Seconds, memory and disk that quantizing a model would take here, about.

        Args:
            model: as for `inspect`.
            bits: per weight, 2, 3 or 4.
            recipe: best, paper or kmeans.
        """
        try:
            choice = Choice(model, bits, recipe, 0, "", links.suggested(model))
            cost = self.studio.costs(self.studio.chosen(choice), choice)[bits]
        except Exception as error:
            raise gr.Error(on_page(error), print_exception=False) from error
        return {"seconds": cost.seconds, "memory_bytes": cost.memory_bytes, "disk_bytes": cost.disk_bytes, "fits": cost.fits()}


def inspection_values(found: ModelCard) -> dict[str, Any]:
    """A card for programs."""
    inspection = found.inspection
    return {
        "model": inspection.model if "/" not in inspection.model[:1] else Path(inspection.model).name,
        "pipeline": found.pipeline,
        "transformer": inspection.class_name,
        "blocks": inspection.num_blocks,
        "parameters": inspection.parameters,
        "licence": found.licence,
        "gated": found.gated,
        "bytes": inspection.file_bytes,
        "predicted_bytes": {str(p.bits): p.file_bytes for p in inspection.predictions},
    }
