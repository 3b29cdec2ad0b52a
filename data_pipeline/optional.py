"""Packages of extras, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from data_pipeline.errors import DataError


class Lazy:
    """Stands for a module that may not be installed.

    Args:
        module: its name.
        extra: the extra that installs it.

    Raises:
        DataError: when something of it is used and it cannot be imported.
    """

    def __init__(self, module: str, extra: str):
        self._module, self._extra = module, extra

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module(self._module), name)
        except ImportError as error:
            needed = f"`pip install mmi-megatron[{self._extra}]`"
            raise DataError(f"{self._module} cannot be imported ({error}); {needed}") from None


ray: Any = Lazy("ray", "data-service")
