"""FORMAT.md is enough: a decoder written from it alone reads what vq4dit writes, bit for bit, and refuses what it refuses."""

import ast
import hashlib
import json
import sys
from functools import cache
from math import erfc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_decoder as reference
import torch
from coded_models import save_mixed, separable_integers
from tiny import new_pipeline, new_transformer, quick_settings
from tiny_pictures import sana

import vq4dit
from vq4dit.errors import FormatError
from vq4dit.layers import lanes
from vq4dit.layers.entropy_coded import STEP_SIZES, step_size
from vq4dit.layers.frequencies import frequencies
from vq4dit.layers.scale_classes import Sides, estimate_levels
from vq4dit.layers.single_stream import decode
from vq4dit.models.blocks import named_blocks
from vq4dit.pipelines.decode_modes import packed_layers

FORMAT = " ".join((Path(vq4dit.__file__).parent / "layers" / "FORMAT.md").read_text(encoding="utf-8").split())
GOLDEN = Path(__file__).parents[1] / "golden"
EXAMPLE = bytes.fromhex("2d1578610cbe823213000000")
EXAMPLE_MODELS = [[120, 38], [18, 38], [128, 41], [15, 30]]


STREAM_MODELS = [[128, 44], [16, 40], [128, 44], [16, 40]]
EXAMPLE_OF_LANES = (
    "af14af40 00 00 01 00 02000000 03000000 7826 1226 8029 0f1e 04000000 da28 0100 728e a209 03000000 df06 0100 393b"
)


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """What a reader knows of a model by its architecture: its linears' shapes, and those of convolutions."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def check_read(folder: Path, original: Any, kinds: set[str]) -> None:
    """The reference reads every tensor of a packed transformer, of the architecture of `original`, as vq4dit does."""
    found = reference.read_model(folder, shapes_of(original), list(named_blocks(original)))
    loaded = type(original).from_pretrained(folder, torch_dtype=torch.float32)
    assert {type(layer).__name__ for layer in packed_layers(loaded).values()} == kinds
    wanted = {name: tensor.numpy() for name, tensor in vq4dit.dequantize(loaded).state_dict().items()}
    assert found.keys() == wanted.keys() == original.state_dict().keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_the_reference_decoder_has_nothing_of_ours():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"numpy"}


# --- golden files ---


def test_golden_codebooks_are_read_for_ever():
    tensors, digest = reference.read_safetensors(GOLDEN / "v1.safetensors"), hashlib.sha256()
    for name in ("two", "three", "four", "odd"):
        digest.update(reference.weight_of(tensors, name, 8, 24).tobytes())
    assert digest.hexdigest() == "ec8585197c036b28d8f76d74f44a6668c51ada27b085dad87532de3bd7162b30"


def test_golden_integers_are_read_for_ever():
    tensors, digest = reference.read_safetensors(GOLDEN / "v3.safetensors"), hashlib.sha256()
    for name in ("plain", "extreme", "zeros"):
        digest.update(reference.weight_of(tensors, name, 16, 24).tobytes())
    assert digest.hexdigest() == "d20da7376ebcf68cbbf59c38a0c7673450753f9fd7d8873dabe063df98a55df0"


def test_a_golden_model_of_different_widths_is_read_for_ever():
    block = "transformer_blocks.0."
    shapes = {f"{block}attn1.{part}": (8, 8) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= {f"{block}ff.net.0.proj": (32, 8), f"{block}ff.net.2": (8, 32), f"{block}norm1.linear": (48, 8)}
    found = reference.read_model(GOLDEN / "v1-mixed", shapes, [block[:-1]])
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(name.encode() + found[f"{name}.weight"].tobytes())
    assert digest.hexdigest() == "a39c383322fa09dfdd1a54bb45b62ede67f4eb04a05969fecc7a6fd741bcacaa"


# --- what is written today ---


@pytest.mark.parametrize(
    "bits, dtype, num_layers", [(2, torch.float32, 2), (3, torch.bfloat16, 1)], ids=["2-bits-shared-embedders", "3-bits-bf16"]
)
def test_every_tensor_of_a_vector_quantized_model_is_read_bit_by_bit(tmp_path, bits, dtype, num_layers):
    """In shards."""
    pipeline = new_pipeline(num_layers=num_layers)
    pipeline.transformer.to(dtype)
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans", bits=bits))
    vq4dit.save(quantized, tmp_path / "q", max_shard_size="60KB")
    assert len(list((tmp_path / "q" / "transformer").glob("*.safetensors"))) > 1
    check_read(tmp_path / "q" / "transformer", new_transformer(num_layers=num_layers), {"VQLinear"})


def test_every_tensor_of_an_entropy_coded_model_is_read_bit_by_bit(tmp_path):
    """Beside linears that stay as they are."""
    settings = quick_settings(recipe="best", keep=("*.ff.*",))
    vq4dit.save(vq4dit.quantize(new_pipeline(num_layers=1), settings), tmp_path / "q")
    check_read(tmp_path / "q" / "transformer", new_transformer(num_layers=1), {"EntropyCodedLinear"})


def test_every_tensor_of_a_model_of_both_kinds_is_read_bit_by_bit(tmp_path):
    check_read(save_mixed(tmp_path / "mixed") / "transformer", new_transformer(), {"VQLinear", "EntropyCodedLinear"})


@pytest.mark.parametrize("recipe, kind", [("kmeans", "VQLinear"), ("best", "EntropyCodedLinear")], ids=["vectors", "integers"])
def test_every_tensor_of_a_model_with_convolutions_of_odd_widths_is_read_bit_by_bit(tmp_path, recipe, kind):
    pipeline = sana()
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    odd = pipeline.transformer.config | {"mlp_ratio": (2 * width + 1) / width, "num_layers": 1}
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(odd))
    vq4dit.save(vq4dit.quantize(pipeline, quick_settings(recipe=recipe)), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == (4 if recipe == "kmeans" else 5)
    check_read(tmp_path / "q" / "transformer", pipeline.transformer, {kind})
    names = reference.read_safetensors(next((tmp_path / "q" / "transformer").glob("*.safetensors"))).keys()
    assert not {"transformer_blocks.0.ff.conv_inverted.weight", "transformer_blocks.0.ff.conv_point.weight"} & names


def usual_and_all(scale_class: int, generator: torch.Generator) -> torch.Tensor:
    """The usual integers of a class, and all there are from the least to the largest."""
    usual = (torch.randn(8, 512, generator=generator) * 2 ** ((scale_class - 32) / 4)).round().clamp(-1022, 1022)
    return torch.cat([usual.flatten(), torch.arange(-1022, 1023, 7)])[: 8 * 500].view(8, 500).short()


@pytest.mark.parametrize("scale_class", range(12, 69))
def test_every_integer_of_every_scale_class_is_read(scale_class, generator):
    integers, zeros = usual_and_all(scale_class, generator), torch.zeros(500, dtype=torch.uint8)
    sides = Sides(zeros[:8], zeros[:8] + scale_class, zeros, zeros)
    found, found_sides, _ = reference.decode_lanes(lanes.encode(integers, sides).numpy().tobytes(), 8, 500)
    np.testing.assert_array_equal(found, integers.numpy())
    for side, wanted in zip(found_sides, sides, strict=True):
        np.testing.assert_array_equal(side, wanted.numpy())


@pytest.mark.parametrize("scale_class", range(12, 69, 4))
def test_every_integer_of_every_scale_class_is_read_from_a_single_stream(scale_class, generator):
    integers, zeros = usual_and_all(scale_class, generator), np.zeros(500, np.uint8)
    content = reference.encode_integers(integers.numpy(), [zeros[:8], zeros[:8] + scale_class, zeros, zeros], STREAM_MODELS)
    found, sides = decode(as_tensor(content), torch.tensor(STREAM_MODELS, dtype=torch.uint8), 8, 500)
    assert torch.equal(found, integers) and sides.row_level.tolist() == [scale_class] * 8


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3)], ids=str)
def test_streams_of_any_length_are_read(shape, generator):
    """Also such that are so short that the coder's first state is not full."""
    for _ in range(20):
        integers, _ = separable_integers(*shape, generator)
        lengths = [count for count in shape for _ in range(2)]
        sides = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in lengths]
        content = reference.encode_integers(integers.numpy(), [side.numpy() for side in sides], STREAM_MODELS)
        found, found_sides = decode(as_tensor(content), torch.tensor(STREAM_MODELS, dtype=torch.uint8), *shape)
        assert torch.equal(found, integers)
        assert all(torch.equal(one, other) for one, other in zip(found_sides, sides, strict=True))


