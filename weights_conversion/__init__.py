""" Convert PVT v1 checkpoints to timm and back. """
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converter import convert, inspect
    from .report import Report
    from .upload import publish, push
    from .verification import VerificationError

__all__ = ['Report', 'VerificationError', 'convert', 'inspect', 'publish', 'push']


def __getattr__(name: str) -> Any:  # torch and timm take seconds to import, `--help` should not
    if name in __all__:
        from . import converter, report, upload, verification
        return next(getattr(m, name) for m in (converter, report, upload, verification) if name in m.__all__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
