""" Imports scripts of benchmarks/. They are not a package: a script imports the files in its folder by their names. """
import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'


def import_script(folder: str, name: str) -> ModuleType:
    """Return the module of `benchmarks/<folder>/<name>.py`, and leave `sys.path` unchanged."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before
