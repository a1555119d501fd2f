""" Packages that only some users have. """
import importlib
from typing import Any

__all__ = ['import_extra']


def import_extra(package: str, extra: str = 'export') -> Any:
    """A package of an extra.

    Raises:
        ImportError: It is not there. The message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package.split('.')[0]:
            raise
        raise ImportError(f"{package} is not installed, it comes with pip install 'pvt-timm[{extra}]'") from e
