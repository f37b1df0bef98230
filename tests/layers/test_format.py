"""Format versions 1, 3 and 5: files made once load for ever, and need nothing but numpy and safetensors to be read."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import reference_decoder as reference
import torch
from safetensors.numpy import load_file

from vq4dit.layers import lanes
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear
from vq4dit.layers.scale_classes import Sides, estimate_levels
from vq4dit.layers.schema import stored
from vq4dit.layers.vector import VQLinear
from vq4dit.pipelines.decode_modes import packed_layers

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.safetensors"
GOLDEN_CODED = GOLDEN.with_name("v3.safetensors")
GOLDEN_LANES = GOLDEN.with_name("v5.safetensors")
SHAPES_OF_LANES = {
    **dict.fromkeys(("plain", "extreme", "zeros", "trellis", "gains"), (48, 72)),
    "chunks": (150, 203),
    "chunks-of-a-trellis": (150, 150),
}
GOLDEN_MODEL = GOLDEN.with_name("v1-mixed")


def decode(tensors: dict[str, np.ndarray], name: str, rows: int, columns: int) -> np.ndarray:
    """FORMAT.md's description of the format, in numpy."""
    codebook = tensors[f"{name}.codebook"]  # (k, d) fp16
    k, d = codebook.shape
    bits = max(1, int(k - 1).bit_length())
    count = rows * columns // d
    stream = np.unpackbits(tensors[f"{name}.packed_assignments"], bitorder="little")[: count * bits]
    assignments = stream.reshape(count, bits) @ (1 << np.arange(bits))
    weight = codebook[assignments].reshape(rows, columns).astype(np.float32)
    if f"{name}.row_scale" in tensors:
        weight *= tensors[f"{name}.row_scale"].astype(np.float32)[:, None]
    return weight


