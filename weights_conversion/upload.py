""" Upload converted folders to the Hugging Face Hub: the user's (`push`), and all public checkpoints (`publish`). """
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from string import Template
from typing import Any, Callable, Dict, List, Optional, Sequence

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg

from pvt_timm.cli.network import check_source, check_upload
from pvt_timm.files import PathLike, save_atomically
from pvt_timm.labels import LABELS_FILE
from pvt_timm.sources import NEIGHBOURS, SHA256
from pvt_timm.variants import TOP1, VARIANTS

from .card import CARDS
from .converter import convert
from .output import KEPT_SOURCE, files_in

__all__ = ['check_repo', 'publish', 'push']

# Box AP on COCO val2017 as OpenMMLab publishes it with its detectors
BOX_AP = {'pvt_tiny.retinanet_coco': 36.6, 'pvt_small.retinanet_coco': 40.4, 'pvt_medium.retinanet_coco': 41.7}

_CARD = 'README.md'
_MEASURED = re.compile(r'(?<=<!-- measured -->).*?(?=<!-- end -->)', re.DOTALL)

# Names of the files that a conversion writes
_WRITTEN = re.compile('|'.join((
    *map(re.escape, ('model.safetensors', *NEIGHBOURS, LABELS_FILE, _CARD)),
    *(rf'{variant}\.pth' for variant in VARIANTS),
    rf'{KEPT_SOURCE}/[^/]+',
)))


def push(
        folder: PathLike,
        repo: str,
        *,
        files: Optional[Sequence[str]] = None,
        private: bool = False,
        dry_run: bool = False,
) -> Dict[str, Any]:
    """Upload files that `convert` wrote. Files that the repository already holds are not sent again.

    Args:
        folder: Folder with the files.
        repo: 'OWNER/REPO'. It is created if it does not exist.
        files: Names of the files to upload, as in the `files` of a `Report`. By default all files of the folder are
            uploaded. The folder may then hold only files that `convert` writes.
        private: Whether to create a private repository. An existing one that is public is refused.
        dry_run: Whether to upload nothing, and only return what would be uploaded.

    Returns:
        A dict with 'repo', 'url' (None in a dry run), 'files' (bytes by name) and 'dry_run'.

    Raises:
        ValueError: The folder does not exist, or has files that no conversion writes, or a file is missing, or the name
            of the repository is wrong, or it is public.
        Exception: Errors of the hub's client.
    """
    check_repo(repo)
    folder = Path(folder)
    there = files_in(folder) if folder.is_dir() else {}
    if files is None:
        others = [name for name in there if not _WRITTEN.fullmatch(name)]
        if others:
            raise ValueError(
                f'Expected only files that a conversion writes in {folder}, but it also holds {ascii(others[0])}. Give '
                f'the names of the files to upload.')
        files = list(there)
    missing = [name for name in files if name not in there]
    if not files or missing:
        raise ValueError(f'Expected a folder with {missing[0] if missing else "files"} to upload, got {folder}.')
    result: Dict[str, Any] = {
        'repo': repo, 'url': None, 'files': {name: there[name] for name in files}, 'dry_run': dry_run}
    if not dry_run:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # it existed before, and the hub leaves it public
            raise ValueError(
                f'Expected a private repository, {repo} is public and nothing was uploaded: make it private in its '
                f'settings, or leave out --private.')
        api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files],
            commit_message='Upload converted PVT weights')
        result['url'] = f'{api.endpoint}/{repo}'
    return result


def check_repo(repo: str) -> None:
    """Refuse a name that is not OWNER/REPO, before any work is done."""
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

    A folder that an interrupted run has finished is used again, if its files are unchanged. A file `TAG.json` beside
    the folder has their names, sizes and hashes. Only these files are uploaded. The card is written for `owner`.

    Args:
        owner: User or organisation on the hub.
        only: Pretrained tags such as 'pvt_small.in1k', all tags if empty.
        output: Folder that gets a folder for each tag.
        measured: File that benchmarks/training/imagenet.py writes. Its figures are written into the cards.
        private: Whether to make the repositories private.
        dry_run: Whether to write the folders and upload nothing.
        say: Called with a line of text for each step.

    Returns:
        For each tag, what `push` returns.

    Raises:
        ValueError: A tag is unknown, a downloaded file is not the published one, or a folder was changed since an
            earlier run wrote it.
        Exception: Errors of the hub's client, if a download or upload fails.
    """
    unknown = [tag for tag in only if tag not in SHA256]
    if unknown:
        raise ValueError(f'Expected names in {", ".join(SHA256)}, got {unknown[0]!r}.')
    check_repo(f'{owner}/x')
    accuracy = _read_measured(measured) if measured else {}
    tags = list(only or SHA256)
    if not dry_run:
        check_upload(f'{owner}/{tags[0]}')
    results = []
    for tag in tags:
        folder, repo = Path(output, tag), f'{owner}/{tag}'
        written = _finished(folder, tag)
        if written:
            say(f'{tag}: {folder} is there')
        else:
            say(f'{tag}: converting')
            written = _write(folder, tag, repo)
        _make_card(folder / _CARD, tag, repo, accuracy.get(tag))
        results.append(push(folder, repo, files=list(written), private=private, dry_run=dry_run))
        say(f'{tag}: {"would be uploaded to" if dry_run else "is in"} {results[-1]["url"] or repo}')
    return results


def _finished(folder: Path, tag: str) -> Dict[str, Any]:
    """Return the files that an earlier run wrote (see `_describe`), none if the folder does not exist or is empty.

    Raises:
        ValueError: The folder was changed since the earlier run.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return {}
    cure = f'Move {folder} away to have it made anew, or choose another folder for the output.'
    manifest = folder.with_name(f'{tag}.json')
    if not manifest.is_file():
        raise ValueError(f'{folder} was not written by publish, as there is no {manifest}. {cure}')
    try:
        written = dict(json.loads(manifest.read_text(encoding='utf-8'))['files'])
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f'Cannot read {manifest}, which says what was written. {cure}') from e
    for name, said in written.items():
        if not (folder / name).is_file():
            raise ValueError(f'{folder / name} is missing. {cure}')
        found = _describe(folder, name, tag)
        if found != said:
            raise ValueError(f'{folder / name} is not what was written, it has {found["bytes"]:,} bytes now. {cure}')
    return written


