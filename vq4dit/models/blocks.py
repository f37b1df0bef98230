"""All we know of a diffusion transformer: its blocks, the linears to quantize, the embedders its blocks share.

Nothing here names a model family. Blocks are found by structure: the outermost `ModuleList`s whose elements each hold at
least two linears. The targets are the linears inside blocks, except those of embedders, which turn timesteps and labels
into vectors and are copied into every block by diffusers' converter: small, sensitive, and stored once (`share_embedders`).
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vq4dit.denoisers import full_name, kind_of, transformers_in
from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.linear_maps import LinearMap, is_linear_map, matrix_shape
from vq4dit.models.denoiser_calls import Tree, tensors_of

MIN_SUBVECTORS_PER_CODEWORD = 4  # below this a codebook does not pay


@dataclass(frozen=True)
class Kept:
    """A linear of a block that stays in 16 bit, and why."""

    name: str
    reason: str


def parts_of(model: Any) -> list[nn.Module]:
    """The modules of a pipeline, or the one module that is given.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(parts := getattr(model, "components", None), dict):
        return [part for part in parts.values() if isinstance(part, nn.Module)]
    raise ValueError(f"a model or a pipeline is wanted, got a {type(model).__name__}")


def named_blocks(transformer: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by name, in order of execution.

    Raises:
        UnsupportedModelError: if the model has no such lists. (A UNet has some: pipelines are told apart by their parts.)
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList) and len(child) and all(_num_linears(element) >= 2 for element in child):
                found.update({f"{path}.{index}": element for index, element in enumerate(child)})
            else:
                visit(child, f"{path}.")

    visit(transformer, "")
    if not found:
        raise UnsupportedModelError(
            f"{type(transformer).__name__} has no transformer blocks (lists of modules with two linears or more each); "
            "vq4dit quantizes diffusion transformers such as facebook/DiT-XL-2-256"
        )
    return found


def _num_linears(module: nn.Module | None) -> int:
    """Linears of a module, and what stands in the place of one while it is calibrated."""
    return sum(hasattr(m, "in_features") for m in module.modules()) if module is not None else 0


def is_embedder(module: nn.Module) -> bool:
    """Whether a module turns timesteps, labels or positions into vectors: diffusers keeps those in one file."""
    return type(module).__module__ == "diffusers.models.embeddings"


def find_targets(
    transformer: nn.Module, subvector_dim: int, num_codewords: int, keep: Sequence[str] = ()
) -> tuple[dict[str, LinearMap], list[Kept]]:
    """The linears to quantize, by name in order of execution, and those of the blocks that stay, with the reason.

    Args:
        keep: shell patterns ("*.ff.*", "transformer_blocks.0.*") of layers to leave in 16 bit.

    Raises:
        UnsupportedModelError: if there are no blocks, or nothing is left to quantize.
        ValueError: if a pattern matches no linear of a block.
    """
    targets: dict[str, LinearMap] = {}
    kept: list[Kept] = []
    matched: set[str] = set()
    for block_name, block in named_blocks(transformer).items():
        embedders = [f"{name}." for name, module in block.named_modules() if name and is_embedder(module)]
        for name, linear in block.named_modules():
            if not is_linear_map(linear):
                continue
            path = f"{block_name}.{name}"
            patterns = [pattern for pattern in keep if fnmatch.fnmatchcase(path, pattern)]
            matched.update(patterns)
            if reason := _reason_to_keep(linear, name, embedders, patterns, subvector_dim, num_codewords):
                kept.append(Kept(path, reason))
            else:
                targets[path] = linear
    if unmatched := [pattern for pattern in keep if pattern not in matched]:
        example = next(iter(targets), kept[0].name if kept else "")
        raise ValueError(f"no linear layer of a block matches {unmatched[0]!r}; names look like {example!r}")
    if not targets:
        raise UnsupportedModelError(
            f"no layer of this {kind_of(transformer)} is large enough to quantize with {num_codewords} codewords "
            f"of {subvector_dim} weights (or all are kept by a pattern)"
        )
    return targets, kept


def _reason_to_keep(
    linear: LinearMap, name: str, embedders: list[str], patterns: list[str], subvector_dim: int, num_codewords: int
) -> str | None:
    if any(f"{name}.".startswith(embedder) for embedder in embedders):
        return "embedder"
    if patterns:
        return f"kept by {patterns[0]!r}"
    rows, columns = matrix_shape(linear)
    if columns < subvector_dim:
        return f"{columns} inputs are less than a sub-vector of {subvector_dim}"
    if rows * columns < MIN_SUBVECTORS_PER_CODEWORD * subvector_dim * num_codewords:
        return "too small to pay for its codebook or scales"
    return None