def golden_layers() -> dict[str, VQLinear]:
    """One layer of every kind: widths of 2, 3, 4 bits, k no power of two, a row scale, no bias."""
    generator = torch.Generator().manual_seed(1)
    kinds = {
        "two": (256, 4, False, True),
        "three": (64, 2, False, True),
        "four": (256, 2, True, True),
        "odd": (200, 4, True, False),
    }
    layers = {}
    for name, (k, d, scaled, biased) in kinds.items():
        assignments = torch.randint(k, (8 * 24 // d,), generator=generator)
        codebook = torch.randint(-512, 512, (k, d), generator=generator) / 256
        row_scale = torch.randint(1, 9, (8,), generator=generator) / 4 if scaled else None
        bias = torch.arange(8) / 8 if biased else None
        layers[name] = VQLinear.from_assignments(codebook, assignments, (8, 24), bias, row_scale)
    return layers


def test_a_file_is_read_by_its_description_with_numpy_alone():
    tensors = load_file(GOLDEN)
    for name, layer in golden_layers().items():
        np.testing.assert_array_equal(decode(tensors, name, 8, 24), layer.reconstruct(torch.float32).numpy())


def test_packed_bytes_never_change():
    tensors = load_file(GOLDEN)
    for name, layer in golden_layers().items():
        assert layer.packed_assignments.numpy().tobytes() == tensors[f"{name}.packed_assignments"].tobytes()
    digest = hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    assert digest == "5ef0809deff32ab1f97cfd0ae21227a24430668cbe9e92c336f97cb7655e5bc0"


def test_a_quantized_model_is_read_with_numpy_alone(quantized_folder):
    from diffusers import DiTTransformer2DModel

    tensors = load_file(quantized_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    model = DiTTransformer2DModel.from_pretrained(quantized_folder, subfolder="transformer")
    names = [key.removesuffix(".codebook") for key in tensors if key.endswith(".codebook")]
    assert len(names) == 14
    for name in names:
        layer = model.get_submodule(name)
        wanted = layer.reconstruct(torch.float32).numpy()
        np.testing.assert_array_equal(decode(tensors, name, layer.out_features, layer.in_features), wanted)


def test_a_golden_model_of_different_widths_loads_for_ever():
    """A DiT of one block, as diffusers saved it; its layers' k and d differ and stand nowhere but in their tensors."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(GOLDEN_MODEL).eval()
    layers = packed_layers(model)
    assert {tuple(layer.codebook.shape) for layer in layers.values()} == {(16, 4), (8, 2), (16, 2), (13, 4)}
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(name.encode() + layer.reconstruct(torch.float32).numpy().tobytes())
    assert digest.hexdigest() == "a39c383322fa09dfdd1a54bb45b62ede67f4eb04a05969fecc7a6fd741bcacaa"
    output = model(torch.ones(1, 4, 4, 4), timestep=torch.tensor([5]), class_labels=torch.tensor([2])).sample
    assert output.shape == (1, 4, 4, 4) and output.isfinite().all()


def test_a_golden_file_of_coded_integers_is_read_for_ever():
    tensors, digest = load_file(GOLDEN_CODED), hashlib.sha256()
    for name in ("plain", "extreme", "zeros"):
        parts = {key.rpartition(".")[2]: torch.from_numpy(value) for key, value in tensors.items() if key.startswith(name)}
        found = SingleStreamLinear.from_tensors(parts, (16, 24)).reconstruct(torch.float32).numpy()
        np.testing.assert_array_equal(found, reference.weight_of(tensors, name, 16, 24))
        digest.update(found.tobytes())
    assert digest.hexdigest() == "d20da7376ebcf68cbbf59c38a0c7673450753f9fd7d8873dabe063df98a55df0"


def golden_lanes() -> dict[str, torch.Tensor]:
    """Integers, large ones, zeros, a trellis, gains; and of several chunks, ragged at their ends, integers and a trellis."""
    found = {}
    for name, (rows, columns) in SHAPES_OF_LANES.items():
        i = torch.arange(rows * columns)
        bell = (i * 7919 % 9 + i * 104729 % 9 + i * 1299709 % 9 - 12) * (1 + i % 5) // 2
        wide = i * 7919 % 2045 - 1022
        values = wide if name in ("extreme", "chunks", "chunks-of-a-trellis") else 0 * i if name == "zeros" else bell
        integers = (values // 2 if name == "trellis" else values).view(rows, columns).short()
        row_level, column_level = estimate_levels(integers)
        sides = Sides(
            (100 + torch.arange(rows) % 50).byte(), row_level, (110 + torch.arange(columns) % 30).byte(), column_level
        )
        gain = ((1 + torch.arange(columns)) / 64).half().float() if name == "gains" else None
        found[name] = lanes.encode(integers, sides, gain, is_trellis="trellis" in name)
    return found


def test_a_golden_file_of_lanes_is_read_for_ever():
    tensors, digest = load_file(GOLDEN_LANES), hashlib.sha256()
    for name, shape in SHAPES_OF_LANES.items():
        parts = {"coded_weight": torch.from_numpy(tensors[f"{name}.coded_weight"])}
        found = EntropyCodedLinear.from_tensors(parts, shape).reconstruct(torch.float32).numpy()
        np.testing.assert_array_equal(found, reference.weight_of(tensors, name, *shape))
        digest.update(found.tobytes())
    assert digest.hexdigest() == "ef256fc60e7ac6de949f75a288da79367d9b03d38004aec7a0cb021b2cc3c03f"


def test_lanes_are_written_as_they_were():
    """`save_file({f"{name}.coded_weight": content for name, content in golden_lanes().items()}, GOLDEN_LANES)` made it."""
    tensors = load_file(GOLDEN_LANES)
    made = golden_lanes()
    assert made.keys() == {name.removesuffix(".coded_weight") for name in tensors}
    for name, content in made.items():
        assert content.numpy().tobytes() == tensors[f"{name}.coded_weight"].tobytes(), name
    num_chunks = [math.prod(map(math.ceil, np.divide(SHAPES_OF_LANES[n], made[n][8:16].numpy().view("<u4")))) for n in made]
    assert num_chunks[-2] > 3 and num_chunks[-1] > 2


@pytest.mark.parametrize("name, size", [("two", 48), ("three", 72), ("four", 96), ("odd", 48)])
def test_assignments_take_log2_k_bits_each(name, size):
    assert golden_layers()[name].packed_assignments.numel() == size


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([1.5], torch.float16),
        ([2.0**100], torch.bfloat16),
        ([2.0**100 + 2.0**80], torch.float32),
        ([1.0 + 2**-10], torch.float16),
    ],
    ids=["both", "too-large-for-fp16", "neither", "too-fine-for-bf16"],
)
def test_what_is_not_quantized_is_stored_in_the_first_type_that_holds_it(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float32)
    found = stored("proj_out.weight", tensor, torch.float16)
    assert found.dtype == dtype and torch.equal(found.float(), tensor)
