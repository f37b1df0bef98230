"""The cost shown before the work: it grows with what costs more, and a day's quota is compared with it."""

from pathlib import Path

import pytest

from vq4dit.bundled import BUNDLED, BUNDLED_FLUX, CALLS
from vq4dit.config import CalibrationConfig, QuantizationSettings
from vq4dit.models.positions import Positions
from vq4dit.progress import Event
from vq4dit.projects.catalog import Catalog
from vq4dit.recipes.estimate import Estimate, Shown, estimate, seconds_left

HOME = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def card():
    return Catalog(HOME).card(BUNDLED)


def cost(card, device="cpu", **settings) -> Estimate:
    chosen = QuantizationSettings(**settings)
    return estimate(card.inspection, chosen, device)


def test_calibration_costs_more_than_codebooks_and_steps_cost_seconds(card):
    assert cost(card, recipe="kmeans").seconds < 60 < cost(card, recipe="paper").seconds < 1000
    twice = cost(card, recipe="paper", calibration=CalibrationConfig(steps=2 * CalibrationConfig.steps)).stages["calibrate"]
    assert twice == pytest.approx(2 * cost(card, recipe="paper").stages["calibrate"])
    assert cost(card, device="gpu", recipe="paper").seconds < cost(card, recipe="paper").seconds / 20
    assert cost(card, recipe="paper").memory_bytes > cost(card, recipe="kmeans").memory_bytes
    assert cost(card, recipe="paper").disk_bytes > cost(card, recipe="kmeans").disk_bytes > 3_600_000


def test_the_default_recipe_takes_here_about_what_is_said(card, monkeypatch):
    """Measured: 510 s at 2 bits on one thread, beside other work."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert 510 / 2 < cost(card, recipe="best").seconds < 510 * 2


def of_flux(recipe: str, **call) -> Estimate:
    inspection = Catalog(HOME).card(BUNDLED_FLUX, recipe=recipe, call=CALLS[BUNDLED_FLUX] | call).inspection
    return estimate(inspection, QuantizationSettings(recipe=recipe), "cpu")


def test_what_a_model_will_draw_is_what_it_costs():
    """`paper` samples so many pictures, `best` so many positions, of whatever pictures."""
    small, large = (of_flux("paper", height=side, width=side).stages["calibrate"] for side in (64, 128))
    assert 2 < large / small < 4  # four times the picture, and the same text
    small, large = (of_flux("best", height=side, width=side).seconds for side in (64, 128))
    assert large == pytest.approx(small, rel=0.1)


def test_fewer_trajectories_of_prompts_are_sampled_in_more_rounds():
    """So that there are prompts enough; classes always are."""
    few, many = (Shown.of(Positions(64, 12, has_prompts=True), tokens) for tokens in (3040, 61440))
    assert few == Shown(3040, 5.2) and many.passes == 1.9
    assert Shown.of(Positions(64), 2560) == Shown(2560, 1.9)
    assert Shown.of(Positions(10_000), 2560).rows == 10 * 20_000  # one trajectory at least


def test_whether_a_day_is_long_enough():
    assert Estimate({"cluster": 100.0}, 0, 0).fits() == {"anonymous": True, "free": True, "PRO": True}
    assert Estimate({"cluster": 100.0, "calibrate": 80.0}, 0, 0).fits() == {"anonymous": False, "free": True, "PRO": True}
    assert Estimate({"cluster": 9000.0}, 0, 0).fits() == {"anonymous": False, "free": False, "PRO": False}


def test_the_time_left_follows_the_pace_and_corrects_what_comes_later():
    events = [Event("cluster", done, 11, 2.0 * done) for done in range(1, 7)]
    assert seconds_left(events, {"cluster": 22.0}) == pytest.approx(10.0)
    assert seconds_left(events, {"cluster": 11.0, "calibrate": 30.0}) == pytest.approx(10 + 2 * 30)
    assert seconds_left(events[:1], {"cluster": 22.0}) is None
    assert seconds_left([Event("new_stage", 1, 4, 1.0), Event("new_stage", 2, 4, 2.0)], {"cluster": 5.0}) == pytest.approx(2.0)
