"""What cannot be done with packed layers is refused before it changes anything, and it is said what to do instead."""

import pytest
import torch
from coded_models import KINDS
from tiny import quick_settings
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import vq4dit
from vq4dit.layers.packed import PackedLinear

ROWS, COLUMNS = 12, 16


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def layer(kind) -> PackedLinear:
    return KINDS[kind](ROWS, COLUMNS, torch.Generator().manual_seed(0))


@pytest.fixture(params=["load", "forward"])
def mode(request, layer) -> str:
    if request.param == "load":
        layer.decode()
    return request.param


# --- tensors in place of ours ---


class Double(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2


PRUNINGS = {
    "random": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "smallest": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "of packed tensors": lambda layer: prune.random_unstructured(layer, layer.BYTES[0], 0.5),
    "of the bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "of several": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.3),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, layer.BYTES[0], Double(), unsafe=True),
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", Double()),
    "a weight": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(ROWS, COLUMNS))),
    "a mask": lambda layer: layer.register_buffer("mask", torch.zeros(ROWS, COLUMNS)),
    "a module": lambda layer: layer.register_module("adapter", nn.Identity()),
}


@pytest.mark.parametrize("change", PRUNINGS.values(), ids=PRUNINGS)
def test_a_packed_layer_takes_no_other_tensors(layer, mode, change):
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted, names = layer(x), set(layer.state_dict())
    with pytest.raises(ValueError, match="vq4dit.dequantize"):
        change(layer)
    assert torch.equal(layer(x), wanted) and set(layer.state_dict()) == names


@pytest.mark.parametrize("ask", [lambda layer: layer.requires_grad_(), lambda layer: layer.requires_grad_(True)])
def test_no_gradients_are_asked_of_packed_tensors(layer, ask):
    with pytest.raises(ValueError, match="takes no gradients.*vq4dit.dequantize"):
        ask(layer)
    layer.requires_grad_(False)


# --- state dicts ---


def with_value(index: int, value: float):
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


DAMAGES = {
    "bytes in fp8": ("bytes", lambda t: t.to(torch.float8_e4m3fn), "must hold bytes"),
    "bytes in int8": ("bytes", lambda t: t.to(torch.int8), "must hold bytes"),
    "bytes that are none": ("bytes", lambda t: with_value(0, 0.5)(t.float()), "must hold bytes"),
    "a codebook in bf16": ("codebook", lambda t: t.to(torch.bfloat16), "must hold fp16 values"),
    "a codebook in fp8": ("codebook", lambda t: t.to(torch.float8_e5m2), "must hold fp16 values"),
    "a codebook with NaN": ("codebook", with_value(3, torch.nan), "not finite"),
    "a codebook with infinity": ("codebook", with_value(3, torch.inf), "not finite"),
    "a bias with NaN": ("bias", with_value(3, torch.nan), "not finite"),
    "a stream of nonsense": ("coded_weight", lambda t: torch.full_like(t, 255), ""),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_dict_is_refused_and_the_layer_stays(layer, mode, name, damage, message, assign):
    name = layer.BYTES[0] if name == "bytes" else name
    if not hasattr(layer, name):
        pytest.skip("of the other kind")
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted, decoded = layer(x), layer.decoded_weight is not None
    model = nn.Sequential(layer)
    tensors = {f"0.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}
    tensors[f"0.{name}"] = damage(tensors[f"0.{name}"])
    with pytest.raises(vq4dit.FormatError, match=f"0.*{message}"):
        model.load_state_dict(tensors, assign=assign)
    assert torch.equal(layer(x), wanted) and (layer.decoded_weight is not None) == decoded


def test_an_assignment_outside_the_codebook_is_found_in_both_modes(generator):
    codebook, assignments = torch.randn(10, 2, generator=generator), torch.randint(10, (96,), generator=generator)
    layer = vq4dit.VQLinear.from_assignments(codebook, assignments, (ROWS, COLUMNS))
    tensors = layer.state_dict() | {"packed_assignments": torch.full_like(layer.packed_assignments, 255)}
    for _ in range(2):
        before = layer.packed_assignments.clone()
        with pytest.raises(vq4dit.FormatError, match="assignment 15 is outside its codebook of 10 codewords"):
            layer.load_state_dict(tensors)
        assert torch.equal(layer.packed_assignments, before)
        layer.decode()


def test_tensors_of_another_shape_leave_a_layer_as_it_was(layer, mode):
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted = layer(x)
    tensors = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    tensors[layer.BYTES[-1]] = tensors[layer.BYTES[-1]].flatten()[:-1]
    tensors["bias"] += 1
    may_have_another_length = layer.BYTES[-1] == "coded_weight"
    error, message = (vq4dit.FormatError, "are damaged") if may_have_another_length else (RuntimeError, "size mismatch")
    with pytest.raises(error, match=message):
        layer.load_state_dict(tensors)
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_types_that_hold_every_byte_are_taken(layer, mode, dtype):
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted = layer(x)
    tensors = {key: t.to(dtype) if key in layer.BYTES else t for key, t in layer.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict(tensors, assign=assign)
        assert torch.equal(layer(x), wanted) and getattr(layer, layer.BYTES[0]).dtype == torch.uint8


# --- pipelines ---


@pytest.mark.parametrize("recipe", ["kmeans", "best"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_part_that_is_not_finite_is_named_before_the_work(pipeline, recipe, value, monkeypatch):
    monkeypatch.setattr("vq4dit.recipes.quantize.FINITE_CHUNK", 10)
    name, parameter = list(pipeline.vae.named_parameters())[5]
    parameter.data.view(-1)[-1] = value
    with pytest.raises(vq4dit.UnsupportedModelError, match=f"^vae.{name} has values that are not finite"):
        vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
