""" Clear errors and a clean cache when pretrained weights cannot be had. """
import contextlib
import os
import pickle
import re
from pathlib import Path
from typing import Any, Iterator, List, Optional
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm.models import PretrainedCfg

_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')  # what timm looks for where the config names no file


def _source(cfg: PretrainedCfg) -> str:
    """Kind of source that timm takes of those that `cfg` names: 'hub', 'url', 'file', 'state dict' or ''."""
    if cfg.source == 'hf-hub':
        return 'hub'
    if cfg.source == 'local-dir' or (cfg.file and not cfg.state_dict):
        return 'file'
    if cfg.state_dict:
        return 'state dict'
    return 'hub' if cfg.hf_hub_id else 'url' if cfg.url else ''


def _cached_files(cfg: PretrainedCfg, cache_dir: Optional[str]) -> List[Path]:
    """Files that loading `cfg` would keep, as far as they are there now."""
    files = []
    source = _source(cfg)
    if source == 'hub':
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        for name in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES:
            found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
            if isinstance(found, str):
                files.append(Path(found))
    elif source == 'url':
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
        files.append(folder / Path(urlparse(str(cfg.url)).path).name)
    return [f for f in files if os.path.lexists(f)]


def _remove(file: Path) -> None:
    """Remove a cached file and, where it is a link into the hub cache, what it points to."""
    target = file.resolve()
    file.unlink(missing_ok=True)
    if target != file and target.parent.name == 'blobs':
        target.unlink(missing_ok=True)


def _reason(e: BaseException) -> str:
    """What went wrong, in one line."""
    text = ' '.join(str(e).split()) or type(e).__name__
    if isinstance(e, GatedRepoError):
        return 'access to the repository is restricted, log in with `hf auth login` and ask for access'
    if isinstance(e, RepositoryNotFoundError):
        return 'there is no such repository, or it is private and you are not logged in'
    if isinstance(e, RevisionNotFoundError):
        return 'the repository has no such revision'
    if isinstance(e, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return ('HF_HUB_OFFLINE is set and the file is not in the cache, '
                    'unset it once to download the file')
        cause = e.__cause__ or e.__context__
        return f'cannot get it from {constants.ENDPOINT}' + (f' ({_reason(cause)})' if cause else '')
    if isinstance(e, EntryNotFoundError):
        return 'there is no such file in the repository'
    if isinstance(e, HfHubHTTPError):
        return re.sub(r' ?\(Request ID:[^)]*\)', '', text)[:200]
    if isinstance(e, HTTPError):
        return f'HTTP error {e.code}: {e.reason}'
    if isinstance(e, URLError):
        return f'cannot connect: {e.reason}'
    if 'Consistency check failed' in text:
        return 'the download is incomplete, try again'
    if isinstance(e, ValueError):
        return text
    return text if isinstance(e, RuntimeError) and len(text) < 500 else f'{type(e).__name__}: {text[:500]}'


def _read_reason(e: BaseException) -> str:
    """What is wrong with a file that is there but cannot be read, in one line."""
    text = ' '.join(str(e).split()) or type(e).__name__
    found = isinstance(e, pickle.UnpicklingError) and re.search(r'GLOBAL (\S+) (?:was not|whose module|that)', text)
    if found:
        return f'the file holds Python objects other than tensors ({found.group(1)}), these are never loaded'
    # torch's own text is long and recommends to load the file in a way that may execute what it holds
    text = f': {text}' if isinstance(e, SafetensorError) else ''
    return f'the file is damaged, incomplete or no checkpoint{text}'


class Progress:
    """How far creating a model has come.

    Attributes:
        constructed: The model is there, without its weights.
        read: The weights were read, they are not in the model yet.
    """
    constructed = False
    read = False


@contextlib.contextmanager
def clear_errors(
        variant: str,
        pretrained: bool,
        cfg: PretrainedCfg,
        cache_dir: Optional[Any] = None,
) -> Iterator[Progress]:
    """Around creating a model: if its pretrained weights cannot be loaded, say in one line what failed.

    A file that was downloaded meanwhile and turned out to be unusable is removed, so that the next try downloads it
    anew. A file that was there before is kept and named.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are loaded, nothing is changed if not.
        cfg: Where they come from.
        cache_dir: Cache folder if not the default.

    Yields:
        What the caller notes its progress in. Errors before the model is constructed have nothing to do with weights
        and are left alone.

    Raises:
        RuntimeError: The weights could not be loaded (the cause is attached).
    """
    progress = Progress()
    if not pretrained:
        yield progress
        return
    before = _cached_files(cfg, cache_dir)
    try:
        yield progress
    except Exception as e:
        if not progress.constructed:
            raise
        source = _source(cfg)
        if not source:
            raise RuntimeError(
                f'There are no pretrained weights for {variant}. Create it with pretrained=False.') from e
        after = _cached_files(cfg, cache_dir)
        there = after or (source == 'file' and os.path.isfile(cfg.file))
        reason = _read_reason(e) if there and not progress.read else _reason(e)
        hint = ''
        for file in after:
            if file in before:
                hint = f' The cached file {file} was kept, delete it to download it again.'
            else:
                _remove(file)
        if source == 'hub':
            where = f'the hub repository {cfg.hf_hub_id}'
            where = f'{cfg.hf_hub_filename} of {where}' if cfg.hf_hub_filename else where
            if cfg.url and not hint:
                hint = f' Or load {cfg.url} with pretrained_cfg_overlay=dict(hf_hub_id=None).'
        else:
            where = {'url': cfg.url, 'file': cfg.file}.get(source, 'the given state dict')
        name = f'{variant}.{cfg.tag}' if cfg.tag else variant
        raise RuntimeError(f"Cannot load the weights of {name} from {where}: {reason.rstrip('.')}.{hint}") from e
