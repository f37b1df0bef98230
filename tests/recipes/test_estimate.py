"""The cost shown before the work: it grows with what costs more, and a day's quota is compared with it."""

from pathlib import Path

import pytest

from vq4dit.config import CalibrationConfig, QuantizationSettings
from vq4dit.progress import Event
from vq4dit.projects.catalog import BUNDLED, Catalog
from vq4dit.recipes.estimate import Estimate, estimate, seconds_left


@pytest.fixture(scope="module")
def card():
    return Catalog(Path(__file__).parents[2]).card(BUNDLED)


def cost(card, device="cpu", **settings) -> Estimate:
    chosen = QuantizationSettings(**settings)
    prediction = card.inspection.predictions[chosen.bits - 2]
    return estimate(prediction, chosen, parameters=card.inspection.parameters, tokens=card.tokens, device=device)


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
