"""The denoiser of a pipeline: its transformer, or all of them where it has several.

Most pipelines have one. Wan 2.2 takes one for the noisy steps and another for the rest; Ideogram 4 has one that predicts with
the prompt and one that predicts without. All are of one class, and each is a part of the pipeline, in a folder of its own. Here
they are held together as one module whose children they are, so whoever walks its layers meets them all, under full names:
`transformer_2.blocks.0.ffn.net.2`. Of a pipeline with one, the denoiser is that transformer itself: `blocks.0.ffn.net.2`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

FIRST = "transformer"  # the part that makes a pipeline one of a diffusion transformer


class Denoisers(nn.Module):
    """Several transformers, by the names of their parts; it is not called itself."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def names_of_denoisers(kinds: Mapping[str, Any]) -> list[str]:
    """Of a pipeline's parts those that are transformers of the first one's kind, which comes first.

    Args:
        kinds: what each part is: its class, or the names of its library and class.
    """
    kind = kinds.get(FIRST)
    return [FIRST, *(name for name, other in kinds.items() if name != FIRST and other == kind)] if kind else []


def denoisers_of(pipeline: Any) -> dict[str, Any]:
    """The transformers of a pipeline by the names of their parts."""
    parts = {FIRST: pipeline.transformer} | {name: part for name, part in pipeline.components.items() if part is not None}
    kinds = {name: type(getattr(part, "_orig_mod", part)) for name, part in parts.items()}  # of what torch.compile wraps
    return {name: parts[name] for name in names_of_denoisers(kinds)}


def as_one(parts: Mapping[str, nn.Module]) -> nn.Module:
    """One transformer is itself; several are the children of one module."""
    return next(iter(parts.values())) if len(parts) == 1 else Denoisers(parts)


def denoiser_of(pipeline: Any) -> nn.Module:
    """All transformers of a pipeline as one module."""
    return as_one(denoisers_of(pipeline))


def names_in_denoiser(parts: Collection[str]) -> dict[str, str]:
    """What each part is called there: one alone has no name."""
    return {part: part if len(parts) > 1 else "" for part in parts}


def transformers_in(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The transformers by their names in a denoiser: one alone is called ""."""
    return dict(denoiser.named_children()) if isinstance(denoiser, Denoisers) else {"": denoiser}


def kind_of(denoiser: nn.Module) -> str:
    """The class of its transformers, for messages."""
    return type(next(iter(transformers_in(denoiser).values()))).__name__


def full_name(part: str, name: str) -> str:
    """Of something in the transformer that has the name `part` in a denoiser."""
    return f"{part}.{name}" if part else name
