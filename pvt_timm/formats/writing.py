""" Functions that all formats write their files with. """
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict

import torch

from .names import StateDict

__all__ = ['write_json', 'write_tensors']


def write_tensors(tensors: StateDict, file: Path) -> None:
    """Write a safetensors or torch file, as its name says."""
    from safetensors.torch import save

    # Each tensor is copied to separate memory. safetensors refuses tensors that share memory, and if a tensor is a part
    # of a larger one, torch.save would write the larger one.
    own = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    if file.suffix == '.safetensors':
        file.write_bytes(save(own, metadata={'format': 'pt'}))  # only its owner could read a file of `save_file`
    else:
        torch.save(OrderedDict(own), file)


def write_json(content: Dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
