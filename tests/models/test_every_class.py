"""Every transformer class of diffusers is quantized, saved, loaded bit by bit, and as large as it was said to be.

Codewords are sub-vectors drawn at random here: how k-means finds better ones is for other tests, and takes longer.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers.models.modeling_utils import ModelMixin
from tiny_transformers import CONFIGS, PIPELINES, Alone, build, classes
from torch import Tensor, nn

from vq4dit import QuantizationSettings, decode_mode, quantize, save, set_decode_mode
from vq4dit.models.blocks import find_targets, named_blocks
from vq4dit.models.denoiser_calls import tensors_of
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.inspect import inspect
from vq4dit.pipelines.load import load_pipeline

SETTINGS = QuantizationSettings(recipe="kmeans")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NOT_BUILT: dict[str, str] = {}  # a class, and why no tiny model of it is built here
BUILT = sorted(CONFIGS | PIPELINES)
IN_FP32 = ("SD3Transformer2DModel", "WanTransformer3DModel")  # a table of positions; what diffusers loads in no other type


class Packed(NamedTuple):
    """A class's tiny model: as it was, quantized, loaded again; and the folders with it before and after."""

    original: ModelMixin
    quantized: ModelMixin
    loaded: ModelMixin
    source: Path
    folder: Path


def drawn_codewords(subvectors: Tensor, num_codewords: int, *, generator: torch.Generator) -> Tensor:
    return subvectors[torch.randperm(len(subvectors), generator=generator)[:num_codewords]]


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "Alone", Alone, raising=False)  # so that the index of a folder may name it
        patch.setattr("vq4dit.recipes.vector_quantized.fit_codebook", drawn_codewords)
        yield


@pytest.fixture(scope="module", params=BUILT)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    source, folder = (tmp_path_factory.mktemp(request.param) / name for name in ("source", "packed"))
    pipeline = Alone(build(request.param))
    pipeline.save_pretrained(source)
    quantized = quantize(pipeline, SETTINGS)
    save(quantized, folder)
    with decode_mode("load"):
        loaded = load_pipeline(str(folder)).transformer
    for p in loaded.parameters():
        p.data = p.data.clone()  # what is mapped from a file may lie where another kernel is taken, which rounds otherwise
    return Packed(pipeline.transformer, quantized.transformer, loaded, source, folder)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that a model computes with: decoded weights, parameters, buffers whether they are saved or not, other tensors."""
    layers = packed_layers(model)
    found = {f"{name}.weight": layer.numbers() for name, layer in layers.items()}
    for name, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers} if name not in layers else {"bias": module.bias}
        found |= {f"{name}.{key}": value for key, value in held.items() if isinstance(value, Tensor)}
    return found


def assert_predicted(source: Path, packed: Path) -> None:
    [prediction] = inspect(str(source), widths=[SETTINGS.bits], recipe=SETTINGS.recipe).predictions
    assert prediction.file_bytes == pytest.approx((packed / WEIGHTS).stat().st_size, rel=0.01)


def decoding_at_every_use(model: ModelMixin) -> ModelMixin:
    """A copy of a model, which keeps no decoded weights."""
    copied = copy.deepcopy(model)
    set_decode_mode(copied, "forward")
    return copied


def first_call(name: str) -> tuple[tuple, dict[str, Any]]:
    """With what the pipeline of a class calls its transformer."""
    pipeline, calls = tiny_pipelines.build(name), []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise StopIteration

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    with suppress(StopIteration):
        pipeline(prompt="a cat", num_inference_steps=2, output_type="latent", **tiny_pipelines.CALLS[name])
    return calls[0]


def test_every_transformer_class_of_diffusers_is_tried_or_left_out_with_a_reason():
    assert {*BUILT, *NOT_BUILT} == classes().keys()
    assert not {*BUILT} & {*NOT_BUILT}


def test_every_block_has_layers_to_quantize(packed):
    targets, _ = find_targets(packed.original, SETTINGS.subvector_dim, SETTINGS.num_codewords)
    assert packed_layers(packed.quantized).keys() == targets.keys()
    for block in named_blocks(packed.original):
        assert any(name.startswith(f"{block}.") for name in targets)


def test_what_is_loaded_is_what_was_saved_bit_by_bit(packed):
    """Decoded when it was loaded, and decoded at every use."""
    before = numbers(packed.quantized)
    for after in (numbers(packed.loaded), numbers(decoding_at_every_use(packed.loaded))):
        assert before.keys() == after.keys()
        assert not [name for name in before if not torch.equal(before[name], after[name])]


def test_the_size_that_inspect_predicts_is_that_of_the_file(packed):
    assert_predicted(packed.source, packed.folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", IN_FP32)
def test_the_size_of_a_model_of_16_bit_numbers_is_predicted_wherever_diffusers_keeps_fp32(tmp_path, name, dtype):
    Alone(build(name).to(dtype)).save_pretrained(tmp_path / "source")
    for loaded_in in (dtype, torch.float32):
        pipeline = load_pipeline(str(tmp_path / "source"), loaded_in)
        save(quantize(pipeline, SETTINGS), tmp_path / "packed", overwrite=True)
        assert_predicted(tmp_path / "source", tmp_path / "packed")


@pytest.mark.parametrize("packed", PIPELINES, indirect=True)
@torch.no_grad()
def test_what_a_loaded_model_answers_is_what_it_answered_bit_by_bit(packed):
    args, kwargs = first_call(PIPELINES[type(packed.original).__name__])
    wanted = tensors_of(packed.quantized(*args, **kwargs))
    assert wanted
    for model in (packed.loaded, decoding_at_every_use(packed.loaded)):
        assert all(map(torch.equal, tensors_of(model(*args, **kwargs)), wanted))
