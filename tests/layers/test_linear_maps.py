"""A 1x1 convolution is a linear layer over channels: the same matrix, the same answers, the same layer after packing."""

from __future__ import annotations

import pytest
import torch
from coded_models import single_stream
from torch import nn

from vq4dit.layers.codebook import join_subvectors, num_subvectors, split_subvectors
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear
from vq4dit.layers.linear_maps import (
    channel_dim,
    is_linear_map,
    matrix_of,
    matrix_shape,
    multiply,
    ordinary_layer,
    put_layer,
    tokens_of,
)
from vq4dit.layers.packed import PackedLinear
from vq4dit.layers.schema import format_version
from vq4dit.layers.vector import VQLinear

KINDS = {
    "linear": (lambda: nn.Linear(6, 8), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 1), (2, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 1), (2, 6, 2, 3, 4)),
}


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return KINDS[request.param][0]()


@pytest.fixture
def inputs(request, layer):
    return torch.randn(KINDS[request.node.callspec.params["layer"]][1], generator=torch.Generator().manual_seed(1))


def test_the_product_with_the_matrix_is_what_the_layer_answers(layer, inputs):
    assert is_linear_map(layer) and matrix_shape(layer) == (8, 6) == tuple(matrix_of(layer).shape)
    answer = layer(inputs)
    assert torch.equal(multiply(inputs, matrix_of(layer), layer.bias, channel_dim(layer)), answer)
    tokens = tokens_of(layer, inputs) @ matrix_of(layer).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(tokens, tokens_of(layer, answer))


def packed(layer: nn.Module) -> list[PackedLinear]:
    """Both kinds, of the layer's weights in coarse steps."""
    integers = (8 * matrix_of(layer)).round()
    codebook = torch.linspace(-1, 1, 16).view(-1, 1)
    assignments = torch.arange(48) % 16
    return [
        EntropyCodedLinear.from_integers(integers.int(), torch.full((8,), 0.125), torch.ones(6), layer.bias),
        VQLinear.from_assignments(codebook, assignments, (8, 6), layer.bias),
    ]


def test_a_packed_layer_answers_in_its_place_as_the_layer_with_its_weight_would(layer, inputs):
    for quantized in packed(layer):
        model = nn.ModuleDict({"a": layer})
        put_layer(model, "a", quantized)
        ordinary = ordinary_layer(8, 6, quantized.channel_dim, layer.bias is not None).to_empty(device="cpu")
        assert type(ordinary) is type(layer)
        ordinary.weight.data = quantized.reconstruct(torch.float32).view_as(ordinary.weight)
        if layer.bias is not None:
            ordinary.bias.data = quantized.bias
        packed_answer = model["a"](inputs)
        assert torch.equal(packed_answer, ordinary(inputs))
        quantized.decode()
        assert torch.equal(model["a"](inputs), packed_answer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 1, groups=6),
        nn.Conv2d(6, 6, 1, stride=2),
        nn.Conv2d(6, 6, 1, padding=1),
        nn.Conv3d(6, 6, (3, 1, 1)),
        nn.ConvTranspose2d(6, 6, 1),
        nn.Embedding(6, 6),
    ],
    ids=str,
)
def test_what_does_more_than_multiply_is_none(layer):
    assert not is_linear_map(layer)


def test_a_convolution_of_somebody_else_may_do_more():
    class Causal(nn.Conv2d):
        def forward(self, input):
            return super().forward(input).cumsum(-1)

    assert not is_linear_map(Causal(6, 6, 1))


@pytest.mark.parametrize("columns", [1, 5, 6, 8])
def test_rows_that_the_length_of_subvectors_does_not_divide_end_in_zeros(columns):
    weight = torch.randn(3, columns)
    subvectors = split_subvectors(weight, 4)
    assert len(subvectors) == num_subvectors((3, columns), 4)
    assert torch.equal(join_subvectors(subvectors, (3, columns)), weight)
    assert subvectors.view(3, -1)[:, columns:].eq(0).all()


def test_a_file_is_of_the_first_version_that_had_its_layers(layer):
    coded, vectors = packed(layer)
    stream = SingleStreamLinear.from_tensors(single_stream(coded), (coded.out_features, coded.in_features))
    for quantized in (coded, stream, vectors):
        put_layer(nn.ModuleDict({"a": layer}), "a", quantized)
    is_linear = isinstance(layer, nn.Linear)
    assert format_version([coded]) == format_version([vectors, coded]) == format_version([stream, coded]) == 5
    assert format_version([stream]) == format_version([vectors, stream]) == (3 if is_linear else 4)
    assert format_version([vectors]) == (1 if is_linear else 4)
    assert format_version([]) == 1
    wide = VQLinear.from_assignments(torch.randn(4, 4), torch.arange(8) % 4, (4, 6))
    assert format_version([wide]) == 4
