"""A bundled model is calibrated for the call that it is made for, from the page and from the terminal alike."""

from pathlib import Path

import pytest

from vq4dit.bundled import BUNDLED, BUNDLED_FLUX, CALLS, suggested_call
from vq4dit.cli.main import build_parser
from vq4dit.cli.quantize import settings_of
from vq4dit.web.choice import Choice
from vq4dit.web.links import suggested

HOME = Path(__file__).parents[1]


def of_terminal(model: str, *more: str) -> dict:
    arguments = build_parser().parse_args(["quantize", model, "--output", "q", *more])
    return settings_of(arguments).call_arguments


@pytest.mark.parametrize(
    "model", [BUNDLED_FLUX, f"./{BUNDLED_FLUX}/", str(HOME / BUNDLED_FLUX)], ids=["name", "path", "absolute"]
)
def test_the_terminal_takes_what_is_suggested_however_the_model_is_named(model):
    assert of_terminal(model) == CALLS[BUNDLED_FLUX] == suggested_call(model)


def test_the_page_and_the_terminal_take_the_same():
    assert Choice(BUNDLED_FLUX, 2, "best", 0, "", suggested(BUNDLED_FLUX)).settings().call_arguments == of_terminal(
        BUNDLED_FLUX
    )


def test_what_somebody_says_takes_its_place():
    assert of_terminal(BUNDLED_FLUX, "--call", "height=128") == {"height": 128}


@pytest.mark.parametrize("model", [BUNDLED, "facebook/DiT-XL-2-256", "folder:emoji-flux", "", "\0"], ids=repr)
def test_of_other_models_nothing_is_known(model):
    assert suggested_call(model) == {}


def test_what_is_suggested_is_nobody_elses_to_change():
    suggested_call(BUNDLED_FLUX)["height"] = 1
    assert suggested_call(BUNDLED_FLUX)["height"] == CALLS[BUNDLED_FLUX]["height"] == 64