@pytest.mark.parametrize("has_gains", [False, True], ids=["steps", "gains"])
@pytest.mark.parametrize("is_trellis", [False, True], ids=["integers", "trellis"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 300), (70, 900)], ids=str)
def test_lanes_of_any_shape_are_read(shape, is_trellis, has_gains, generator):
    integers, _ = separable_integers(*shape, generator)
    row_level, column_level = estimate_levels(integers)
    steps = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in shape]
    gain = torch.rand(shape[1], generator=generator).half().float() if has_gains else None
    sides = Sides(steps[0], row_level, steps[1], column_level)
    content = lanes.encode(integers, sides, gain, is_trellis=is_trellis)
    found, found_sides, found_gain = reference.decode_lanes(content.numpy().tobytes(), *shape)
    ours = lanes.decode(content, *shape)
    np.testing.assert_array_equal(found, ours.integers.numpy())
    for side, wanted in zip(found_sides, ours.sides, strict=True):
        np.testing.assert_array_equal(side, wanted.numpy())
    assert gain is None or np.array_equal(found_gain, gain.numpy())
    weight = lanes.decode_weight(content, *shape, STEP_SIZES)
    np.testing.assert_array_equal(reference.weight_of_lanes(content.numpy().tobytes(), *shape), weight.numpy())


