""" Read checkpoint files without executing anything that is in them. """
import argparse
import contextlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

__all__ = ['read_checkpoint']


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint file, safetensors or PyTorch, told by its content and not by its name.

    Training snapshots with an `argparse.Namespace` load, any other object is refused.

    Args:
        path: The file.

    Returns:
        What the file holds, on the CPU: a state dict, or a dict around one.

    Raises:
        ValueError: The file is missing, is not a checkpoint, is damaged or holds objects that are not plain data.
    """
    path = Path(path)
    try:
        with path.open('rb') as f:
            start = f.read(64)
    except OSError as e:
        raise ValueError(f'Cannot read the checkpoint {path}: {e.strerror or e}.') from e
    if start.startswith(b'version https://git-lfs'):
        raise ValueError(f'Expected a checkpoint, but {path} is a git-lfs pointer to one: run `git lfs pull`.')
    try:
        if start[8:9] == b'{':  # a safetensors file starts with 8 bytes of length and a JSON header
            return load_file(path)
        with _allow_namespace():
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except SafetensorError as e:
        raise ValueError(f'Expected a complete safetensors file, but {path} is damaged: {e}.') from e
    except pickle.UnpicklingError as e:
        name = re.search(r'GLOBAL (\S+)', str(e))
        if name:
            raise ValueError(
                f'Expected tensors and plain data in {path}, got the object {name[1]}: refused, as loading it could '
                f'run code.') from e
        raise ValueError(f'Expected a checkpoint (safetensors or PyTorch), {path} is none or damaged.') from e
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError,
            AssertionError, ImportError, MemoryError, zipfile.BadZipFile) as e:
        raise ValueError(f'Expected a checkpoint (safetensors or PyTorch), {path} is none or damaged.') from e
    if not isinstance(checkpoint, dict):
        raise ValueError(f'Expected a state dict in {path}, got {type(checkpoint).__name__}.')
    return checkpoint


def _allow_namespace() -> contextlib.AbstractContextManager:
    if hasattr(torch.serialization, 'safe_globals'):
        return torch.serialization.safe_globals([argparse.Namespace])
    torch.serialization.add_safe_globals([argparse.Namespace])  # torch 2.4 has no way to take it back
    return contextlib.nullcontext()
