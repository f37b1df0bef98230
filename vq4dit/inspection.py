"""Where `inspect` was found before there were packages: `vq4dit/pipelines/inspect.py` now. Goes with the next version."""

from vq4dit.pipelines.inspect import inspect

__all__ = ["inspect"]
