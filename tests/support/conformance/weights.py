""" Stand-ins for the pretrained weights of all tags, in the formats of the real ones, on a loopback server. """
from pathlib import Path
from urllib.parse import urlparse

import torch
import timm
from safetensors.torch import save_file

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.checkpoints import from_timm

from .cases import MODELS


def add_weights(server, folder: Path) -> None:
    """Make the files of all tags in `folder` and serve them."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for tag in timm.list_pretrained([f'{name}*' for name in MODELS]):
        cfg = timm.models.get_pretrained_cfg(tag)
        path = folder / f'{tag}.safetensors'
        if cfg.hf_hub_id:
            save_file(from_timm(timm.create_model(tag).state_dict(), 'transformers')[0], path)
            repo_id, _, commit = cfg.hf_hub_id.partition('@')
            server.add_repo(repo_id, {'model.safetensors': path}, commit=commit or None)
        elif cfg.url:
            path = path.with_suffix('.pth')
            state_dict, _ = from_timm(timm.create_model(tag, num_classes=0).state_dict(), 'mmdet')
            state_dict = {f'backbone.{k}': v for k, v in state_dict.items()}
            state_dict['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
            torch.save({'meta': {}, 'state_dict': state_dict}, path)
            server.add_file('mirror' + urlparse(str(cfg.url)).path, path)
