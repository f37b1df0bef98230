"""A weight is never older than the packed tensors that it was decoded from, however those were changed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from coded_models import KINDS
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

import vq4dit
from vq4dit.layers.packed import PackedLinear
from vq4dit.layers.watched import WatchedParameter, digest, frozen, is_held_elsewhere, mark

ROWS, COLUMNS = 12, 16


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def new_layer(kind: str, seed: int) -> PackedLinear:
    return KINDS[kind](ROWS, COLUMNS, torch.Generator().manual_seed(seed))


def of_one_length(kind: str, seed: int, length: int | None = None) -> PackedLinear:
    """Another layer whose tensors have the same shapes."""
    while True:
        layer = new_layer(kind, seed)
        if length is None or kind == "vector-quantized" or len(getattr(layer, layer.BYTES[0])) == length:
            return layer
        seed += 1


@pytest.fixture
def layer(kind) -> PackedLinear:
    return new_layer(kind, 0)


@pytest.fixture
def other(kind, layer) -> PackedLinear:
    return of_one_length(kind, 1, len(getattr(layer, layer.BYTES[0])))


@pytest.fixture(params=["load", "forward"])
def mode(request, layer) -> str:
    if request.param == "load":
        layer.decode()
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5))


def each(change):
    def change_all(layer: PackedLinear, other: PackedLinear) -> None:
        for p, q in zip(layer.parameters(), other.parameters(), strict=True):
            change(p, q.detach())

    return change_all


def replace_parameters(layer, other):
    for name, p in other.named_parameters():
        setattr(layer, name, nn.Parameter(p.detach().clone(), requires_grad=False))


CHANGES = {
    "data =": each(lambda p, q: setattr(p, "data", q.clone())),
    "data.copy_": each(lambda p, q: p.data.copy_(q)),
    "copy_": each(lambda p, q: p.copy_(q)),
    "copy_ at once": lambda layer, other: torch._foreach_copy_(
        [p.data for p in layer.parameters()], [*other.parameters()], non_blocking=False
    ),
    "numpy": each(lambda p, q: np.copyto(p.numpy(), q.numpy())),
    "set_": each(lambda p, q: p.set_(q.clone())),
    "row by row": each(lambda p, q: [p.view(-1)[i].copy_(value) for i, value in enumerate(q.view(-1))]),
    "other parameters": replace_parameters,
    "EMA": lambda layer, other: EMAModel(other.parameters()).copy_to(layer.parameters()),
    "EMA at once": lambda layer, other: EMAModel(other.parameters(), foreach=True).copy_to(layer.parameters()),
    "in inference mode": torch.inference_mode()(each(lambda p, q: p.data.copy_(q))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_computes_with_the_packed_tensors_that_it_has(layer, mode, other, change, x):
    wanted, before = other(x), layer(x)
    with torch.no_grad():
        change(layer, other)
    assert not torch.equal(before, wanted) and torch.equal(layer(x), wanted)
    assert not layer.is_changed and torch.equal(layer.weight, other.weight)
    assert (layer.decoded_weight is None) == (mode == "forward")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_so_does_a_copy(layer, mode, other, again, x):
    wanted, copied = other(x), again(layer)
    assert torch.equal(copied(x), layer(x))
    for p, q in zip(copied.parameters(), other.parameters(), strict=True):
        p.data.copy_(q)
    assert torch.equal(copied(x), wanted) and not torch.equal(layer(x), wanted)


def test_called_with_other_tensors_a_layer_computes_with_those_for_once(kind, layer, mode, other, x):
    before, wanted = layer(x), other(x)
    tensors = {name: p.detach().clone() for name, p in other.named_parameters()}
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(layer, tensors, (x,)), wanted)
        assert torch.equal(layer(x), before)
    for seed in (2, 3, 4):  # whose memory may be where that of the one before was
        another = of_one_length(kind, seed)
        if all(p.shape == q.shape for p, q in zip(layer.parameters(), another.parameters(), strict=True)):
            found = torch.func.functional_call(layer, {n: p.detach().clone() for n, p in another.named_parameters()}, (x,))
            assert torch.equal(found, another(x))
    assert torch.equal(layer(x), before)


def test_what_was_merged_is_not_lost_by_other_packed_tensors(layer, mode, other, x):
    layer.weight.data += 1
    merged = layer(x)
    tensors = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(vq4dit.FormatError, match="packed tensors .* were changed after .*merged LoRA"):
        torch.func.functional_call(layer, tensors, (x,))
    assert torch.equal(layer(x), merged)


def test_a_layer_that_nobody_touches_is_decoded_and_hashed_once(layer, x, monkeypatch):
    layer.decode()
    monkeypatch.setattr("vq4dit.layers.held_weight.digest", lambda *_: pytest.fail("hashed"))
    monkeypatch.setattr(type(layer), "reconstruct", lambda *_: pytest.fail("decoded"))
    for _ in range(3):
        layer(x)
        layer.to("cpu")
        layer.train().eval()
    assert layer.weight.shape == (ROWS, COLUMNS) and layer.device.type == "cpu" and next(layer.parameters()).nbytes


def test_tensors_that_are_only_looked_at_are_not_decoded_again(layer, x, monkeypatch):
    layer.decode()
    wanted = layer(x)
    monkeypatch.setattr(type(layer), "reconstruct", lambda *_: pytest.fail("decoded"))
    layer.state_dict()
    assert all(p.data.nbytes for p in layer.parameters())
    assert torch.equal(layer(x), wanted)


def test_values_that_are_no_weight_are_refused_when_they_are_used(x):
    layer = new_layer("vector-quantized", 0)
    layer.decode()
    layer.codebook.data[3] = torch.nan
    with pytest.raises(vq4dit.FormatError, match="not finite"):
        layer(x)


@pytest.mark.parametrize(
    "values", [torch.arange(6.0).reshape(2, 3), torch.arange(5, dtype=torch.uint8), torch.zeros(())], ids=str
)
def test_a_digest_tells_bits_types_and_shapes(values):
    assert digest(values) == digest(values.clone()) != digest(values + 1)
    assert digest(values) != digest(values.double()) and digest(values) != digest(values[None])
    assert digest(values, values) != digest(values)
    assert digest(values.expand(3, *values.shape)) == digest(values.expand(3, *values.shape).contiguous())


@pytest.mark.parametrize(
    "look",
    [
        lambda p: p.shape,
        lambda p: p + 1,
        lambda p: p.dtype,
        lambda p: p.clone(),
        lambda p: p.sum().item(),
        lambda p: p.to("cpu"),
    ],
)
def test_reading_is_no_change(look):
    parameter = frozen(torch.ones(3))
    before = mark(parameter)
    look(parameter)
    assert mark(parameter) == before and isinstance(parameter, WatchedParameter) and isinstance(parameter, nn.Parameter)


def test_memory_is_somebody_elses_as_long_as_he_has_it():
    values = torch.ones(4, 5)
    assert not is_held_elsewhere(values)
    for look in (lambda v: v.T, lambda v: v.numpy(), lambda v: v.untyped_storage(), lambda v: v[1:][0], lambda v: v.detach()):
        view = look(values)
        assert is_held_elsewhere(values)
        del view
        assert not is_held_elsewhere(values)
