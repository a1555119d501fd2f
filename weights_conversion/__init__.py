""" Convert PVT v1 checkpoints to timm and back. """
from .converter import convert, inspect
from .report import Report
from .upload import publish, push
from .verification import VerificationError

__all__ = ['Report', 'VerificationError', 'convert', 'inspect', 'publish', 'push']