CUTS = {"ragged": (3, 7, 11), "columns": (32, 40, 33), "one lane": (1, 16, 50), "rows": (31, 33, 96), "small": (4, 1, 9)}


@pytest.mark.parametrize("has_gains", [False, True], ids=["steps", "gains"])
@pytest.mark.parametrize("is_trellis", [False, True], ids=["integers", "trellis"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_layers_are_read_however_they_are_cut(cut, is_trellis, has_gains, generator, monkeypatch):
    """A writer chooses lanes, and rows and columns of a chunk; those at the right and at the bottom may be smaller."""
    monkeypatch.setattr(lanes, "_cut", lambda *_: cut)
    shape = (40, 96)
    integers = (torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-4, 7, (96,), generator=generator))).round()
    row_level, column_level = estimate_levels(integers.short())
    sides = Sides(torch.full((40,), 120).byte(), row_level, torch.full((96,), 131).byte(), column_level)
    gain = torch.rand(96, generator=generator).half().float() if has_gains else None
    content = lanes.encode(integers.short(), sides, gain, is_trellis=is_trellis)
    weight = lanes.decode_weight(content, *shape, STEP_SIZES)
    np.testing.assert_array_equal(reference.weight_of_lanes(content.numpy().tobytes(), *shape), weight.numpy())
    assert is_trellis or torch.equal(lanes.decode(content, *shape).integers, integers.short())


@pytest.mark.parametrize("quantizer", reference.EDGES)
def test_frequencies_are_those_of_the_description_on_every_machine(quantizer):
    for scale_class in range(12, 53):
        escape, *found = reference.frequencies_of_lanes(quantizer, scale_class)
        assert frequencies(quantizer, scale_class) == (tuple(found), escape)
        spread = 2 ** ((scale_class - 32) / 4) * 2**0.5
        t = [4096 * erfc(reference.EDGES[quantizer](k) / spread) / 2 for k in range(1, len(found) + 2)]
        rounded = [here - beyond for here, beyond in zip(t, t[1:], strict=False)] + [2 * t[len(found) - 1]]
        assert all(abs(value % 1 - 0.5) > 6e-5 for value in rounded)  # erfc is right to 1e-15


def test_scale_indices_are_eighths_of_an_octave():
    index = torch.arange(256, dtype=torch.uint8)
    found = reference.scale_of(index.numpy())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, step_size(index).numpy())


# --- what FORMAT.md says of itself ---


def test_the_tables_have_the_checksum_that_is_told():
    digest = hashlib.sha256()
    for scale_class in range(12, 69):
        assert sum(reference.frequencies(scale_class)) == 2**24
        digest.update(np.array(reference.starts(scale_class), "<u4").tobytes())
    assert digest.hexdigest() in FORMAT
    assert ", ".join(map(str, reference.starts(32)[1020:1028])) in FORMAT
    assert all(f"{mantissa:08x}" in FORMAT for mantissa in reference.MANTISSAS.tolist())


