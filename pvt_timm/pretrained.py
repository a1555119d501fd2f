""" Clear errors and a clean cache when pretrained weights cannot be had. """
import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, List, Optional
from urllib.parse import urlparse

import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg

_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def _cached_files(cfg: PretrainedCfg, cache_dir: Optional[str]) -> List[Path]:
    """Files that loading `cfg` would keep, as far as they are there now."""
    files = []
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES
        for name in names:
            found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
            if isinstance(found, str):
                files.append(Path(found))
    elif cfg.url:
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
        files.append(folder / Path(urlparse(str(cfg.url)).path).name)
    return [f for f in files if os.path.lexists(f)]


def _remove(file: Path) -> None:
    """Remove a cached file and, where it is a link into the hub cache, what it points to."""
    target = file.resolve()
    file.unlink(missing_ok=True)
    if target != file and target.parent.name == 'blobs':
        target.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_errors(
        variant: str,
        pretrained: bool,
        cfg: PretrainedCfg,
        cache_dir: Optional[Any] = None,
) -> Iterator[None]:
    """Around creating a model: if pretrained weights cannot be loaded, say what failed and where they come from.

    A file that was downloaded meanwhile and turned out to be unusable is removed, so that the next try downloads it
    anew. A file that was there before is kept and named.

    Args:
        variant: Name of the model.
        pretrained: Whether weights are loaded, nothing is changed if not.
        cfg: Where they come from.
        cache_dir: Cache folder if not the default.

    Raises:
        RuntimeError: The weights could not be loaded (the cause is attached).
    """
    if not pretrained:
        yield
        return
    before = _cached_files(cfg, cache_dir)
    try:
        yield
    except TypeError:
        raise  # a wrong argument, not the weights
    except Exception as e:
        kept = ''
        for file in _cached_files(cfg, cache_dir):
            if file in before:
                kept = f' The cached file {file} was kept, delete it to download it again.'
            else:
                _remove(file)
        source = cfg.file or (f'the hub repository {cfg.hf_hub_id}' if cfg.hf_hub_id else cfg.url)
        if not source:
            raise RuntimeError(
                f'There are no pretrained weights for {variant}. Create it with pretrained=False.') from e
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise RuntimeError(f'Cannot load the weights of {variant} from {source}: {reason}{kept}') from e
