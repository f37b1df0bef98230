"""One seed, many independent streams: each use of randomness has a name, and none depends on the order of work."""

import hashlib

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """The stream called `name` ("held-out trajectories", or a layer's name) of a seed."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
