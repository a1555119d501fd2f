""" Convert PVT v1 checkpoints to timm and back. """
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converter import Report, VerificationError, convert, inspect
    from .upload import publish, push

__all__ = ['Report', 'VerificationError', 'convert', 'inspect', 'publish', 'push']


def __getattr__(name: str) -> Any:  # torch and timm take seconds to import, `--help` should not
    if name in __all__:
        from . import converter, upload
        return getattr(upload if name in ('publish', 'push') else converter, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
