""" Import optional packages, which are installed with an extra of this package. """
import importlib
from typing import Any

__all__ = ['import_extra']


def import_extra(package: str, extra: str = 'export') -> Any:
    """Return an optional package, which the extra `extra` installs.

    Raises:
        ImportError: The package is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package.split('.')[0]:
            raise
        raise ImportError(f"{package} is not installed, it comes with pip install 'pvt-timm[{extra}]'") from e
