""" Where a checkpoint comes from: a file, a folder, a url or a hub repository. """
import contextlib
import hashlib
import http.client
import json
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union
from urllib.parse import unquote, urlsplit, urlunsplit

from pvt_timm.files import MAX_BYTES, find_checkpoint

__all__ = ['Progress', 'Source', 'check_sha256', 'known_file', 'open_source', 'sha256_of']

CONFIG_FILES = ('config.json', 'preprocessor_config.json')
CLASS_ROW_FILE = 'class_row.safetensors'
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
_MAX_CONFIG_BYTES = 16 * 2 ** 20
_CHUNK = 2 ** 20
_TIMEOUT = 30

# sha256 (or its first 8 digits, where no more is published) of public files
_KNOWN = {
    'afa86f52bada08f84dab81dd633c6207bbc7802bd4cb24ef9d089cc09488985d': 'Zetatech/pvt-tiny-224, ImageNet-1K',
    'ace9243cd2c343d60908f31c02d921aba586462aa87964c3f2d47b3c80547bbc': 'Zetatech/pvt-small-224, ImageNet-1K',
    'b21840e63a3ba0a30d7ff8d1153cbb5a630f638df2c1ef71d941e9318af63192': 'Zetatech/pvt-medium-224, ImageNet-1K',
    '3e22c4983336c00625daee8934ed7fd280d854b3faecfad15be4b00f3f91a3ce': 'Zetatech/pvt-large-224, ImageNet-1K',
    '17b566bd': 'OpenMMLab retinanet_pvt-t_fpn_1x_coco, COCO',
    'b6c94a5b': 'OpenMMLab retinanet_pvt-s_fpn_1x_coco, COCO',
    '55effa1b': 'OpenMMLab retinanet_pvt-m_fpn_1x_coco, COCO',
}


class Progress:
    """A line on stderr that shows how far a long step is, where stderr is a terminal."""

    def __init__(self, quiet: bool = False):
        self.active = not quiet and sys.stderr.isatty()
        self.shown = 0.

    def __call__(self, what: str, done: int, total: Optional[int]) -> None:
        finished = total is not None and done >= total
        if not self.active or (time.monotonic() - self.shown < .1 and not finished):
            return
        self.shown = time.monotonic()
        text = f'{done / 1e6:.0f} MB'
        if total:
            full = int(30 * min(done / total, 1))
            text = f'[{"#" * full}{"." * (30 - full)}] {done / 1e6:.0f}/{total / 1e6:.0f} MB'
        sys.stderr.write(f'\r{what:<12} {text}' + ('\n' if finished else ''))
        sys.stderr.flush()


@dataclass
class Source:
    """A checkpoint file on this machine and what lies next to it.

    Attributes:
        name: What to call it in reports, without credentials.
        file: The checkpoint.
        config: Content of config.json, {} if there is none.
        preprocessor: Content of preprocessor_config.json, {} if there is none.
        class_row: File with the class token row of a dense checkpoint, see the README.
    """
    name: str
    file: Path
    config: Dict[str, Any] = field(default_factory=dict)
    preprocessor: Dict[str, Any] = field(default_factory=dict)
    class_row: Optional[Path] = None


@contextlib.contextmanager
def open_source(
        spec: Union[str, 'os.PathLike[str]'],
        max_bytes: int = MAX_BYTES,
        progress: Optional[Progress] = None,
) -> Iterator[Source]:
    """Find or download a checkpoint. What was downloaded from a url is removed again at the end.

    Args:
        spec: Path of a file or folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        max_bytes: Refuse to download more.
        progress: Shows how far a download is.

    Raises:
        ValueError: `spec` makes no sense, or means something that is no checkpoint.
        OSError: It is not there or cannot be reached.
    """
    spec = os.fspath(spec)
    progress = progress or Progress(quiet=True)
    if '\0' in spec or not spec:
        raise ValueError('Expected a file, folder, url or hub repository, got an empty name or a zero byte.')
    if re.match(r'https?://', spec, re.IGNORECASE):
        with tempfile.TemporaryDirectory(prefix='pvt-convert-') as folder:
            yield Source(_public_url(spec), _download(spec, Path(folder), max_bytes, progress))
    elif spec.startswith('hf-hub:'):
        yield _from_hub(spec, max_bytes)
    elif re.match(r'[A-Za-z][A-Za-z0-9+.-]+://', spec):
        raise ValueError(f"Expected a url with http or https, got {spec.partition(':')[0]}.")
    else:
        path = Path(spec)
        file = find_checkpoint(path)
        yield _with_neighbours(str(path), file, folder=path.is_dir())


