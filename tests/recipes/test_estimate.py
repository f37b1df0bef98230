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
    """Measured: 259 s at 2 bits on one thread of an Intel Xeon with AVX-512, and what each stage took of them."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    stages = cost(card, recipe="best").stages
    assert stages == pytest.approx({"sensitivity": 92, "trajectories": 21, "bits": 21, "fit": 112}, rel=0.25)
    assert sum(stages.values()) == pytest.approx(259, rel=0.25)


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


STAGES = {"cluster": 22.0, "calibrate": 30.0}


def events_of(stage: str, seconds_each: float, done: int, total: int = 11, begin: float = 0.0) -> list[Event]:
    """A stage that goes on evenly, from where it begins."""
    return [Event(stage, i, total, begin + seconds_each * i) for i in range(done + 1)]


def test_at_first_the_time_left_is_the_estimate():
    assert seconds_left([], STAGES) == seconds_left([Event("cluster", 0, 11, 3.0)], STAGES) == 52
    assert seconds_left([], {}) is seconds_left([Event("new_stage", 1, 4, 1.0)], STAGES) is None


def test_work_as_fast_as_estimated_leaves_what_the_estimate_leaves():
    for done in range(12):
        assert seconds_left(events_of("cluster", 2.0, done), STAGES) == pytest.approx(52 - 2 * done)
    later = events_of("cluster", 2.0, 11) + events_of("calibrate", 3.0, 4, 10, begin=22.0)
    assert seconds_left(later, STAGES) == pytest.approx(18)


def test_a_slower_machine_is_found_out_more_and_more_and_later_stages_are_expected_to_be_as_slow():
    expected = [52 * 2 - 4 * done for done in range(12)]
    ratios = [seconds_left(events_of("cluster", 4.0, done), STAGES) / expected[done] for done in range(12)]
    assert ratios == sorted(ratios) and ratios[0] == 0.5 and ratios[3] > 0.7 and 0.85 < ratios[-1] < 1


def test_the_pace_of_a_stage_corrects_itself_more_than_others():
    """Clustering took three times as long as estimated, and calibration takes what it should: at its end that is known."""
    events = events_of("cluster", 6.0, 11) + events_of("calibrate", 3.0, 9, 10, begin=66.0)
    assert seconds_left(events[:13], STAGES) > 45
    assert seconds_left(events, STAGES) == pytest.approx(3, rel=1 / 3)


def test_what_passes_since_the_last_event_counts_for_one_piece_and_no_more():
    events = events_of("cluster", 2.0, 10)
    left = [seconds_left(events, STAGES, now) for now in (20.0, 21.0, 22.0, 50.0)]
    assert left == pytest.approx([32, 31, 30, 30])
    assert seconds_left(events_of("cluster", 2.0, 11), {"cluster": 22.0}, now=1e6) == 0


def test_pieces_that_are_not_alike_count_by_their_work():
    """The first of four layers is half of the work."""
    events = [Event("cluster", 0, 4, 0.0), Event("cluster", 1, 4, 11.0, part=0.5)]
    assert seconds_left(events, {"cluster": 22.0}) == pytest.approx(11)


def test_a_stage_without_length_is_no_trouble():
    nothing = {"cluster": 0.0, "calibrate": 0.0}
    assert seconds_left(events_of("cluster", 0.0, 5), nothing) == seconds_left([Event("calibrate", 0, 0, 1.0)], nothing) == 0


BEST = {"sensitivity": 50.0, "trajectories": 20.0, "bits": 10.0, "fit": 100.0}
FIRST_SLICE = [
    *events_of("sensitivity", 5.0, 10, 10),
    *events_of("trajectories", 2.0, 10, 10, begin=50.0),
    *events_of("bits", 1.0, 10, 10, begin=70.0),
    *events_of("fit", 10.0, 3, 10, begin=80.0),
]


def test_what_a_resumed_job_makes_again_is_left_to_do_and_tells_nothing_of_its_pace():
    again = [Event("trajectories", i, 10, 125.0 + 3 * i) for i in range(1, 11)]
    assert seconds_left([*FIRST_SLICE, *again[:5]], BEST) == pytest.approx(10 + 70)
    assert seconds_left([*FIRST_SLICE, *again], BEST) == pytest.approx(70)
    assert seconds_left([*FIRST_SLICE, *again, Event("fit", 4, 10, 165.0)], BEST) == pytest.approx(60)


def test_every_further_time_slice_records_its_trajectories_again():
    assert (
        seconds_left(FIRST_SLICE, BEST) == seconds_left(FIRST_SLICE, BEST, time_slice=180.0, spent=100.0) == pytest.approx(70)
    )
    assert seconds_left(FIRST_SLICE, BEST, time_slice=120.0, spent=110.0) == pytest.approx(70 + 20)
    assert seconds_left(FIRST_SLICE, BEST, time_slice=60.0, spent=50.0) == pytest.approx(70 + 2 * 20)
    assert seconds_left(FIRST_SLICE, BEST, time_slice=1.0, spent=1.0) >= seconds_left(FIRST_SLICE, BEST, time_slice=0.0) > 70
