"""One push and one download through the real Xet client, whose storage is a folder."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading
from pathlib import Path
import hf_xet
import hub_environment
from hub_fixtures import publish
from hub_server import Hub
from vq4dit.hub.account import sign_in
from vq4dit.errors import HubError
from vq4dit.hub.push import same_image

folder, storage = Path(sys.argv[1]), sys.argv[2]
with Hub(hub_environment.PORT, xet_folder=storage) as hub:
    ann = sign_in(hub.add_user("ann"))
    hub.fail("GET .*/xet-write-token", status=401, times=99)
    try:
        publish(folder, ann)
    except HubError as error:
        assert error.reason == "login", error
    hub.faults.clear()
    stop = threading.Event()
    stop.set()
    try:
        publish(folder, ann, cancel=stop)
    except HubError as error:
        assert error.reason == "cancelled", error
    assert set(hub.repos["ann/tiny"].head) == {".gitattributes"}
    seen = []
    for file in folder.rglob("*.safetensors"):
        hub.xet_hashes[__import__("hashlib").sha256(file.read_bytes()).hexdigest()] = hf_xet.hash_files([str(file)])[0].hash
    pushed = publish(folder, ann, on_progress=lambda progress: seen.append(progress.done))
    assert seen == sorted(seen) and seen[-1] == pushed.num_bytes
    assert not hub.lfs and hub.count("PUT ") == 0, "nothing went through LFS"
    assert same_image(folder, pushed, ann) and hub.count("xet-read-token")
print("through Xet")
"""


def test_a_push_through_xet_comes_back_the_same(quantized_folder, tmp_path):
    (tmp_path / "xet").mkdir()
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}",
        "HF_HUB_DISABLE_XET": "0",
    }
    command = [sys.executable, "-c", PROGRAM, str(quantized_folder), str(tmp_path / "xet")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("through Xet\n"), done.stderr