def _with_neighbours(name: str, file: Path, folder: bool) -> Source:
    """Read the configuration next to a checkpoint, in a folder or where the usual name says that one belongs to it."""
    source = Source(name, file)
    if folder or file.name in _HUB_FILES:
        source.config, source.preprocessor = (_read_json(file.parent / n) for n in CONFIG_FILES)
        if (file.parent / CLASS_ROW_FILE).is_file():
            source.class_row = file.parent / CLASS_ROW_FILE
    return source


def _read_json(path: Path) -> Dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f'Expected a {path.name} of at most {_MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is no valid JSON: remove or repair it.') from e
    return content if isinstance(content, dict) else {}


# ---- url ------------------------------------------------------------------------------------------------------------

def _public_url(url: str) -> str:
    """A url without user, password, query and fragment, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition('@')[2], parts.path, '', ''))


def _download(url: str, folder: Path, max_bytes: int, progress: Progress) -> Path:
    shown = url.partition('?')[0]
    try:
        shown = _public_url(url)
        name = re.sub(r'[^A-Za-z0-9._-]', '_', unquote(urlsplit(url).path).rpartition('/')[2])[-80:].lstrip('.')
        file = folder / (name or 'checkpoint')
        request = _request(url)
        with urllib.request.build_opener(_OnlyHttp).open(request, timeout=_TIMEOUT) as response:
            length = response.headers.get('Content-Length')
            total = int(length) if length and length.isdecimal() else None
            if total is not None and total > max_bytes:
                raise ValueError(f'Expected at most {max_bytes} bytes, {shown} has {total}.')
            done = 0
            with open(file, 'wb') as f:
                while chunk := response.read(_CHUNK):
                    done += len(chunk)
                    if done > max_bytes:
                        raise ValueError(f'Expected at most {max_bytes} bytes, {shown} sends more.')
                    f.write(chunk)
                    progress('download', done, total)
        if total is not None and done < total:
            raise OSError(f'the download broke off after {done} of {total} bytes')
    except urllib.error.HTTPError as e:
        raise OSError(f'Cannot download {shown}: HTTP status {e.code} ({e.reason}).') from e
    except (OSError, http.client.HTTPException, UnicodeError) as e:
        reason = getattr(e, 'reason', None) or e
        raise OSError(f'Cannot download {shown}: {reason or type(e).__name__}.') from e
    return file


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(
        urlunsplit((*parts[:1], host, *parts[2:4], '')), headers={'User-Agent': 'pvt-convert'})
    if login:  # for this host only, not for where it may redirect to
        request.add_unredirected_header('Authorization', f'Basic {b64encode(unquote(login).encode()).decode()}')
    return request


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not re.match(r'https?://', newurl, re.IGNORECASE):
            raise OSError('it redirects to another kind of address')
        if req.full_url.startswith('https:') and not newurl.startswith('https:'):
            raise OSError('it redirects from https to http')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# ---- hub ------------------------------------------------------------------------------------------------------------

def _split_hub(spec: str) -> Tuple[str, Optional[str], Optional[str]]:
    m = re.fullmatch(
        r'hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^\\:]+))?', spec, re.ASCII)
    names = [x for x in (m.groups() if m else ()) if x]
    if not m or any(x.startswith('/') or {'..', '.', ''} & set(x.split('/')) for x in names):
        raise ValueError(f'Expected hf-hub:owner/repo[@revision][:file], got {ascii(spec)}.')
    return m['repo'], m['revision'], m['file']


def _from_hub(spec: str, max_bytes: int) -> Source:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repo, revision, wanted = _split_hub(spec)

    def fetch(filename: str, limit: int) -> Optional[Path]:
        try:
            try:
                size = get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=_TIMEOUT).size
            except OfflineModeIsEnabled:
                size = None  # comes from the cache, or not at all
            if size is not None and size > limit:
                raise ValueError(f'Expected at most {limit} bytes, {filename} in {spec} has {size}.')
            return Path(hf_hub_download(repo, filename, revision=revision))
        except LocalEntryNotFoundError as e:
            if wanted or filename == _HUB_FILES[-1] or 'offline' not in str(e).lower():
                raise
            return None
        except EntryNotFoundError:
            return None

    try:
        files: List[str] = [wanted] if wanted else list(_HUB_FILES)
        file = next((f for f in (fetch(name, max_bytes) for name in files) if f is not None), None)
        if file is None:
            raise ValueError(f'Expected {" or ".join(files)} in {spec}, found none of them.')
        name = wanted or file.name
        source = Source(spec, file)
        if Path(name).name in _HUB_FILES:
            folder = name.rpartition('/')[0]
            found = []
            for config in (*CONFIG_FILES, CLASS_ROW_FILE):
                try:
                    found.append(fetch(f'{folder}/{config}'.lstrip('/'), _MAX_CONFIG_BYTES))
                except LocalEntryNotFoundError:
                    found.append(None)
            source.config, source.preprocessor = (_read_json(p) if p else {} for p in found[:2])
            source.class_row = found[2]
        return source
    except ValueError as e:
        if isinstance(e, HFValidationError):
            raise ValueError(f'Expected hf-hub:owner/repo[@revision][:file], got {ascii(spec)}.') from e
        raise
    except HfHubHTTPError as e:
        raise OSError(f'Cannot download {spec}: {_hub_reason(e)}') from e
    except Exception as e:
        # transport errors of whichever client huggingface_hub uses (requests or httpx)
        if isinstance(e, OSError) or type(e).__module__.split('.')[0] in ('httpx', 'httpcore', 'requests', 'urllib3'):
            raise OSError(f'Cannot download {spec}: {_hub_reason(e)}') from e
        raise


def _hub_reason(e: Exception) -> str:
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    kind = {
        'RepositoryNotFoundError': 'there is no such repository, or it is private and needs a token (HF_TOKEN)',
        'GatedRepoError': 'access is restricted: ask for it on its page and set HF_TOKEN',
        'RevisionNotFoundError': 'there is no such revision',
        'LocalEntryNotFoundError': 'it is not in the local cache and the hub is out of reach (or offline mode is on)',
        'OfflineModeIsEnabled': 'offline mode is on (HF_HUB_OFFLINE)',
    }.get(type(e).__name__)
    lines = str(e).strip().splitlines()
    return (kind or (f'HTTP status {status}' if status else lines[0] if lines else type(e).__name__)).rstrip('.') + '.'


# ---- hashes ---------------------------------------------------------------------------------------------------------

def sha256_of(file: Path, progress: Optional[Callable[..., None]] = None) -> str:
    """Hash a file in small pieces."""
    digest = hashlib.sha256()
    total = file.stat().st_size
    done = 0
    with open(file, 'rb') as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress('sha256', done, total)
    return digest.hexdigest()


def check_sha256(found: str, expected: str) -> None:
    """Compare a hash with the one (or its first 8 or more digits) that the user knows.

    Raises:
        ValueError: It differs, or `expected` is no hash.
    """
    expected = expected.strip().lower()
    if not re.fullmatch(r'[0-9a-f]{8,64}', expected):
        raise ValueError(f'Expected a sha256 of 8 to 64 hexadecimal digits, got {ascii(expected)}.')
    if not found.startswith(expected):
        raise ValueError(f'Expected a file with sha256 {expected}, got {found}: it is another file or damaged.')


def known_file(sha256: str) -> Optional[str]:
    """What a public file is called, by its hash."""
    return _KNOWN.get(sha256) or _KNOWN.get(sha256[:8])


def hash_in_name(file: Path) -> Optional[str]:
    """First 8 digits of the sha256 that OpenMMLab and torch.hub put at the end of a name."""
    m = re.search(r'-([0-9a-f]{8})\.\w+$', file.name)
    return m.group(1) if m else None
