"""Arguments of a pipeline's call, written one a line: read as meant, and refused in words before any work."""

import pytest
from diffusers import DiTPipeline, FluxPipeline, WanImageToVideoPipeline

from vq4dit.projects.call_lines import check_fitting, read_call, written


def test_a_value_is_json_and_what_is_no_json_is_text():
    text = 'height=64\n\n  true_cfg_scale = 3.5 \nnegative_prompt=\nprompt_2=a = b, ü\nx=true\ny=null\nz="3"'
    wanted = {
        "height": 64,
        "true_cfg_scale": 3.5,
        "negative_prompt": "",
        "prompt_2": "a = b, ü",
        "x": True,
        "y": None,
        "z": "3",
    }
    assert read_call(text) == wanted
    assert read_call("") == {}


def test_what_is_written_is_read_as_the_same():
    call = {"a": "", "b": 'x"=1', "c": 2, "d": 0.5, "e": None, "f": False, "g": "3", "h": "two\nlines"}
    assert read_call("\n".join(written(call))) == call and len(written(call)) == len(call)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("height", "NAME=VALUE, one a line and each once, got 'height'"),
        ("height=1\nheight=2", "each once, got 'height=2'"),
        ("sizes=[1, 2]", "are texts, numbers, true, false or null, got 'sizes="),
        ("a b=1", "call takes names"),
        ("=1", "call takes names"),
        ("scale=Infinity", "finite numbers"),
        ("prompt=x", "call must leave prompt to vq4dit"),
        ("generator=1", "call must leave generator"),
        ("a=" + "[" * 10**5, None),
        ("a=" + "9" * 10**4, None),
    ],
)
def test_wrong_lines_are_refused_and_none_is_too_deep_or_long_to_be_read(text, words):
    if words is None:
        assert list(read_call(text).values()) == [text[2:]]
        return
    with pytest.raises(ValueError, match=words):
        read_call(text)


@pytest.mark.parametrize(
    ("pipeline", "call", "words"),
    [
        (FluxPipeline, {"size": 3}, "FluxPipeline takes no argument 'size'; it takes prompt, "),
        (DiTPipeline, {"height": 64}, "DiTPipeline takes no argument 'height'"),
        (FluxPipeline, {"height": "tall"}, "height of FluxPipeline takes int, got 'tall'"),
        (FluxPipeline, {"height": True}, "takes int, got True"),
        (FluxPipeline, {"max_sequence_length": 1.5}, "takes int, got 1.5"),
        (FluxPipeline, {"true_cfg_scale": "3"}, "takes float, got '3'"),
        (FluxPipeline, {"negative_prompt": 3}, "takes str, got 3"),
        (FluxPipeline, {"latents": 3}, "latents of FluxPipeline takes more than one value, got 3"),
    ],
)
def test_arguments_that_the_pipeline_does_not_take_are_refused(pipeline, call, words):
    with pytest.raises(ValueError, match=words):
        check_fitting(pipeline, call)


def test_arguments_that_fit_are_taken():
    check_fitting(FluxPipeline, {"height": 64, "width": None, "true_cfg_scale": 3, "negative_prompt": "", "prompt_2": "x"})
    check_fitting(DiTPipeline, {"guidance_scale": 4})
    check_fitting(WanImageToVideoPipeline, {})
