"""The version of this library, said once: pyproject.toml reads it here."""

VERSION = "0.1.0"
