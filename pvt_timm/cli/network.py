""" Check within seconds whether weights can be downloaded, and say what helps if their host cannot be reached.

Without this check, the hub's client tries for a minute without a message. For a host that does not answer, it takes
minutes until there is an error.
"""
import os
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import get_pretrained_cfg, split_model_name_tag

from ..variants import VARIANTS
from .errors import one_line

__all__ = ['cannot_load', 'check_hub', 'check_pretrained', 'check_url']

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
            check_hub(repo, revision or None)
        else:
            check_url(cfg.url)
    except OSError as e:
        tagged = f'{split_model_name_tag(name)[0]}.{cfg.tag}'
        raise cannot_load(tagged, e, cfg.url, option) from e


def check_hub(repo: str, revision: Optional[str] = None) -> None:
    """Raise ConnectionError if a repository's weights are not in the cache and its hub cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        return  # the hub's client reports that itself, at once
    for name in _HUB_FILES:
        if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
            return
    _reach(constants.ENDPOINT)


def check_url(url: str) -> None:
    """Raise ConnectionError if the file of a url is not in torch's cache and its host cannot be reached."""
    file = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlsplit(url).path))
    if not file.is_file():
        _reach(url)


def _reach(url: str) -> None:
    """Raise ConnectionError if the host of a url gives no answer at all. An HTTP error counts as an answer."""
    parts = urlsplit(url)
    request = urllib.request.Request(f'{parts.scheme}://{parts.netloc}/', method='HEAD')
    problem = [f'no answer within {_SECONDS} s']

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
            problem.clear()
        except urllib.error.HTTPError:
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
