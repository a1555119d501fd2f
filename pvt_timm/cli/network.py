""" Check within seconds whether weights can be downloaded, and say what helps if their host cannot be reached.

Without this check, the hub's client tries for a minute without a message. For a host that does not answer, it takes
minutes until there is an error.
"""
import http.client
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional, Sequence, Union
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import get_pretrained_cfg, split_model_name_tag

from ..sources import hub_parts, is_url, without_secrets
from ..variants import VARIANTS
from .errors import one_line

__all__ = ['cannot_load', 'check_hub_model', 'check_pretrained', 'check_source', 'check_upload']

_SECONDS = 10  # time for a host to answer at all
# Files that huggingface_hub and timm look for. One of them is in the cache after a download
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def cannot_load(name: str, error: BaseException, url: Optional[str], option: str = '--checkpoint') -> ValueError:
    """Return the error for pretrained weights that cannot be loaded. If they have a `url`, it says what helps.

    Args:
        name: Model with its tag.
        error: The original error.
        url: Address where the weights can be downloaded by hand.
        option: Option of the command that takes weights from a file.
    """
    cure = ''
    if url:
        cure = (f' (download {url} elsewhere and give the file as {option} FILE; `pvt-timm demo` and --model test_pvt '
                f'need no network)')
    return ValueError(f'Cannot load {name}: {one_line(error, 500)}{cure}')


def check_pretrained(name: str, option: str = '--checkpoint') -> None:
    """Raise an error if the pretrained weights of a model have to be downloaded and their host cannot be reached.

    Args:
        name: Model, with or without tag. Models that are not in this package are not checked.
        option: Option of the command that takes weights from a file. The error message names it.

    Raises:
        ValueError: The host cannot be reached and the weights are not in the cache.
    """
    name = name.removeprefix('timm/')
    if split_model_name_tag(name)[0] not in VARIANTS:
        return
    try:
        cfg: Any = get_pretrained_cfg(name)
    except RuntimeError:
        return  # there is no such tag. Loading the model reports that
    if cfg is None or not cfg.has_weights or cfg.file:
        return
    try:
        if cfg.hf_hub_id:
            repo, _, revision = cfg.hf_hub_id.partition('@')
            _check_hub(repo, revision or None)
        else:
            _check_url(cfg.url)
    except OSError as e:
        tagged = f'{split_model_name_tag(name)[0]}.{cfg.tag}'
        raise cannot_load(tagged, e, cfg.url, option) from e


def check_source(source: Union[str, Path], option: str = '--checkpoint FILE') -> None:
    """Raise an error if a checkpoint has to be downloaded from a url or a hub and its host cannot be reached.

    Args:
        source: As for `open_source`. Files and folders are not checked.
        option: The way to give the command a file. The error message names it.

    Raises:
        ValueError: The host cannot be reached, or `source` is no valid name of a hub's repository.
    """
    source = str(source)
    try:
        if is_url(source):
            _reach(source)
        elif source.startswith('hf-hub:'):
            repo, revision, wanted = hub_parts(source)
            _check_hub(repo, revision, (wanted,) if wanted else _HUB_FILES)
    except OSError as e:
        name = without_secrets(source) if is_url(source) else source
        raise ValueError(f'Cannot load {name}: {one_line(e, 500)} ({option} takes a file of this machine)') from e


def check_hub_model(name: str, pretrained: bool) -> None:
    """Raise an error if timm has to download a model `hf-hub:OWNER/REPO` and the hub cannot be reached.

    timm downloads config.json of such a model and, with `pretrained`, its weights.

    Raises:
        ValueError: The hub cannot be reached, and the files are not in the cache.
    """
    match = re.fullmatch('hf[-_]hub:([^@]+)(?:@(.+))?', name, re.IGNORECASE)
    if match is None:
        return
    try:
        for files in (('config.json',), *([_HUB_FILES] if pretrained else [])):
            _check_hub(match[1], match[2], files)
    except OSError as e:
        raise ValueError(
            f'Cannot load {name}: {one_line(e, 500)} (--model local-dir:FOLDER takes a folder of this machine)') from e


def check_upload(repo: str) -> None:
    """Raise an error if the hub that `repo` would be uploaded to cannot be reached.

    Raises:
        ValueError: The hub cannot be reached.
    """
    try:
        if not constants.HF_HUB_OFFLINE:  # otherwise the hub's client reports that itself, at once
            _reach(constants.ENDPOINT)
    except OSError as e:
        raise ValueError(f'Cannot upload to {repo}: {one_line(e, 500)} (--dry-run uploads nothing)') from e


def _check_hub(repo: str, revision: Optional[str] = None, files: Sequence[str] = _HUB_FILES) -> None:
    """Raise ConnectionError if none of a repository's `files` is in the cache and its hub cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        return  # the hub's client reports that itself, at once
    for name in files:
        if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
            return
    _reach(constants.ENDPOINT)


def _check_url(url: str) -> None:
    """Raise ConnectionError if the file of a url is not in torch's cache and its host cannot be reached."""
    file = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlsplit(url).path))
    if not file.is_file():
        _reach(url)


def _reach(url: str) -> None:
    """Raise ConnectionError if the host of a url gives no answer at all. An HTTP error counts as an answer.

    So does an answer that is not valid, and a url without a host: the download reports these itself, at once.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        return
    host = parts.netloc.rpartition('@')[2]  # without a user and a password
    request = urllib.request.Request(f'{parts.scheme}://{host}/', method='HEAD')
    problem = [f'no answer within {_SECONDS} s']

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
            problem.clear()
        except (urllib.error.HTTPError, http.client.HTTPException):
            problem.clear()
        except Exception as e:  # for unknown host names, proxies...
            if isinstance(getattr(e, 'reason', e), ssl.SSLError):  # the download uses other certificates
                problem.clear()
                return
            problem[0] = one_line(e, 300).removeprefix('<urlopen error ').removesuffix('>')

    # in a thread, because a time limit cannot be set for looking up the name of the host
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS + 1)
    if problem:
        raise ConnectionError(f'no network to {parts.hostname}: {problem[0]}')
