"""How many bits integers take, by what they are expected to be; and the classes under which they take few."""

import math

import pytest
import torch
from coded_models import separable_integers

from vq4dit.layers.scale_classes import (
    GREATEST_LEVEL,
    GUARD,
    LEAST_LEVEL,
    LEVEL_OF_ONE,
    LEVELS_PER_OCTAVE,
    UNIT,
    code_lengths,
    coded_bits,
    estimate_levels,
    expected_bits,
    probabilities,
)


def test_default_devices_and_inference_leave_no_trace(generator):
    """Probabilities are made once in a process, wherever that happens."""
    integers, _ = separable_integers(8, 16, generator)
    wanted = [side.tolist() for side in estimate_levels(integers)]
    for make in (probabilities, code_lengths, expected_bits):
        make.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        assert code_lengths().device.type == "cpu"
    assert [side.tolist() for side in estimate_levels(integers)] == wanted


def test_estimated_levels_are_about_the_best_there_are(generator):
    """Against a search that goes on until no level of a row or a column can be better."""
    integers, _ = separable_integers(24, 40, generator)
    row, column = (side.int() for side in estimate_levels(integers))
    estimated = coded_bits(integers, row, column).sum().item()
    assert abs(row.float().mean() - 16) < 12 and abs(column.float().mean() - 16) < 4
    every = torch.arange(61, dtype=torch.int32)
    for _ in range(10):
        row = torch.stack([coded_bits(integers, level.expand(24), column).sum(1) for level in every]).argmin(0).int()
        column = torch.stack([coded_bits(integers, row, level.expand(40)).sum(0) for level in every]).argmin(0).int()
    assert estimated <= 1.005 * coded_bits(integers, row, column).sum().item()


def test_probabilities_are_those_of_rounded_gaussians():
    found = probabilities()
    assert found.shape == (GREATEST_LEVEL - LEAST_LEVEL + 1, GUARD + 1)
    assert torch.equal(2 * found.sum(1) - found[:, 0], torch.ones(len(found), dtype=torch.float64))
    assert torch.equal(found / UNIT, (found / UNIT).round()) and found.min() == UNIT
    for level, z in [(LEVEL_OF_ONE, 0), (LEVEL_OF_ONE, 2), (LEVEL_OF_ONE + 10, 5), (LEVEL_OF_ONE - 4, 1)]:
        spread = 2 ** ((level - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE)
        wanted = (math.erf((z + 0.5) / spread / 2**0.5) - math.erf((z - 0.5) / spread / 2**0.5)) / 2
        assert found[level - LEAST_LEVEL, z] == pytest.approx(wanted, abs=1100 * 2 * UNIT)  # what the least units take from 0


def test_no_machine_rounds_a_probability_to_another_unit():
    """Before rounding none lies so near to the middle of two units that the last digits of erfc could decide."""
    spread = torch.exp2((torch.arange(LEAST_LEVEL, GREATEST_LEVEL + 1).double() - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE)
    tail = torch.special.erfc((torch.arange(1, GUARD + 2).double() - 0.5) / (spread.unsqueeze(1) * 2**0.5)) / 2
    units = (tail[:, :-1] - tail[:, 1:]) / UNIT
    assert (units.frac() - 0.5).abs().min() > 1e-6  # erfc is right to 1e-15, which is 1e-8 units


def test_code_lengths_and_their_means_follow_from_probabilities():
    assert torch.equal(code_lengths(), -probabilities().log2().float())
    eight = LEVEL_OF_ONE + 3 * LEVELS_PER_OCTAVE - LEAST_LEVEL
    assert expected_bits()[eight] == pytest.approx(3 + math.log2(2 * math.pi * math.e) / 2, abs=0.01)
    assert (expected_bits().diff()[:-1] >= 0).all()  # at the last, σ = 512, all beyond `GUARD` is told to be 0
