"""What arguments may be is known when they are read: nothing that cannot be is found out by the work."""

import pytest

from vq4dit.cli.main import build_parser

ASKED = {
    "quantize": ["quantize", "m", "--output", "o"],
    "sample": ["sample", "m", "--output", "o.png"],
    "compare": ["compare", "m", "q", "--output", "o"],
}
COMMANDS = ASKED | {"sample": [*ASKED["sample"], "--labels", "0"]}
every_command = pytest.mark.parametrize("command", COMMANDS)
drawing = pytest.mark.parametrize("command", ["sample", "compare"])


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([*arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said) < 2000
    return said


@every_command
@pytest.mark.parametrize(
    "seed", [2**64, 2**63, -(2**63) - 1, 10**30, "9" * 5000, "1.5", "", "x", "１"], ids=lambda seed: str(seed)[:25]
)
def test_a_seed_that_no_generator_takes_is_wrong_usage(command, seed, capsys):
    assert "argument --seed: must be a whole number from -9223372036854775808 to" in refused(
        capsys, *COMMANDS[command], f"--seed={seed}"
    )


@every_command
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_other_seed_is_taken(command, seed):
    assert build_parser().parse_args([*COMMANDS[command], f"--seed={seed}"]).seed == seed


@every_command
@pytest.mark.parametrize("steps", ["0", "-1", str(10**10), "9" * 5000, "1e3", "٣"], ids=lambda steps: steps[:12])
def test_steps_that_never_end_are_wrong_usage(command, steps, capsys):
    assert "argument --steps: must be a whole number from 1 to 1000000000" in refused(
        capsys, *COMMANDS[command], f"--steps={steps}"
    )


@drawing
@pytest.mark.parametrize("guidance", ["1e30", "nan", "inf", "-inf", "1001", "-1000.5", "x", ""])
def test_guidance_beyond_measure_is_wrong_usage(command, guidance, capsys):
    assert "argument --guidance: must be a number from -1000 to 1000" in refused(
        capsys, *COMMANDS[command], f"--guidance={guidance}"
    )


@drawing
@pytest.mark.parametrize("labels", ["", " ", ",", "cat,,dog", "cat,"], ids=repr)
def test_a_class_without_a_name_is_wrong_usage_and_no_default(command, labels, capsys):
    assert "argument --labels: must be names or numbers of classes" in refused(capsys, *COMMANDS[command], f"--labels={labels}")


# --- what a pipeline's call is told ---


@every_command
@pytest.mark.parametrize(
    ("told", "argument"),
    [
        ("true_cfg_scale=3", ("true_cfg_scale", 3)),
        ("true_cfg_scale=3.5", ("true_cfg_scale", 3.5)),
        ("clean_caption=false", ("clean_caption", False)),
        ("negative_prompt=null", ("negative_prompt", None)),
        ("negative_prompt=", ("negative_prompt", "")),
        ("negative_prompt=a=b, c", ("negative_prompt", "a=b, c")),
        ('negative_prompt="3"', ("negative_prompt", "3")),
        ("guidance_scale=4", ("guidance_scale", 4.0)),
    ],
    ids=lambda told: str(told)[:30],
)
def test_a_value_is_read_as_json_and_otherwise_as_text(command, told, argument):
    assert build_parser().parse_args([*COMMANDS[command], "--call", told]).call == [argument]


@every_command
@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("guidance_scale", "must look like NAME=VALUE"),
        ("=3", "call takes names and texts"),
        ("a b=3", "call takes names and texts"),
        ("sigmas=[1, 0.5]", "call takes names and texts, finite numbers, true, false or none"),
        ("strength=NaN", "call takes names and texts, finite numbers"),
        ("strength=1e999", "call takes names and texts, finite numbers"),
        ("prompt=cat", "call must leave prompt to vq4dit"),
        ("num_inference_steps=3", "call must leave num_inference_steps to vq4dit"),
        ("guidance_scale=1e30", "must be a number from -1000 to 1000"),
        ("guidance_scale=cat", "must be a number from -1000 to 1000"),
    ],
)
def test_what_no_call_can_be_told_is_wrong_usage(command, told, words, capsys):
    assert f"argument --call: {words}" in " ".join(refused(capsys, *COMMANDS[command], "--call", told).split())


@drawing
def test_guidance_is_short_for_an_argument_of_the_call_and_the_last_word_counts(command):
    def call(*more):
        return dict(build_parser().parse_args([*COMMANDS[command], *more]).call)

    assert call("--guidance", "4") == {"guidance_scale": 4.0} and call() == {}
    assert call("--guidance", "4", "--call", "guidance_scale=5", "--call", "height=64") == {"guidance_scale": 5.0, "height": 64}
    assert call("--call", "guidance_scale=5", "--guidance", "4") == {"guidance_scale": 4.0}


# --- prompts ---


@pytest.fixture
def prompts_of(tmp_path):
    """The prompts that a file of this content holds, as the parser tells them."""

    def read(content: bytes, command: str = "quantize") -> list[str]:
        (tmp_path / "prompts.txt").write_bytes(content)
        return build_parser().parse_args([*COMMANDS[command], "--prompts", str(tmp_path / "prompts.txt")]).prompts

    return read


def test_a_file_of_prompts_has_one_a_line_but_for_blank_lines_and_remarks(prompts_of):
    content = "\ufeff# ours\n\na red apple\r\n  猫  \n \na # b\n".encode()
    assert prompts_of(content) == prompts_of(content, "compare") == ["a red apple", "猫", "a # b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"# nothing\n\n", "holds no prompt"),
        (b"caf\xe9\n", "is no text in UTF-8"),
        (b"a\n" * 10_001, "at most 10000 lines and 1 MB"),
        (b"x" * 1_000_001, "at most 10000 lines and 1 MB"),
        ("猫".encode() * 333_334, "at most 10000 lines and 1 MB"),
    ],
    ids=["empty", "remarks", "latin-1", "lines", "bytes", "bytes that cut a letter"],
)
def test_a_file_that_is_no_list_of_prompts_is_wrong_usage(prompts_of, content, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        prompts_of(content)
    assert stopped.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


def test_the_longest_file_of_prompts_is_read(prompts_of):
    assert len(prompts_of(b"a\n" * 10_000)) == 10_000 and len(prompts_of(b"x" * 1_000_000)[0]) == 1_000_000


@every_command
@pytest.mark.parametrize("name", ["nowhere.txt", ".", "a\0b"], ids=repr)
def test_a_file_of_prompts_that_cannot_be_read_is_wrong_usage(command, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "argument --prompts: " in (said := refused(capsys, *ASKED[command], "--prompts", name)) and "cannot be read" in said


@drawing
@pytest.mark.parametrize("prompt", ["", "  ", "\udcff"], ids=repr)
def test_a_prompt_that_says_nothing_is_wrong_usage(command, prompt, capsys):
    assert "argument --prompt: must be a text that says what to draw" in refused(capsys, *ASKED[command], f"--prompt={prompt}")


@drawing
def test_prompts_and_classes_exclude_each_other(command, capsys):
    assert "not allowed with argument" in refused(capsys, *ASKED[command], "--labels", "0", "--prompt", "a cat")
    assert build_parser().parse_args([*ASKED[command], "--prompt", "a, b", "--prompt", "c"]).prompts == ["a, b", "c"]


def test_a_sample_wants_to_be_told_what_to_draw(capsys):
    assert "one of the arguments --labels --prompt --prompts is required" in refused(capsys, *ASKED["sample"])
