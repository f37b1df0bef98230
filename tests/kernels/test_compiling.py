"""What is compiled is kept on disk, and nothing that befalls the copy costs more than compiling again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import numpy as np
from vq4dit.kernels.single_stream import place
found = np.zeros((2, 3), np.int16)
place(np.arange(6, dtype=np.int16), np.zeros(2, np.uint8), np.zeros(3, np.uint8), 0, 2, 1, np.zeros(3, np.int64), found)
print(found.tolist())
"""
RESULT = "[[-1, 0, 1], [2, 3, 4]]"


def run(folder: Path, **environment: str) -> str:
    variables = os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    assert run(folder) == RESULT
    return folder


def test_it_is_kept_and_used_again(kept):
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb*")}
    assert before and run(kept) == RESULT
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb*")} == before


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage"], ids=["empty", "garbage"])
def test_a_damaged_copy_is_made_again(kept, ending, content):
    for path in kept.rglob(f"*{ending}"):
        path.write_bytes(content)
    assert run(kept) == RESULT
    mended = {path: path.read_bytes() for path in kept.rglob("*.nb*")}
    assert content not in mended.values() and run(kept) == RESULT
    assert {path: path.read_bytes() for path in kept.rglob("*.nb*")} == mended, "the third process takes what the second kept"


def test_a_place_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert run(tmp_path / "file" / "folder") == RESULT


def test_numba_that_shall_not_compile_computes_the_same(tmp_path):
    assert run(tmp_path, NUMBA_DISABLE_JIT="1") == RESULT