def _write(folder: Path, tag: str, repo: str) -> Dict[str, Any]:
    """Convert the public file of a tag. Returns the written files (see `_describe`), which `TAG.json` lists too."""
    cfg: Any = get_pretrained_cfg(tag)
    source = f'hf-hub:{cfg.hf_hub_id}:model.safetensors' if cfg.hf_hub_id else str(cfg.url)
    check_source(source, '`pvt-convert FILE --push`')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{tag}-', dir=folder.parent) as hidden:
        new = Path(hidden, tag)
        report = convert(
            source, new, model=tag.partition('.')[0], sha256=SHA256[tag], verify=None, keep_source=tag in BOX_AP,
            about=_about(tag, repo, cfg))
        written = {name: _describe(new, name, tag) for name in report.files}
        text = json.dumps({'files': written}, indent=2).encode()
        save_atomically(folder.with_name(f'{tag}.json'), lambda f: f.write(text))  # before the folder gets its name
        os.replace(new, folder)
    return written


def _describe(folder: Path, name: str, tag: str) -> Dict[str, Any]:
    """Return 'bytes' and 'sha256' of a file. For a card, owner and measured accuracy are left out: they may change."""
    if name == _CARD:
        card = (folder / name).read_bytes().decode(errors='replace')
        content = _MEASURED.sub('', _repo_in_card(tag).sub('', card)).encode()
        return {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256()
    with open(folder / name, 'rb') as f:
        while chunk := f.read(2 ** 20):
            digest.update(chunk)
    return {'bytes': (folder / name).stat().st_size, 'sha256': digest.hexdigest()}


def _repo_in_card(tag: str) -> 're.Pattern[str]':
    """Return a pattern that finds the repository in the snippets of a card."""
    return re.compile(rf"(?<=[':])[\w.-]+/{re.escape(tag)}(?=')")


def _about(tag: str, repo: str, cfg: Any) -> str:
    """Return the text of the card before the report of the conversion."""
    card = CARDS / ('backbone.md' if tag in BOX_AP else 'classifier.md')
    return Template(card.read_text(encoding='utf-8')).substitute(
        TAG=tag, REPO=repo, VARIANT=tag.partition('.')[0], SCORE={**TOP1, **BOX_AP}[tag], ORIGIN=cfg.origin_url,
        LICENSE=cfg.license, FILE=f'{KEPT_SOURCE}/{(cfg.url or "").rpartition("/")[2]}')


def _make_card(card: Path, tag: str, repo: str, measured: Optional[str]) -> None:
    """Write `repo` into a card, and the measured accuracy if it is known."""
    before = card.read_text(encoding='utf-8')
    text = _repo_in_card(tag).sub(repo, before)
    if measured is not None:
        text = _MEASURED.sub(lambda _: measured, text)
    if text != before:
        save_atomically(card, lambda f: f.write(text.encode()))


def _read_measured(file: PathLike) -> Dict[str, str]:
    """Return the accuracy of each tag in the results of benchmarks/training/imagenet.py, as text for the card."""
    try:
        found = json.loads(Path(file).read_text(encoding='utf-8'))
        versions = f'torch {found["torch"]}, timm {found["timm"]}'
        return {
            tag: f'{row["top1"]:.3f}% top-1, {row["top5"]:.3f}% top-5 on {row["images"]:,} images, with pvt-timm\'s '
                 f'benchmarks/training/imagenet.py, {versions}'
            for tag, row in found['models'].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f'Expected results of benchmarks/training/imagenet.py in {file}, got something else.') from e
