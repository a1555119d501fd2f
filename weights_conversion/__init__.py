""" Convert PVT v1 checkpoints to timm and back. """
from .converter import convert, inspect
from .detectors import convert_whole
from .report import Report
from .upload import publish, push
from .verification import VerificationError

__all__ = ['Report', 'VerificationError', 'convert', 'convert_whole', 'inspect', 'publish', 'push']
