""" Read and write the names of classes: in files, in configs, beside checkpoints. """
import json
import os
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

__all__ = ['LABELS_FILE', 'labels_beside', 'labels_in', 'labels_text', 'read_labels', 'write_labels']

LABELS_FILE = 'class_names.txt'  # `pvt-timm train` writes it beside the checkpoints. timm's --class-map reads it too.

PathLike = Union[str, 'os.PathLike[str]']

MAX_NAME = 1000  # characters
MAX_FILE = 16 * 2 ** 20  # bytes


def labels_in(config: Any) -> Optional[List[str]]:
    """Return the names of classes by their indices, None if there are no names, or only 'LABEL_0' and so on.

    Args:
        config: A list of names, a dict of indices and names, or a config of timm (`label_names`, or the same in
            `pretrained_cfg`, with `label_descriptions`) or transformers (`id2label`).

    Raises:
        ValueError: The indices are not 0, 1, 2..., or a name is no text or longer than `MAX_NAME`.
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
    names = [_name(value) for value in config]
    if isinstance(descriptions, dict):
        names = [_name(descriptions.get(name, name)) for name in names]
    return None if names == [f'LABEL_{i}' for i in range(len(names))] else names


def _name(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f'Expected text as the name of a class, got {type(value).__name__}.')
    name = str(value)
    if len(name) > MAX_NAME:
        raise ValueError(f'Expected names of classes of {MAX_NAME} characters at most, got {len(name)}.')
    return name


def read_labels(path: PathLike, count: Optional[int] = None) -> List[str]:
    """Return the names of classes in a file: JSON (see `labels_in`), or text with one name per line.

    A file whose name does not end in .json may hold a JSON list too, see `labels_text`. In text, empty lines and spaces
    around a name are ignored, and so is a byte order mark.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has no names, or another number of names than `count`, or is larger than `MAX_FILE`.
    """
    try:
        with open(path, 'rb') as f:
            content = f.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise ValueError(f'expected at most {MAX_FILE:,} bytes')
        text = content.decode('utf-8-sig')
        if Path(path).suffix == '.json':
            names = labels_in(json.loads(text))
        else:
            names = [_name(value) for value in _in_text(text)]
    except (ValueError, RecursionError) as e:
        raise ValueError(f'Cannot read the names of classes in {path}: {e}') from e
    if not names or count not in (None, len(names)):
        expected = 'some' if count is None else count
        raise ValueError(f'Expected the names of {expected} classes in {path}, got {len(names or ())}.')
    return names


def labels_text(names: Sequence[str]) -> bytes:
    """Return the content of a file from which `read_labels` reads the same names again.

    It has one name per line, which timm's --class-map can read too. If a name has line breaks, spaces around it, or
    characters that UTF-8 cannot store, the content is a JSON list instead.
    """
    try:
        content = ''.join(f'{name}\n' for name in names).encode()
        if _in_text(content.decode('utf-8-sig')) == list(names):
            return content
    except UnicodeEncodeError:  # a class was named after a folder whose name is not valid text
        pass
    return (json.dumps(list(names)) + '\n').encode()


def _in_text(text: str) -> List[Any]:
    if text.startswith('["'):
        try:
            return list(json.loads(text))
        except ValueError:
            pass  # no JSON, but a name that starts with these characters
    return [line.strip() for line in text.splitlines() if line.strip()]


def labels_beside(checkpoint: PathLike) -> Optional[List[str]]:
    """Return the names that `pvt-timm train` writes beside its checkpoints, None if there are none."""
    file = Path(checkpoint).parent / LABELS_FILE
    return read_labels(file) if file.is_file() else None


def write_labels(folder: Path, names: Sequence[str]) -> None:
    """Write the names of classes beside a checkpoint, where `labels_beside` finds them. Without names, do nothing."""
    if names:
        (folder / LABELS_FILE).write_bytes(labels_text(names))
