"""Of what diffusers says while a model is loaded, exactly one remark and the bars are held back; all while it draws for us."""

import logging

import pytest
from diffusers import DiTPipeline
from diffusers.utils import logging as diffusers_logging
from tiny_pipelines import CALLS, build

from vq4dit.evaluation.images import sample
from vq4dit.models.rehearsal import rehearse
from vq4dit.pipelines.load import load_pipeline
from vq4dit.quiet import SPEAKER, quiet_loading, without_remarks


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


def test_what_is_cut_off_our_prompts_is_not_told_and_of_anybody_elses_it_is(caplog):
    pipeline, call, long = build("flux"), CALLS["flux"], "a very long text " * 20
    caplog.clear()
    rehearse(pipeline, call, prompts=[long])
    assert caplog.text == ""
    sample(pipeline, [long], [0], num_inference_steps=1, call=call)
    assert "truncated" in caplog.text


def test_errors_are_told_all_the_while_and_who_wanted_less_gets_less(said):
    was = diffusers_logging.get_verbosity()
    with without_remarks():
        SPEAKER.warning("a remark")
        SPEAKER.error("an error")
    assert said.messages == ["an error"] and diffusers_logging.get_verbosity() == was
    diffusers_logging.set_verbosity(logging.CRITICAL)
    with without_remarks():
        SPEAKER.error("another")
    assert said.messages == ["an error"] and diffusers_logging.get_verbosity() == logging.CRITICAL
    diffusers_logging.set_verbosity(was)
