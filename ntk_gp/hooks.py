"""The former name of :mod:`ntk_gp.bridge`."""

from .bridge import install, uninstall

__all__ = ["install", "uninstall"]
