"""Where `load_pipeline` was found before there were packages: `vq4dit/pipelines/load.py` now. Goes with the next version."""

from vq4dit.pipelines.load import load_pipeline

__all__ = ["load_pipeline"]
