""" Find or download a checkpoint: a file, a folder, a url or a hub repository. """
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, Optional, Tuple
from urllib.parse import unquote, urlsplit, urlunsplit

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled

from .download import download
from .files import MAX_BYTES, PathLike, find_checkpoint
from .formats.timm import CLASS_ROW_FILE
from .labels import LABELS_FILE

__all__ = ['NEIGHBOURS', 'SHA256', 'Source', 'hub_parts', 'is_url', 'open_source', 'without_secrets']

_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
NEIGHBOURS = ('config.json', 'preprocessor_config.json', CLASS_ROW_FILE)
_MAX_CONFIG_BYTES = 16 * 2 ** 20

# sha256 of the public file of each pretrained tag, or its first 8 digits if only these are published
SHA256 = {
    'pvt_tiny.in1k': 'afa86f52bada08f84dab81dd633c6207bbc7802bd4cb24ef9d089cc09488985d',
    'pvt_small.in1k': 'ace9243cd2c343d60908f31c02d921aba586462aa87964c3f2d47b3c80547bbc',
    'pvt_medium.in1k': 'b21840e63a3ba0a30d7ff8d1153cbb5a630f638df2c1ef71d941e9318af63192',
    'pvt_large.in1k': '3e22c4983336c00625daee8934ed7fd280d854b3faecfad15be4b00f3f91a3ce',
    'pvt_tiny.retinanet_coco': '17b566bd',
    'pvt_small.retinanet_coco': 'b6c94a5b',
    'pvt_medium.retinanet_coco': '55effa1b',
}


@dataclass
class Source:
    """A checkpoint file on this machine and what lies next to it."""
    name: str  # of the file, folder, url or repository, for reports: without user, password and query of a url
    file: Path
    config: Dict[str, Any] = field(default_factory=dict)  # content of config.json, empty without
    processor: Dict[str, Any] = field(default_factory=dict)  # content of preprocessor_config.json, empty without
    class_row: Optional[Path] = None  # class_row.safetensors, see `CLASS_ROW_FILE` of formats/timm.py
    config_beside: bool = False  # a config.json lies beside the file, but was not read

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        with open(self.file, 'rb') as f:
            while chunk := f.read(2 ** 20):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def files(self) -> List[Path]:
        """The checkpoint and the files beside it that were read with it."""
        read = NEIGHBOURS if self.config or self.processor or self.class_row else ()
        beside = [self.file.with_name(name) for name in (*read, LABELS_FILE)]
        return [self.file, *(path for path in beside if path.is_file())]

    @property
    def known(self) -> Optional[str]:
        """Name of the model and tag, such as 'pvt_tiny.in1k', if this is their published file. Otherwise None."""
        return next((tag for tag, known in SHA256.items() if self.sha256.startswith(known)), None)


@contextlib.contextmanager
def open_source(spec: PathLike, max_bytes: int = MAX_BYTES) -> Iterator[Source]:
    """Find or download a checkpoint. A file that was downloaded from a url is removed again at the end.

    A url with more than `max_bytes` is refused.
    """
    spec = os.fspath(spec)
    if not spec or '\0' in spec:
        raise ValueError('Expected a file, folder, url or hub repository, got an empty name or a zero byte.')
    if is_url(spec):
        path = unquote(urlsplit(spec).path)
        name = re.sub(r'[^\w.-]', '_', path.rpartition('/')[2], flags=re.ASCII)[-80:].lstrip('.')
        with tempfile.TemporaryDirectory(prefix='pvt-convert-') as folder:
            file = Path(folder, name or 'checkpoint')
            bar = sys.stderr.isatty() and not are_progress_bars_disabled()  # as for the hub's own bar
            download(spec, file, max_bytes, progress=bar)
            yield Source(without_secrets(spec), file)
    elif spec.startswith('hf-hub:'):
        yield _from_hub(spec)
    else:
        yield _with_neighbours(spec, find_checkpoint(spec))


def is_url(spec: str) -> bool:
    return re.match(r'https?://', spec, re.IGNORECASE) is not None


def without_secrets(url: str) -> str:
    """Return a url without user, password, query and fragment, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition('@')[2], parts.path, '', ''))


def hub_parts(spec: str) -> Tuple[str, Optional[str], Optional[str]]:
    """Return repository, revision and file of 'hf-hub:owner/repo[@revision][:file]'."""
    m = re.fullmatch(r'hf-hub:([^@:]+)(?:@([^:]+))?(?::([^\\:]+))?', spec)
    if m is None or '..' in spec:
        raise ValueError(f'Expected hf-hub:owner/repo[@revision][:file], got {ascii(spec)}.')
    return m[1], m[2], m[3]


def _from_hub(spec: str) -> Source:
    repo, revision, wanted = hub_parts(spec)

    def fetch(name: str) -> Optional[Path]:
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except EntryNotFoundError as e:
            # The network failed, and the cache does not say whether the repository has such a file
            if isinstance(e, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE and not try_to_load_from_cache(
                    repo, name, revision=revision):
                raise
            return None

    names = [wanted] if wanted else list(_HUB_FILES)
    file = next(filter(None, map(fetch, names)), None)
    if file is None:
        where = f'{spec}, offline' if constants.HF_HUB_OFFLINE else spec
        raise ValueError(f'Expected {" or ".join(names)} in {where}, found nothing of that name.')
    for name in NEIGHBOURS if file.name in _HUB_FILES else ():
        fetch(str(PurePosixPath(wanted or name).with_name(name)))
    return _with_neighbours(spec, file)


def _with_neighbours(name: str, file: Path) -> Source:
    """Return a checkpoint with the files beside it that belong to it.

    These files belong to it if a folder was given, or if the file has a name that is used on the hub.
    """
    if not os.path.isdir(name) and file.name not in _HUB_FILES:
        return Source(name, file, config_beside=file.with_name('config.json').is_file())
    config, processor, row = (file.with_name(neighbour) for neighbour in NEIGHBOURS)
    return Source(name, file, _read_json(config), _read_json(processor), row if row.is_file() else None)


def _read_json(path: Path) -> Dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f'Expected a {path.name} of at most {_MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f'Cannot read {path}, it is no valid JSON: remove or repair it.') from e
    if not isinstance(content, dict):
        raise ValueError(f'Expected a JSON object in {path}, got {type(content).__name__}: remove or repair it.')
    return content
