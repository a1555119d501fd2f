""" Fetch a checkpoint from a url, within a limit of size. """
import http.client
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

from .files import MAX_BYTES, PathLike, save_atomically, too_large

__all__ = ['download']

_CHUNK = 2 ** 20  # bytes
_TIMEOUT = 60  # seconds that the server may be silent


def download(url: str, file: PathLike, max_bytes: int = MAX_BYTES, progress: bool = False) -> Path:
    """Download a url to `file`, completely or not at all, and return the path of `file`.

    Args:
        url: An address that starts with http:// or https://.
        file: Where to save it. A file of that name is replaced.
        max_bytes: Largest size. A larger file is refused: at once if the server says its size, otherwise when more
            bytes have arrived.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The file is larger than `max_bytes`.
        OSError: The server cannot be reached, answers with an error, or breaks off (a `ConnectionError`).
    """
    file = Path(file)
    if not url.lower().startswith(('http://', 'https://')):  # urllib also opens files of this machine
        raise ValueError('Expected an address that starts with http:// or https://.')
    if '@' in urlsplit(url).netloc:  # urllib takes it for a port, and shows it in its message
        raise ValueError('Expected an address without a user and a password: download the file in another way.')
    request = urllib.request.Request(url, headers={'User-Agent': 'pvt-timm'})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        said = response.headers.get('Content-Length', '')
        expected = int(said) if said.isascii() and said.isdigit() else None
        if expected is not None and expected > max_bytes:
            raise too_large(file.name, expected, max_bytes)

        def write(f: BinaryIO) -> None:
            received = 0
            with tqdm(total=expected, disable=not progress, unit='B', unit_scale=True, unit_divisor=1024) as bar:
                while chunk := _read(response):
                    received += len(chunk)
                    if received > max_bytes:
                        raise too_large(file.name, received, max_bytes)
                    f.write(chunk)
                    bar.update(len(chunk))
            if expected is not None and received != expected:
                raise ConnectionError(f'The download of {file.name} broke off: {received} of {expected} bytes came.')

        save_atomically(file, write)
    return file


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except http.client.IncompleteRead as e:  # the server sends parts and says the length of each (chunked)
        raise ConnectionError('The download broke off within a part.') from e
