"""Of what diffusers says while a model is loaded, exactly one remark and the bars are held back."""

import logging

import pytest
from diffusers import DiTPipeline
from diffusers.utils import logging as diffusers_logging

from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.quiet import SPEAKER, quiet_loading


class Listener(logging.Handler):
    """The remarks that are passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def said():
    listener = Listener()
    SPEAKER.addHandler(listener)
    yield listener
    SPEAKER.removeHandler(listener)


def test_loading_a_model_with_labels_says_nothing(model_folder, said, capfd):
    assert load_pipeline(model_folder).labels == {"cat": 0, "dog": 1, "fox": 2}
    assert said.messages == [] and capfd.readouterr().err == ""


def test_without_us_diffusers_remarks_on_the_type_of_labels(model_folder, said):
    """The day this fails the module can go."""
    DiTPipeline.from_pretrained(model_folder)
    assert any(message.startswith("Expected types for id2label") for message in said.messages)


def test_every_other_remark_passes(said):
    with quiet_loading():
        SPEAKER.warning("Expected types for id2label: (dict[int, str],), got dict[str, str].")
        SPEAKER.warning("Expected types for vae: (AutoencoderKL,), got something else.")
        SPEAKER.warning("100 %% of id2label")
    assert said.messages == ["Expected types for vae: (AutoencoderKL,), got something else.", "100 %% of id2label"]


def test_afterwards_all_is_as_it_was(said):
    assert diffusers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet_loading():
        assert not diffusers_logging.is_progress_bar_enabled()
        raise KeyError
    assert diffusers_logging.is_progress_bar_enabled()
    SPEAKER.warning("Expected types for id2label: ...")
    assert said.messages == ["Expected types for id2label: ..."]
