""" Names of classes: in files, in configs, beside checkpoints. """
import json
import os
from pathlib import Path
from typing import Any, List, Optional, Union

__all__ = ['LABELS_FILE', 'labels_beside', 'labels_in', 'read_labels']

LABELS_FILE = 'class_names.txt'  # what `pvt-timm train` writes beside the checkpoints, also a --class-map of timm

PathLike = Union[str, 'os.PathLike[str]']


def labels_in(config: Any) -> Optional[List[str]]:
    """The names of classes in the order of their indices, None if there are none, or only 'LABEL_0' and so on.

    Args:
        config: A list of names, a dict of indices and names, or a config of timm (`label_names`, or the same in
            `pretrained_cfg`, with `label_descriptions`) or transformers (`id2label`).

    Raises:
        ValueError: What should be indices are not 0, 1, 2...
    """
    descriptions: Any = None
    if isinstance(config, dict) and not all(str(k).isdigit() for k in config):
        inner = config.get('pretrained_cfg')
        config = {**(inner if isinstance(inner, dict) else {}), **config}
        descriptions = config.get('label_descriptions')
        config = config.get('label_names') or config.get('id2label')
    if isinstance(config, dict):
        by_index = {str(k): v for k, v in config.items()}
        indices = [str(i) for i in range(len(by_index))]
        if by_index.keys() != set(indices):
            raise ValueError(f'Expected the indices 0 to {len(indices) - 1} as keys of the class names.')
        config = [by_index[i] for i in indices]
    if not isinstance(config, (list, tuple)) or not config:
        return None
    names = [str(name) for name in config]
    if isinstance(descriptions, dict):
        names = [str(descriptions.get(name, name)) for name in names]
    return None if names == [f'LABEL_{i}' for i in range(len(names))] else names


def read_labels(path: PathLike, count: Optional[int] = None) -> List[str]:
    """The names of classes in a file: JSON (see `labels_in`), or text with a name a line.

    Raises:
        OSError: It cannot be read.
        ValueError: There are no names in it, or not `count`.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        names = labels_in(json.loads(text)) if Path(path).suffix == '.json' else lines
    except ValueError as e:
        raise ValueError(f'Cannot read the names of classes in {path}: {e}') from e
    if not names or count not in (None, len(names)):
        expected = 'some' if count is None else count
        raise ValueError(f'Expected the names of {expected} classes in {path}, got {len(names or ())}.')
    return names


def labels_beside(checkpoint: PathLike) -> Optional[List[str]]:
    """The names that `pvt-timm train` keeps beside its checkpoints, None if there are none."""
    file = Path(checkpoint).parent / LABELS_FILE
    return read_labels(file) if file.is_file() else None
