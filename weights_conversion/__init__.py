""" Convert PVT v1 checkpoints to timm and back. """
from .converter import VerificationError, convert, inspect
from .hub import push
from .report import Report

__all__ = ['Report', 'VerificationError', 'convert', 'inspect', 'push']