def kept_parameters(denoiser: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many parameters stay in 16 bit beside the targets, by what they belong to, most first.

    Outside blocks that is an outermost module ("x_embedder"), in blocks a layer of all of them ("blocks.*.norm_q"). Embedders
    that every block has count once, as in the file.
    """
    quantized = {id(p) for linear in targets.values() for p in linear.parameters()}
    found: Counter[str] = Counter()
    duplicates = repeated_embedders(denoiser)
    for part, transformer in transformers_in(denoiser).items():
        in_blocks = {f"{name}.": f"{name.rpartition('.')[0]}.*." for name in named_blocks(transformer)}
        for name, p in transformer.named_parameters():
            if id(p) in quantized or full_name(part, name) in duplicates:
                continue
            block = next((prefix for prefix in in_blocks if name.startswith(prefix)), None)
            inside = name if block is None else name.removeprefix(block)
            layer = inside.rpartition(".")[0] or inside
            place = layer.split(".")[0] if block is None else in_blocks[block] + layer
            found[full_name(part, place)] += p.numel()
    return dict(found.most_common())


def repeated_embedders(denoiser: nn.Module) -> set[str]:
    """State-dict keys of embedders that all blocks of a transformer have, in every block but its first."""
    return {
        full_name(part, key)
        for part, transformer in transformers_in(denoiser).items()
        for key in duplicate_keys(transformer, block_embedders(transformer))
    }


def block_embedders(transformer: nn.Module) -> list[str]:
    """Paths, relative to a block, of the embedders that every block has ("norm1.emb" for DiT)."""
    blocks = list(named_blocks(transformer).values())
    paths = [name for name, module in blocks[0].named_modules() if name and is_embedder(module)]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return [path for path in outermost if all(_has(block, path) for block in blocks)]


def _has(module: nn.Module, path: str) -> bool:
    return path in dict(module.named_modules())


def equal_embedders(transformer: nn.Module) -> list[str]:
    """Those of `block_embedders` whose tensors are the same in all blocks."""
    first, *others = named_blocks(transformer).values()
    equal = []
    for path in block_embedders(transformer):
        reference = first.get_submodule(path).state_dict()
        copies = (block.get_submodule(path).state_dict() for block in others)
        if all(copy.keys() == reference.keys() and all(_same(copy[k], reference[k]) for k in reference) for copy in copies):
            equal.append(path)
    return equal


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)


def share_embedders(transformer: nn.Module, paths: Sequence[str]) -> None:
    """Let all blocks use the first block's embedder at each relative path."""
    first, *others = named_blocks(transformer).values()
    for path in paths:
        for block in others:
            block.set_submodule(path, first.get_submodule(path))


def unshare_embedders(transformer: nn.Module) -> None:
    """Give every block a copy of its own of what `share_embedders` shared."""
    first, *others = named_blocks(transformer).values()
    for path in block_embedders(transformer):
        for block in others:
            if block.get_submodule(path) is first.get_submodule(path):
                block.set_submodule(path, copy.deepcopy(first.get_submodule(path)))


def duplicate_keys(transformer: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """State-dict keys of shared embedders in every block but the first, and the first block's key for each."""
    first, *others = named_blocks(transformer)
    prefixes = {f"{name}.{path}.": f"{first}.{path}." for name in others for path in paths}
    duplicates = {}
    for key in transformer.state_dict():
        for prefix, original in prefixes.items():
            if key.startswith(prefix):
                duplicates[key] = original + key.removeprefix(prefix)
    return duplicates


@contextmanager
def recorded_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what each block returns during a forward pass: a list of tensors that every pass fills anew.

    Blocks that return several streams count with each tensor of them.
    """
    outputs: list[Tensor] = []

    def clear(module: nn.Module, arguments: tuple) -> None:
        outputs.clear()

    def record(module: nn.Module, arguments: tuple, output: Tree) -> None:
        outputs.extend(tensor for tensor in tensors_of(output) if tensor.is_floating_point())

    handles = [blocks[0].register_forward_pre_hook(clear)] + [block.register_forward_hook(record) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
