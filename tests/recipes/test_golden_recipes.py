"""The recipes' bytes never change unawares: a move or a carve leaves them as they are, and an idea changes the record too."""

import json
import re
from pathlib import Path

import pytest
import torch
from golden_recipes import TESTS, plain_checksums

RECORDED = json.loads((TESTS / "golden" / "recipes.json").read_text())


def machine() -> str:
    """What the bytes have been seen to depend on, or may: torch's version and who made the processor."""
    cpu = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*: (\S+)", cpu.read_text() if cpu.exists() else "")
    return f"torch {torch.__version__.partition('+')[0]}, {vendor[1] if vendor else 'unknown'}"


def test_each_recipe_makes_the_bytes_that_it_made():
    if machine() not in RECORDED:
        pytest.skip(f"no bytes are recorded for {machine()}: python tests/support/golden_recipes.py prints them")
    made, recorded = plain_checksums(), RECORDED[machine()]
    assert {name: made[name] for name in recorded} == recorded
