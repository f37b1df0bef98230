"""Nothing of this machine's login, cache or network is used: imported first, because huggingface_hub reads this once."""

import os
import socket
import tempfile


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


PORT = free_port()  # where the loopback Hub of `hub_server.py` will listen

HOME = tempfile.TemporaryDirectory(prefix="hf-home-")  # removed when the tests end
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker: threads of several processes on a core wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "HF_HOME": HOME.name}
os.environ |= {"HF_HUB_DISABLE_XET": os.environ.get("HF_HUB_DISABLE_XET", "1"), "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.pop("HF_TOKEN", None)
