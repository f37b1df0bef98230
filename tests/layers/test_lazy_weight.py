"""The weight of a packed layer: looking at it changes nothing, writing into it is used, noticed, and can be taken back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from coded_models import new_coded, new_vector_quantized
from torch import Tensor, nn

from vq4dit.layers.packed import PackedLinear

ROWS, COLUMNS = 12, 16


@pytest.fixture(params=["vector-quantized", "coded"])
def layer(request, generator) -> PackedLinear:
    return (
        new_vector_quantized(ROWS, COLUMNS, generator)
        if request.param == "vector-quantized"
        else new_coded(ROWS, COLUMNS, generator)
    )


@pytest.fixture(params=["load", "forward"])
def mode(request, layer) -> str:
    if request.param == "load":
        layer.decode()
    return request.param


@pytest.fixture
def delta(generator) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(3, COLUMNS, generator=generator)


def test_looking_decodes_nothing(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "reconstruct", lambda *_: pytest.fail("numbers were asked for"))
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.shape == weight.data.shape == (ROWS, COLUMNS) and weight.device.type == "cpu"
    assert weight.dtype == weight.detach().dtype == torch.float32 and not weight.requires_grad and weight.grad is None
    assert weight.numel() == ROWS * COLUMNS and weight.dim() == weight.ndim == 2 and len(weight) == ROWS
    assert weight.element_size() == 4 and weight.is_floating_point() and weight.is_contiguous() and not weight.is_meta
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    assert layer.decoded_weight is None


def test_computing_with_it_keeps_nothing_that_was_not_kept(layer, mode, x):
    wanted, kept = layer.reconstruct(torch.float32), layer.decoded_weight
    assert torch.equal(layer.weight, wanted) and torch.equal(layer.weight.data + 0, wanted)
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, wanted)) and torch.equal(layer.weight.clone(), wanted)
    assert torch.equal(layer.weight.to(torch.float32), wanted) and torch.equal(layer.weight @ x.T, wanted @ x.T)
    assert torch.equal(copy.deepcopy(layer.weight), wanted) and torch.equal(
        torch.stack([layer.weight, layer.weight])[1], wanted
    )
    assert str(layer.weight).startswith("tensor(") and layer.weight.norm() == wanted.norm()
    assert layer.decoded_weight is kept and not layer.is_changed


WRITES = {
    "data +=": lambda layer, new: layer.weight.data.__iadd__(new - layer.weight),
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "data.copy_": lambda layer, new: layer.weight.data.copy_(new),
    "data =": lambda layer, new: setattr(layer.weight, "data", new),
    "weight = tensor": lambda layer, new: setattr(layer, "weight", new),
    "weight = parameter": lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
    "rows": lambda layer, new: layer.weight.__setitem__(slice(None), new),
    "rows of data": lambda layer, new: layer.weight.data.__setitem__(slice(None), new),
    "a view": lambda layer, new: layer.weight.T.copy_(new.T),
    "a view of one row after the other": lambda layer, new: [layer.weight[i].copy_(new[i]) for i in range(ROWS)],
    "numpy": lambda layer, new: layer.weight.numpy().__setitem__(slice(None), new.numpy()),
    "out": lambda layer, new: torch.add(new, 0, out=layer.weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_is_written_is_used_and_noticed(layer, mode, delta, x, write):
    with torch.no_grad():
        write(layer, delta)
    torch.testing.assert_close(layer(x), F.linear(x, delta, layer.bias))
    assert layer.is_changed and "block.to_q" in layer.told_change("block.to_q")
    layer.drop_decoded()
    assert not layer.is_changed


def test_initialisation_is_a_write(layer, mode, x):
    nn.init.ones_(layer.weight)
    torch.testing.assert_close(layer(x), F.linear(x, torch.ones(ROWS, COLUMNS), layer.bias))
    assert layer.is_changed


def test_augmented_assignment_is_a_write(layer, mode, delta, x):
    wanted = layer(x) + 2 * F.linear(x, delta)
    layer.weight.data += delta
    layer.weight += delta
    torch.testing.assert_close(layer(x), wanted)
    assert layer.is_changed and "merged LoRA" in layer.told_change("to_q")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_was_added_and_is_subtracted_again_leaves_nothing_behind(layer, mode, dtype, generator):
    layer.to(dtype)
    packed = layer.reconstruct(dtype)
    first, second = (torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for _ in range(2))
    layer.weight.data += first
    layer.weight.data += second
    layer.weight.data -= second
    assert layer.is_changed
    layer.weight.data -= first
    assert not layer.is_changed and torch.equal(layer.weight, packed) and (layer.decoded_weight is None) == (mode == "forward")


def test_a_merge_into_a_copy_can_be_taken_back_too(layer, mode, delta):
    packed = layer.reconstruct(torch.float32)
    merged = layer.weight.data.clone()
    merged += delta
    layer.weight.data = merged
    layer.weight.data -= delta
    assert torch.equal(layer.weight, packed) and (layer.decoded_weight is None) == (mode == "forward")


def test_something_else_that_is_subtracted_is_a_change(layer, mode, delta):
    layer.weight.data += delta
    layer.weight.data -= delta / 2
    assert layer.is_changed
    torch.testing.assert_close(layer.weight + 0, layer.reconstruct(torch.float32) + delta / 2)


def test_a_layer_may_be_given_its_own_weight(layer, mode):
    kept = layer.decoded_weight
    layer.weight = layer.weight  # as PEFT does when it unloads
    layer.weight.data = layer.weight.data
    assert layer.decoded_weight is kept and not layer.is_changed


def test_a_weight_of_another_shape_is_refused(layer):
    with pytest.raises(ValueError, match="is 12 x 16, got \\(16, 12\\)"):
        layer.weight = torch.zeros(COLUMNS, ROWS)


@pytest.mark.parametrize("ask", [lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True), nn.Parameter])
def test_gradients_of_a_packed_weight_are_refused(layer, ask):
    with pytest.raises(ValueError, match="takes no gradients"):
        ask(layer.weight)


def test_gradients_pass_through_to_what_is_beside_it(layer, mode, x):
    scale = torch.ones(ROWS, 1, requires_grad=True)
    F.linear(x, layer.weight * scale).sum().backward()
    assert scale.grad.abs().sum() > 0 and not layer.is_changed


def test_what_was_learned_and_is_merged_takes_its_graph_nowhere(layer, mode, delta):
    learned = delta.clone().requires_grad_()
    layer.weight.data += 2 * learned
    assert not layer.weight.requires_grad and not layer.decoded_weight.requires_grad and layer.decoded_weight.is_leaf
    layer.weight.data -= 2 * learned
    assert not layer.is_changed


def test_two_layers_can_be_compared_and_one_given_the_weight_of_another(generator, x):
    one, other = new_vector_quantized(ROWS, COLUMNS, generator), new_vector_quantized(ROWS, COLUMNS, generator)
    assert not torch.equal(one.weight, other.weight)
    one.weight = other.weight
    assert torch.equal(one.weight, other.weight) and one.is_changed and not other.is_changed


def test_decoding_in_inference_mode_leaves_a_weight_that_gradients_pass(layer, x):
    with torch.inference_mode():
        layer.decode()
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


# --- as with an ordinary linear ---


def ordinary(layer: PackedLinear) -> nn.Linear:
    """A linear with the same weight and bias, which takes no gradients either."""
    linear = nn.Linear(COLUMNS, ROWS)
    linear.load_state_dict({"weight": layer.reconstruct(torch.float32), "bias": layer.bias})
    return linear.requires_grad_(False)


def swapped(layer, a, b):
    weight = layer.weight
    layer.weight = nn.Parameter(a, requires_grad=False)
    layer.weight = weight


def swapped_data(layer, a, b):
    data = layer.weight.data
    layer.weight.data = a
    layer.weight.data = data


def swapped_data_of_the_same_variable(layer, a, b):
    weight = layer.weight
    layer.weight.data = a
    layer.weight = weight  # it is that one still


def swapped_after_a_write(layer, a, b):
    layer.weight.data += a
    swapped(layer, b, a)


def written_while_it_was_away(layer, a, b):
    weight = layer.weight
    layer.weight = nn.Parameter(a, requires_grad=False)
    weight.data += b
    layer.weight = weight


def written_and_put_back(layer, a, b):
    weight = layer.weight
    layer.weight.data += a
    layer.weight = weight


def swapped_twice(layer, a, b):
    first = layer.weight
    layer.weight = nn.Parameter(a, requires_grad=False)
    second = layer.weight
    layer.weight = first
    layer.weight = second
    layer.weight.data += b


def called_with_another(layer, a, b):
    wanted = F.linear(b, a, layer.bias)
    torch.testing.assert_close(torch.func.functional_call(layer, {"weight": a}, (b,)), wanted)


def through_a_row(layer, a, b):
    layer.weight.data[0].mul_(2)


def through_numpy(layer, a, b):
    layer.weight.detach().numpy()[1] *= 3


def through_a_view_that_stays(layer, a, b):
    view = layer.weight.data.T
    layer(b)
    view[:, 2] = 1


def fused(layer, a, b):
    layer.weight.data += a


def unfused(layer, a, b):
    layer.weight.data -= a


def unfused_something_else_with_equal_sums(layer, a, b):
    layer.weight.data -= a.flip(0)


PROGRAMS = {
    "swap": [swapped],
    "swap data": [swapped_data],
    "other data for the same variable": [swapped_data_of_the_same_variable],
    "write, swap": [swapped_after_a_write],
    "swap and write": [written_while_it_was_away],
    "write and put back": [written_and_put_back],
    "swap twice": [swapped_twice],
    "call with another": [called_with_another],
    "write, call with another": [fused, called_with_another],
    "fuse, unfuse": [fused, unfused],
    "fuse, unfuse something else": [fused, unfused_something_else_with_equal_sums],
    "row, fuse, unfuse": [through_a_row, fused, unfused],
    "fuse, row, unfuse": [fused, through_a_row, unfused],
    "fuse, numpy, fuse, unfuse twice": [fused, through_numpy, fused, unfused, unfused],
    "numpy, fuse, unfuse": [through_numpy, fused, unfused],
    "fuse, view, unfuse": [fused, through_a_view_that_stays, unfused],
    "view": [through_a_view_that_stays],
    "row": [through_a_row],
    "swap, numpy": [swapped, through_numpy],
    "fuse, swap, unfuse": [fused, swapped, unfused],
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_is_done_to_a_weight_does_what_it_does_to_an_ordinary_one(layer, mode, program, generator):
    linear = ordinary(layer)
    a, b, x = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(3))
    packed = layer.reconstruct(torch.float32)
    for step in program:
        for module in (linear, layer):
            step(module, a.clone(), b.clone())
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.weight + 0, linear.weight.data)
    close = torch.allclose(linear.weight, packed, rtol=1e-4, atol=1e-5)
    assert layer.is_changed is not close, "what is as it was is so bit by bit, and all else is noticed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_write_through_a_view_survives_a_cast(layer, mode, dtype):
    layer.weight.data[0].mul_(2)
    wanted = layer.weight + 0
    layer.to(dtype)
    assert torch.equal(layer.weight + 0, wanted.to(dtype)) and layer.is_changed


@pytest.mark.parametrize("look", [lambda w: w.T, lambda w: w.untyped_storage(), lambda w: w.numpy(), lambda w: w[0][1:]])
def test_a_view_that_nobody_has_any_more_leaves_nothing_decoded(layer, look, x):
    wanted = layer(x)
    view = look(layer.weight)
    assert torch.equal(layer(x), wanted)
    assert layer.decoded_weight is not None, "somebody could write into it"
    del view
    assert torch.equal(layer(x), wanted) and layer.decoded_weight is None
