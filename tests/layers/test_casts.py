"""No cast changes what packed tensors say: it is undone, or refused."""

import pytest
import torch
from coded_models import new_coded, new_vector_quantized, save_mixed
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn

import vq4dit
from vq4dit.layers.casts import as_bytes, as_scales
from vq4dit.pipelines.decode_modes import packed_layers

WIDE = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int32, torch.int64]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool]
ROWS, COLUMNS = 12, 16
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_every_byte_comes_back_from_every_wider_type(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(values.to(dtype), "bytes"), values)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_types_that_lose_bytes_are_refused(dtype):
    with pytest.raises(vq4dit.FormatError, match="to_q.packed_assignments must hold bytes, and was cast to"):
        as_bytes(torch.arange(256, dtype=torch.uint8).to(dtype), "to_q.packed_assignments")


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, torch.nan, torch.inf])
def test_what_are_no_bytes_any_more_is_refused(value):
    with pytest.raises(vq4dit.FormatError, match="or changed"):
        as_bytes(torch.tensor([1.0, value]), "bytes")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_fp16_values_come_back_from_types_that_hold_them(dtype, generator):
    values = torch.randn(100, generator=generator).half()
    assert torch.equal(as_scales(values.to(dtype), "codebook"), values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32], ids=str)
def test_types_that_round_a_codebook_are_refused(dtype):
    with pytest.raises(vq4dit.FormatError, match="to_q.codebook must hold fp16 values, and was cast to"):
        as_scales(torch.ones(3).to(dtype), "to_q.codebook")


@pytest.mark.parametrize("kind", ["vector-quantized", "coded"])
@pytest.mark.parametrize("decoded", [False, True], ids=["packed", "decoded"])
def test_storing_a_layer_in_fp8_changes_no_number_of_it(kind, decoded, generator):
    """Layerwise casting moves each layer to fp8 after its forward pass and back before the next."""
    layer = (
        new_vector_quantized(ROWS, COLUMNS, generator) if kind == "vector-quantized" else new_coded(ROWS, COLUMNS, generator)
    )
    if decoded:
        layer.decode()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, COLUMNS, generator=generator)
    wanted = layer(x)
    for _ in range(2):
        layer.to(torch.float8_e4m3fn)
        assert layer.weight.dtype == torch.float32
        layer.to(torch.float32)
    assert torch.equal(layer(x), wanted) and not layer.is_changed
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("kind", ["vector-quantized", "coded"])
def test_a_decoded_weight_is_cast_as_if_it_had_been_decoded_so(kind, generator):
    layer = (
        new_vector_quantized(ROWS, COLUMNS, generator) if kind == "vector-quantized" else new_coded(ROWS, COLUMNS, generator)
    )
    layer.decode(torch.float16)
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.bfloat16 and not layer.is_changed
    assert torch.equal(layer.decoded_weight, layer.reconstruct(torch.bfloat16))


def test_a_written_weight_is_cast_and_stays_written(generator):
    layer = new_vector_quantized(ROWS, COLUMNS, generator)
    layer.weight.data += 1
    layer.to(torch.bfloat16)
    assert layer.is_changed and torch.equal(layer.decoded_weight, (layer.reconstruct(torch.float32) + 1).bfloat16())


# --- models ---


def vectors_to_fp32(model: nn.Module) -> None:
    """As a model is prepared for training of adapters: small parameters in fp32, whatever they hold."""
    for p in model.parameters():
        p.requires_grad = False
        if p.ndim == 1:
            p.data = p.data.to(torch.float32)


def everything_to(dtype: torch.dtype):
    def cast(model: nn.Module) -> None:
        for p in model.parameters():
            p.data = p.data.to(dtype)

    return cast


CASTS = {
    "vectors to fp32": vectors_to_fp32,
    "all to fp64": everything_to(torch.float64),
    "all to fp16": everything_to(torch.float16),
}


@pytest.fixture(scope="session")
def mixed_model_folder(tmp_path_factory):
    return save_mixed(tmp_path_factory.mktemp("casts") / "tiny") / "transformer"


@pytest.mark.parametrize("mode", ["load", "forward"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_model_whose_parameters_were_cast_is_saved_exactly(tmp_path, mixed_model_folder, one_step_input, cast, mode):
    with vq4dit.decode_mode(mode):
        model = DiTTransformer2DModel.from_pretrained(mixed_model_folder).eval()
    wanted = model(**one_step_input).sample
    cast(model)
    if cast is vectors_to_fp32:
        assert torch.equal(model(**one_step_input).sample, wanted)
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (mixed_model_folder / WEIGHTS).read_bytes()
    assert torch.equal(DiTTransformer2DModel.from_pretrained(tmp_path)(**one_step_input).sample, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_casts_that_lose_packed_numbers_are_refused_when_saving_and_computing(
    tmp_path, mixed_model_folder, one_step_input, dtype
):
    with vq4dit.decode_mode("forward"):
        model = DiTTransformer2DModel.from_pretrained(mixed_model_folder)
    for layer in packed_layers(model).values():
        everything_to(dtype)(layer)
    with pytest.raises(vq4dit.FormatError, match=f"was cast to {dtype}"):
        model(**one_step_input)
    with pytest.raises(vq4dit.FormatError, match=f"was cast to {dtype}"):
        model.save_pretrained(tmp_path)


def test_a_model_under_layerwise_casting_is_saved_with_its_packed_numbers(tmp_path, mixed_model_folder, one_step_input):
    model = DiTTransformer2DModel.from_pretrained(mixed_model_folder).eval()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    wanted = model(**one_step_input).sample
    model.save_pretrained(tmp_path)
    found, original = (load_file(folder / WEIGHTS) for folder in (tmp_path, mixed_model_folder))
    assert found.keys() == original.keys() and {t.dtype for t in found.values()} == {torch.float16, torch.uint8}
    for name in packed_layers(model):
        assert all(torch.equal(found[key], original[key]) for key in original if key.startswith(f"{name}."))
    again = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**one_step_input).sample, wanted, rtol=1e-4, atol=1e-5)
