"""Imports a module of this package as soon as an optional library is imported, and not before.

transformers takes seconds to import, so `import etmamba_timm` doesn't do it. It doesn't look for plugins either: this
package has to register its models with it, also where it is imported later, as sorted imports have it.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_logger = logging.getLogger(__name__)


def run_after(library: str, module: str) -> None:
    """Imports `module` now if `library` is imported already, else right after it is."""
    if sys.modules.get(library) is not None:
        _import(module)
    else:
        sys.meta_path.insert(0, _Watch(library, module))


class _Watch(MetaPathFinder):
    """Finds `library` as the other finders do, but for what runs after it."""

    def __init__(self, library: str, module: str) -> None:
        self.library, self.module = library, module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.library:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _import(self.module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader alone
        return spec


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # must not keep anybody from importing the library
        _logger.warning("%s can't be imported (%s: %s)", module, type(error).__name__, error)
