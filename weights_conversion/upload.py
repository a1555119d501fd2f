""" Upload converted folders to the Hugging Face Hub, one's own and all public PVT v1 checkpoints. """
import json
import re
from pathlib import Path
from string import Template
from typing import Any, Callable, Dict, List, Optional, Sequence

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg

from pvt_timm.files import PathLike, save_atomically
from pvt_timm.pvt import TOP1

from .converter import convert
from .sources import SHA256
from .targets import CARDS

__all__ = ['check_repo', 'publish', 'push']

# Box AP on COCO val2017 as OpenMMLab publishes it with its detectors
BOX_AP = {'pvt_tiny.retinanet_coco': 36.6, 'pvt_small.retinanet_coco': 40.4, 'pvt_medium.retinanet_coco': 41.7}

_MEASURED = re.compile(r'(?<=<!-- measured -->).*?(?=<!-- end -->)', re.DOTALL)


def push(folder: PathLike, repo: str, *, private: bool = False, dry_run: bool = False) -> Dict[str, Any]:
    """Upload a folder that `convert` wrote. Files that the repository holds already are not sent again.

    Args:
        folder: Folder with the files.
        repo: 'OWNER/REPO', made (private, if so) where it is not there.
        dry_run: Only say what would be uploaded.

    Returns:
        'repo', 'url' (None in a dry run), 'files' (name to bytes) and 'dry_run'.

    Raises:
        ValueError: No such folder, or a wrong name.
        Exception: What the hub's client raises.
    """
    check_repo(repo)
    folder = Path(folder)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())} if folder.is_dir() else {}
    if not files:
        raise ValueError(f'Expected a folder with files to upload, got {folder}.')
    result: Dict[str, Any] = {'repo': repo, 'url': None, 'files': files, 'dry_run': dry_run}
    if not dry_run:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message='Upload converted PVT weights')
        result['url'] = f'{api.endpoint}/{repo}'
    return result


def check_repo(repo: str) -> None:
    """Refuse what is no OWNER/REPO, before any work is done."""
    validate_repo_id(repo)
    if '/' not in repo:
        raise ValueError(f'Expected a repository OWNER/REPO, got {ascii(repo)}.')


def publish(
        owner: str,
        only: Sequence[str] = (),
        *,
        output: PathLike = 'published',
        measured: Optional[PathLike] = None,
        private: bool = False,
        dry_run: bool = False,
        say: Callable[[str], None] = lambda line: None,
) -> List[Dict[str, Any]]:
    """Convert the public PVT v1 checkpoints to timm's format and upload each to 'OWNER/pvt_small.in1k' and so on.

    What an interrupted run has finished is taken up again.

    Args:
        owner: User or organisation on the hub.
        only: Pretrained tags such as 'pvt_small.in1k', all if empty.
        output: Folder for a folder per tag.
        measured: JSON that benchmarks/training/imagenet.py writes, for the cards.
        private: Make the repositories private.
        dry_run: Write the folders, upload nothing.
        say: Called with a line per step.

    Returns:
        What `push` returns, per tag.

    Raises:
        ValueError: An unknown tag, or a file that is not the published one.
        Exception: What the clients raise where something cannot be downloaded or uploaded.
    """
    unknown = [tag for tag in only if tag not in SHA256]
    if unknown:
        raise ValueError(f'Expected names in {", ".join(SHA256)}, got {unknown[0]!r}.')
    check_repo(f'{owner}/x')
    accuracy = _read_measured(measured) if measured else {}
    results = []
    for tag in only or SHA256:
        folder, repo = Path(output, tag), f'{owner}/{tag}'
        if (folder / 'README.md').is_file():
            say(f'{tag}: {folder} is there')
        else:
            say(f'{tag}: converting')
            cfg: Any = get_pretrained_cfg(tag)
            source = f'hf-hub:{cfg.hf_hub_id}:model.safetensors' if cfg.hf_hub_id else str(cfg.url)
            convert(
                source, folder, model=tag.partition('.')[0], sha256=SHA256[tag], verify=None,
                keep_source=tag in BOX_AP, about=_about(tag, repo, cfg))
        if tag in accuracy:
            _fill_in(folder / 'README.md', accuracy[tag])
        results.append(push(folder, repo, private=private, dry_run=dry_run))
        say(f'{tag}: {"would be uploaded to" if dry_run else "is in"} {results[-1]["url"] or repo}')
    return results


def _about(tag: str, repo: str, cfg: Any) -> str:
    """What the card says before the report of the conversion."""
    card = CARDS / ('backbone.md' if tag in BOX_AP else 'classifier.md')
    return Template(card.read_text(encoding='utf-8')).substitute(
        TAG=tag, REPO=repo, VARIANT=tag.partition('.')[0], SCORE={**TOP1, **BOX_AP}[tag], ORIGIN=cfg.origin_url,
        LICENSE=cfg.license, FILE=(cfg.url or '').rpartition('/')[2])


def _fill_in(card: Path, measured: str) -> None:
    text = _MEASURED.sub(lambda _: measured, card.read_text(encoding='utf-8'))
    save_atomically(card, lambda f: f.write(text.encode()))


def _read_measured(file: PathLike) -> Dict[str, str]:
    """Tag to what the results of benchmarks/training/imagenet.py say about it."""
    try:
        found = json.loads(Path(file).read_text(encoding='utf-8'))
        versions = f'torch {found["torch"]}, timm {found["timm"]}'
        return {
            tag: f'{row["top1"]:.3f}% top-1, {row["top5"]:.3f}% top-5 on {row["images"]:,} images, with pvt-timm\'s '
                 f'benchmarks/training/imagenet.py, {versions}'
            for tag, row in found['models'].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f'Expected results of benchmarks/training/imagenet.py in {file}, got something else.') from e
