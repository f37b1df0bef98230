"""What arguments may be is known when they are read: nothing that cannot be is found out by the work."""

import pytest

from vq4dit.cli.main import build_parser

COMMANDS = {
    "quantize": ["quantize", "m", "--output", "o"],
    "sample": ["sample", "m", "--labels", "0", "--output", "o.png"],
    "compare": ["compare", "m", "q", "--output", "o"],
}
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
