"""What was written in format versions 3 and 4 is read for ever, and refused if it is damaged.

Nothing writes it any more but the reference (`tests/support/reference_decoder.py`), which FORMAT.md describes.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference_decoder as reference
import torch
from coded_models import damages, separable_integers, with_levels

from vq4dit.errors import FormatError
from vq4dit.layers.scale_classes import GREATEST_LEVEL, LARGEST, LEAST_LEVEL, LEVEL_OF_ONE, Sides, estimate_levels
from vq4dit.layers.single_stream import decode

GOLDEN = "8533b6c1dc0f82da6fec39f1ec8b4103"
GOLDEN_MODELS = [[121, 30], [14, 40], [121, 33], [18, 50]]
MODELS = [[128, 44], [16, 40], [128, 44], [16, 40]]


def encode(integers: torch.Tensor, sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    content = reference.encode_integers(integers.numpy(), [side.numpy() for side in sides], MODELS)
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()), torch.tensor(MODELS, dtype=torch.uint8)


def check_round_trip(integers: torch.Tensor, sides: Sides) -> None:
    found, found_sides = decode(*encode(integers, sides), *integers.shape)
    assert torch.equal(found, integers) and found.dtype == torch.int16
    assert all(torch.equal(one, other) for one, other in zip(found_sides, sides, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (8, 24), (64, 96)], ids=str)
def test_integers_come_back(shape, generator):
    integers, _ = separable_integers(*shape, generator)
    check_round_trip(integers, with_levels(*estimate_levels(integers)))


@pytest.mark.parametrize("level", [0, LEAST_LEVEL, 20, LEVEL_OF_ONE, 50, GREATEST_LEVEL, 100, 255])
def test_any_integers_come_back_at_any_level(level, generator):
    integers = torch.randint(-LARGEST, LARGEST + 1, (6, 10), generator=generator).short()
    integers[0, :4] = torch.tensor([LARGEST, -LARGEST, 0, 1])
    check_round_trip(integers, with_levels(torch.full((6,), level, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)))


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_layers_without_integers_come_back_too(rows, columns):
    sides = with_levels(torch.full((rows,), 16, dtype=torch.uint8), torch.full((columns,), 16, dtype=torch.uint8))
    check_round_trip(torch.zeros(rows, columns, dtype=torch.int16), sides)


def test_a_golden_stream_is_read_for_ever():
    integers = torch.tensor([[0, 1, -1, 2], [5, -7, 0, 1022], [0, 0, -3, -1022]], dtype=torch.int16)
    golden = torch.frombuffer(bytearray.fromhex(GOLDEN), dtype=torch.uint8)
    assert torch.equal(decode(golden, torch.tensor(GOLDEN_MODELS, dtype=torch.uint8), 3, 4)[0], integers)


def test_several_threads_may_read_at_once(generator):
    integers, _ = separable_integers(64, 96, generator)
    coded = encode(integers, with_levels(*estimate_levels(integers)))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: decode(*coded, 64, 96)[0], range(16))
    assert all(torch.equal(one, integers) for one in found)


# --- damage ---


@pytest.fixture(scope="module")
def coded():
    integers, _ = separable_integers(64, 96, torch.Generator().manual_seed(0))
    return encode(integers, with_levels(*estimate_levels(integers)))


@pytest.mark.parametrize("damage", damages(4).values(), ids=damages(4))
def test_a_damaged_stream_is_refused(coded, damage):
    stream, models = coded
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(damage(stream), models, 64, 96)


@pytest.mark.parametrize("kind, what", [(0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1)])
def test_other_models_of_sides_do_not_decode_it(coded, kind, what):
    """Another centre of steps does: it is only another size of the weight."""
    stream, models = coded
    models = models.clone()
    models[kind, what] += 90
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(stream, models, 64, 96)


@pytest.mark.parametrize("rows, columns", [(64, 95), (64, 97), (63, 96), (96, 64)])
def test_other_shapes_do_not_decode_it(coded, rows, columns):
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(*coded, rows, columns)
