"""Which model is it? What a benchmark keeps between two runs belongs to the weights it was made from, not to a name."""

import hashlib
from pathlib import Path


def fingerprint(model: str) -> str:
    """Twelve hex digits of a pipeline folder's transformer; of a Hub id its name."""
    files = sorted((Path(model) / "transformer").glob("*.safetensors"))
    if not files:
        return model.replace("/", "--")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
