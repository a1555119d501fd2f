""" Upload a converted folder to the Hugging Face Hub. """
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional, Union

from .sources import _hub_reason

__all__ = ['check_repo', 'push']


def check_repo(repo: str) -> str:
    """Refuse a name that is no repository, before any work is done."""
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo, re.ASCII) or '..' in repo or '--' in repo:
        raise ValueError(f'Expected a repository OWNER/REPO, got {ascii(repo)}.')
    return repo


def push(
        folder: Union[str, 'os.PathLike[str]'],
        repo: str,
        *,
        private: bool = False,
        dry_run: bool = False,
        message: str = 'Upload converted PVT weights',
        token: Optional[str] = None,
) -> Dict[str, Any]:
    """Upload a folder that `convert` wrote.

    Args:
        folder: Folder with the files.
        repo: 'OWNER/REPO', made if it is not there.
        private: Make it private, where it is made.
        dry_run: Only say what would be uploaded.
        message: Of the commit.
        token: For the hub, None for the one that is logged in or in HF_TOKEN.

    Returns:
        'repo', 'url' (None in a dry run), 'files' (name to bytes) and 'dry_run'.

    Raises:
        ValueError: No such folder, or a wrong name.
        OSError: The upload failed.
    """
    check_repo(repo)
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f'Expected a folder with files to upload, got {folder}.')
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    result: Dict[str, Any] = {'repo': repo, 'url': None, 'files': files, 'dry_run': dry_run}
    if dry_run:
        return result
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as e:
        transport = type(e).__module__.split('.')[0] in ('httpx', 'httpcore', 'requests', 'urllib3', 'huggingface_hub')
        if isinstance(e, (OSError, ValueError)) or transport:
            raise OSError(f'Cannot upload to {repo}: {_hub_reason(e)} The folder {folder} is complete.') from e
        raise
    result['url'] = f'{api.endpoint}/{repo}'
    return result