def test_the_example_is_decoded_as_it_is_told():
    assert " ".join(EXAMPLE.hex()[i : i + 8] for i in (0, 8, 16)) in FORMAT and str(EXAMPLE_MODELS) in FORMAT
    integers, sides = reference.decode_integers(EXAMPLE, EXAMPLE_MODELS, 2, 3)
    assert integers.tolist() == [[0, 1, -2], [3, 0, 0]]
    assert [side.tolist() for side in sides] == [[120, 124], [18, 22], [128, 129, 120], [16, 14, 15]]
    tensors = {"x.coded_integers": np.frombuffer(EXAMPLE, "u1"), "x.side_models": np.array(EXAMPLE_MODELS, "u1")}
    weight = reference.weight_of(tensors, "x", 2, 3).astype(str).tolist()
    assert weight == [["0.0", "0.5452539", "-0.5"], ["2.1213202", "0.0", "0.0"]]
    stream = reference.Stream(EXAMPLE)
    for scale_class in (38, 38, 38, 38, 41, 41, 41, 30, 30, 30, 32, 33, 34, 36, 37, 38):
        state = f"{stream.state:016x}"
        assert state in FORMAT or scale_class in (41, 30, 36, 37)  # of several symbols the first is shown
        stream.read(scale_class)


def test_the_tables_of_lanes_have_the_checksum_that_is_told():
    digest = hashlib.sha256()
    for quantizer in reference.EDGES:
        for scale_class in range(12, 53):
            found = reference.frequencies_of_lanes(quantizer, scale_class)
            assert found[0] + found[1] + 2 * sum(found[2:]) == 4096
            digest.update(np.array([*found, *[0] * (129 - len(found))], "<u2").tobytes())
        assert ", ".join(map(str, reference.frequencies_of_lanes(quantizer, 32)[1:])) in FORMAT
    assert digest.hexdigest() in FORMAT


def test_the_example_of_lanes_is_decoded_as_it_is_told():
    assert EXAMPLE_OF_LANES in FORMAT
    content = bytes.fromhex(EXAMPLE_OF_LANES)
    integers, sides, gains = reference.decode_lanes(content, 2, 3)
    assert integers.tolist() == [[0, 1, -2], [3, 0, 0]] and gains is None
    assert [side.tolist() for side in sides] == [[120, 124], [18, 22], [128, 129, 120], [16, 14, 15]]
    words = np.frombuffer(content, "<u2").tolist()
    chunk = reference.Chunk(words[20:], 1)
    for scale_class, z in ((34, 0), (32, 1), (33, -2), (38, 3), (36, 0)):
        assert f"{chunk.states[0]:08x}" in FORMAT and chunk.read(0, "integers", scale_class) == z


# --- damage ---


@cache
def coded() -> tuple[bytes, list[list[int]]]:
    integers, _ = separable_integers(6, 9, torch.Generator().manual_seed(0))
    sides = [(20 + np.arange(n) % 3).astype(np.uint8) for n in (6, 6, 9, 9)]
    return reference.encode_integers(integers.numpy(), sides, STREAM_MODELS), STREAM_MODELS


@pytest.mark.parametrize(
    "damage",
    [
        lambda stream: stream[:-4],
        lambda stream: stream[4:],
        lambda stream: stream[:-1],
        lambda stream: b"",
        lambda stream: stream + stream[-4:],
        lambda stream: stream[:4] + stream,
        lambda stream: stream + bytes(4),
        lambda stream: bytes(len(stream)),
    ],
    ids=["end", "start", "a byte", "all", "more", "more before", "zeros behind", "zeros"],
)
def test_both_refuse_a_damaged_stream(damage):
    content, models = coded()
    content = damage(content)
    with pytest.raises(reference.DamagedError):
        reference.decode_integers(content, models, 6, 9)
    with pytest.raises(FormatError):
        decode(as_tensor(content), torch.tensor(models, dtype=torch.uint8), 6, 9)


@pytest.mark.parametrize("kind, entry, value", [(0, 1, 11), (3, 1, 69), (0, 0, 0), (1, 0, 0)])
def test_both_refuse_impossible_side_models(kind, entry, value):
    content, models = coded()
    changed = [list(model) for model in models]
    changed[kind][entry] = value
    with pytest.raises(reference.DamagedError):
        reference.decode_integers(content, changed, 6, 9)
    with pytest.raises(FormatError):
        decode(as_tensor(content), torch.tensor(changed, dtype=torch.uint8), 6, 9)
