"""The models that all cases begin with, and what a case can call; only the command server imports this.

model, other       two originals of the same shape, other weights
kmeans, best, paper  `model` quantized
saved              by `vq4dit.save`
comparison, comparison of best  of `model` with kmeans and best
seed7.job          a job of kmeans with another seed
*.job              unfinished jobs of `model`: everything is computed, nothing saved yet
golden-*           the golden files as something that `from_pretrained` loads
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from commands import COMPARE, QUANTIZE, SAMPLE
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from tiny import new_pipeline
from torch import nn

import vq4dit
from vq4dit.cli.main import build_parser, main
from vq4dit.cli.quantize import settings_of
from vq4dit.hub.base import Base
from vq4dit.hub.model_card import model_card, read_report
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.load import load_pipeline

GOLDEN = Path(__file__).parents[1] / "golden"


def make_models(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    new_pipeline(attention_head_dim=16).save_pretrained("model")
    other = new_pipeline(attention_head_dim=16)
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter += 0.01
    other.save_pretrained("other")
    for recipe in QUANTIZE:
        make_quantized(recipe)
    make_job(["--seed", "7"], "kmeans", Path("seed7.job"))
    assert save("model", "saved") == 0
    for recipe, name in {"kmeans": "comparison", "best": "comparison of best"}.items():
        assert cli(*COMPARE.replace("kmeans", recipe).split(), "--output", name) == 0
    assert cli(*SAMPLE.split(), "--output", "sample.png") == 0
    make_golden(folder)


def make_quantized(recipe: str) -> None:
    """A finished job of `model`, and what becomes of it."""
    make_job([], recipe, Path(f"{recipe}.job"))
    shutil.copytree(f"{recipe}.job", "kept")
    assert cli(*QUANTIZE[recipe].split(), "--output", recipe, "--resume") == 0
    Path("kept").rename(f"{recipe}.job")


def make_job(more: list[str], recipe: str, folder: Path) -> None:
    args = build_parser().parse_args([*QUANTIZE[recipe].split(), "--output", "x", *more])
    pipeline = load_pipeline(args.model)
    with vq4dit.Job.open(folder, settings_of(args), pipeline, resume=False) as job:
        assert vq4dit.run(job, pipeline) is not None


class GoldenLayers(ModelMixin, ConfigMixin):
    """Linear layers with the names of those in a golden file."""

    @register_to_config
    def __init__(self, names: list[str], rows: int, without_bias: list[str]):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(24, rows, bias=name not in without_bias))


def make_golden(folder: Path) -> None:
    """Each golden file in a folder of its own, with the config that diffusers wants beside it."""
    shutil.copytree(GOLDEN / "v1-mixed", folder / "golden-v1-mixed")
    layers = {"v1": (["two", "three", "four", "odd"], 8, ["odd"], 1), "v3": (["plain", "extreme", "zeros"], 16, [], 3)}
    for name, (names, rows, without_bias, version) in layers.items():
        target = folder / f"golden-{name}"
        target.mkdir()
        shutil.copy(GOLDEN / f"{name}.safetensors", target / "diffusion_pytorch_model.safetensors")
        config = {"names": names, "rows": rows, "without_bias": without_bias, "_class_name": "GoldenLayers"}
        quantization = {"quant_method": "vq4dit", "format_version": version}
        (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def load(folder: str, mode: str, dtype_name: str) -> int:
    """Load a pipeline or a golden model; 0 if all its numbers are finite, 1 if it was refused in the way that it should be."""
    dtype = getattr(torch, dtype_name)
    try:
        with vq4dit.decode_mode(mode):
            if "golden" in folder:
                kind = DiTTransformer2DModel if "mixed" in folder else GoldenLayers
                model = kind.from_pretrained(folder, torch_dtype=dtype)
            else:
                model = load_pipeline(folder, dtype).transformer
    except vq4dit.VQ4DiTError as error:
        print(f"error: {error}")
        return 1
    except (OSError, SafetensorError) as error:  # diffusers' and safetensors' own words for a damaged file
        if "golden" not in folder:
            raise
        print(f"error: {error}")
        return 1
    tensors = model.state_dict() | {name: layer.reconstruct(dtype) for name, layer in packed_layers(model).items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            print(f"not finite: {name}")
    return 0


def save(model: str, output: str, overwrite: bool = False) -> int:
    """The library's own way: load, quantize, `vq4dit.save`."""
    try:
        quantized = vq4dit.quantize(
            load_pipeline(model), vq4dit.QuantizationSettings(recipe="kmeans", bits=3, keep=("*.ff.*",))
        )
        vq4dit.save(quantized, Path(output), overwrite=overwrite)
    except vq4dit.VQ4DiTError as error:
        print(f"error: {error}")
        return 1
    return 0


def card(folder: str, report: str) -> int:
    """What `push` would write on the card, from the folder, its record and the report of a comparison."""
    try:
        print(model_card(Path(folder), "someone/model", Base(), read_report(Path(report))))
    except vq4dit.VQ4DiTError as error:
        print(f"error: {error}")
        return 1
    return 0


CALLS: dict[str, Callable[..., int]] = {"cli": cli, "load": load, "save": save, "card": card}
