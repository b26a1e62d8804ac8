"""The command `diffmas`; it reads config.yaml."""

from diffmas.cli.main import app

__all__ = ["app"]
