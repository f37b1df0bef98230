"""app.py under the real `spaces` package on a machine without CUDA: `spaces` is imported as if there were no torch.

With torch in sight it would replace CUDA's functions, which a CPU build of torch does not have.
"""

import os
import runpy
import sys
from pathlib import Path

if "SPACE_ID" in os.environ:  # as app.py does before it imports anything
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
sys.modules["torch"] = None  # type: ignore[assignment]
import spaces  # noqa: E402, F401

del sys.modules["torch"]
sys.path.insert(0, str(Path(__file__).parents[2]))
runpy.run_path(str(Path(__file__).parents[2] / "app.py"), run_name="__main__")
