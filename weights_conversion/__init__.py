""" Convert PVT v1 checkpoints to timm and back. """
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converter import VerificationError, convert, inspect
    from .publish import publish, push
    from .report import Report

__all__ = ['Report', 'VerificationError', 'convert', 'inspect', 'publish', 'push']

_HOMES = {
    'Report': 'report', 'VerificationError': 'converter', 'convert': 'converter', 'inspect': 'converter',
    'publish': 'publish', 'push': 'publish',
}


def __getattr__(name: str) -> Any:  # torch and timm take seconds to import, `--help` should not
    if name in _HOMES:
        return getattr(importlib.import_module(f'.{_HOMES[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
