"""The beam search: compiled and by columns, against each other and against the costs that it minimises."""

import pytest
import torch
from correlated import correlated, seeded

from vq4dit.config import EntropyCodingConfig
from vq4dit.layers.scale_classes import LARGEST, coded_bits, estimate_levels
from vq4dit.recipes import rounding
from vq4dit.recipes.gptq import of_inputs
from vq4dit.recipes.rounding import Rate, round_rows

SEARCHES = {"compiled": rounding._round_compiled, "by columns": rounding._round_by_columns}
every_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=list(SEARCHES))


def problem(rows: int, columns: int, seed: int = 0, size: float = 2.0):
    """What is wanted in steps, the factor and the costs, as `round_together` makes them; all columns cost about the same."""
    generator = seeded(seed)
    side = of_inputs(correlated(4 * columns, columns, generator), EntropyCodingConfig())
    scale = side.costs()[side.order].rsqrt()
    relative = scale / side.factor.diagonal().float()
    factor = side.factor.float() * relative.unsqueeze(1) / scale
    weight = size * torch.randn(rows, columns, generator=generator)
    return weight, factor, relative.square(), priced(weight, 0.0)


def priced(wanted, price: float) -> Rate:
    levels = estimate_levels(wanted.round().clamp(-LARGEST, LARGEST).short())
    return Rate.under(torch.full((len(wanted),), price), *levels)


def squared_errors(integers, wanted, factor, cost) -> torch.Tensor:
    """Σ_j ε_j² cost_j of each row, by its definition."""
    left, factor = wanted.double(), factor.double()
    total = torch.zeros(len(wanted), dtype=torch.float64)
    for column in range(wanted.shape[1]):
        error = left[:, column] - integers[:, column]
        total += error.square() * cost[column]
        left = left - error.unsqueeze(1) * factor[column].index_fill(0, torch.arange(column + 1), 0.0)
    return total


def bits_of(integers, rate) -> torch.Tensor:
    lengths = rounding.code_lengths()
    return lengths[rate.scale_class.int(), integers.abs().int()]


def costs_of(integers, wanted, factor, cost, rate) -> torch.Tensor:
    return squared_errors(integers, wanted, factor, cost) + (rate.price.unsqueeze(1) * bits_of(integers, rate)).sum(1)


@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("price", [0.0, 0.1])
def test_greedy_rounding_is_the_same_compiled_and_by_columns(columns, price):
    wanted, factor, cost, _ = problem(19, columns)
    rate = priced(wanted, price * float(cost.mean()))
    compiled, by_columns = (search(wanted, factor, cost, rate, 1) for search in SEARCHES.values())
    assert (compiled != by_columns).float().mean() < 0.005  # sums in another order


@pytest.mark.parametrize("columns", [40, 100, 300])
@pytest.mark.parametrize("beam", [3, 16])
@pytest.mark.parametrize("price", [0.0, 0.1])
def test_a_beam_finds_roundings_of_the_same_cost_compiled_and_by_columns(columns, beam, price):
    wanted, factor, cost, _ = problem(12, columns)
    rate = priced(wanted, price * float(cost.mean()))
    compiled, by_columns = (
        costs_of(search(wanted, factor, cost, rate, beam), wanted, factor, cost, rate).sum().item()
        for search in SEARCHES.values()
    )
    assert compiled == pytest.approx(by_columns, rel=0.01)


@every_search
@pytest.mark.parametrize("price", [0.0, 0.1])
def test_a_wider_beam_costs_less(search, price):
    wanted, factor, cost, _ = problem(32, 96)
    rate = priced(wanted, price * float(cost.mean()))
    costs = [costs_of(search(wanted, factor, cost, rate, beam), wanted, factor, cost, rate).sum() for beam in (1, 4, 32)]
    assert costs[2] < 0.99 * costs[1] < 0.98 * costs[0]


@every_search
@pytest.mark.parametrize("beam", [1, 8])
def test_bits_that_cost_more_are_fewer_and_errors_larger(search, beam):
    wanted, factor, cost, _ = problem(32, 96, size=1.0)
    found = [(search(wanted, factor, cost, rate, beam), rate) for rate in (priced(wanted, p) for p in (0.0, 0.1, 0.3))]
    bits = [bits_of(integers, rate).sum() for integers, rate in found]
    errors = [squared_errors(integers, wanted, factor, cost).sum() for integers, _ in found]
    assert bits[0] > bits[1] > bits[2] and errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("beam", [1, 8])
def test_the_number_of_threads_changes_nothing(beam):
    wanted, factor, cost, rate = problem(37, 100)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(round_rows(wanted, factor, cost, rate, beam))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@every_search
@pytest.mark.parametrize("beam", [1, 4])
def test_what_is_wanted_is_not_changed_and_no_integer_leaves_its_range(search, beam):
    wanted, factor, cost, rate = problem(5, 70, size=2000.0)
    before = wanted.clone()
    found = search(wanted, factor, cost, rate, beam)
    assert torch.equal(wanted, before) and found.dtype == torch.int16 and found.abs().max() <= LARGEST
    assert found.abs().max() > LARGEST // 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@every_search
@pytest.mark.parametrize("beam", [1, 4])
def test_numbers_that_are_none_stay_in_range(search, value, beam):
    """A search reads tables by integers, so each must have an entry, whatever is wanted."""
    wanted, factor, cost, _ = problem(6, 70)
    wanted[2, 3] = value
    rate = Rate(torch.full((6,), 0.1), torch.zeros(6, 70, dtype=torch.uint8))
    assert search(wanted, factor, cost, rate, beam).abs().max() <= LARGEST


@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
def test_paying_for_bits_keeps_more_at_the_same_rate(size):
    """The point of the price: with a smaller step the same bits leave a smaller error."""
    wanted, factor, cost, free = problem(64, 128, size=size)
    plain = round_rows(wanted, factor, cost, free, 8)
    budget = coded_bits(plain, *estimate_levels(plain)).sum()
    least = float("inf")
    for finer in (1.01, 1.02, 1.03, 1.04, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5):
        levels = estimate_levels(round_rows(wanted * finer, factor, cost, free, 1))
        rate = Rate.under(torch.full((64,), 0.1), *levels)
        found = round_rows(wanted * finer, factor, cost, rate, 8)
        if coded_bits(found, *estimate_levels(found)).sum() <= budget:
            least = min(least, squared_errors(found, wanted * finer, factor, cost).sum().item() / finer**2)
    assert least < 0.99 * squared_errors(plain, wanted, factor, cost).sum().item()
