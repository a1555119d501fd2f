""" Weights that have to be downloaded: whether their host can be reached, found out in seconds, and what helps if not.

Left alone, the hub's client tries for a minute without a word, and a host that does not answer takes minutes.
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

_SECONDS = 10  # for an answer of any kind
# What huggingface_hub and timm look for, and is in the cache after a download
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def cannot_load(name: str, error: BaseException, url: Optional[str], option: str = '--checkpoint') -> ValueError:
    """The error of pretrained weights that cannot be had, with what helps where they have a `url`.

    Args:
        name: Model with its tag.
        error: What went wrong.
        url: Where the weights can be downloaded by hand.
        option: Of the command, for weights from a file.
    """
    cure = f' ({option} FILE takes a download of {url}, `pvt-timm demo` and --model test_pvt need none)' if url else ''
    return ValueError(f'Cannot load {name}: {one_line(error, 500)}{cure}')


def check_pretrained(name: str, option: str = '--checkpoint') -> None:
    """Refuse to start a download of the pretrained weights of the model `name` where their host cannot be reached.

    Args:
        name: Model, with or without tag. Of a model of somebody else nothing is checked.
        option: Of the command, for weights from a file. The message names it.

    Raises:
        ValueError: The host cannot be reached and the weights are not in the cache.
    """
    name = name.removeprefix('timm/')
    if split_model_name_tag(name)[0] not in VARIANTS:
        return
    try:
        cfg: Any = get_pretrained_cfg(name)
    except RuntimeError:
        return  # there is no such tag, which whoever loads it says
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
        return  # the client says so itself, at once
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
    """Raise ConnectionError if the host of a url gives no answer at all. An error of the host is an answer."""
    parts = urlsplit(url)
    request = urllib.request.Request(f'{parts.scheme}://{parts.netloc}/', method='HEAD')
    problem = [f'no answer within {_SECONDS} s']

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
            problem.clear()
        except urllib.error.HTTPError:
            problem.clear()
        except Exception as e:  # of names that nobody knows, proxies...
            if isinstance(getattr(e, 'reason', e), ssl.SSLError):  # the client that downloads has its own certificates
                problem.clear()
                return
            problem[0] = one_line(e, 300).removeprefix('<urlopen error ').removesuffix('>')

    # a thread, as looking up the name of the host takes no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS + 1)
    if problem:
        raise ConnectionError(f'no network to {parts.hostname}: {problem[0]}')
