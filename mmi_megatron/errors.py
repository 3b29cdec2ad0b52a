"""Errors the user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that does not exist, or makes no sense; the message is one line that names it."""
