""" Stand-ins for the pretrained weights of all tags, in the formats of the real ones, on a loopback server. """
from pathlib import Path
from urllib.parse import urlparse

import torch
import timm
from safetensors.torch import save_file

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.checkpoints import from_timm

from . import owl  # noqa: F401
from .cases import MODELS


def random_model(name: str, **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, weight_init='skip', **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model


def add_weights(server, folder: Path) -> None:
    """Make the files of all tags in `folder` and serve them."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for tag in timm.list_pretrained([f'{name}*' for name in MODELS]):
        cfg = timm.models.get_pretrained_cfg(tag)
        path = folder / f'{tag}.safetensors'
        if cfg.hf_hub_id:
            save_file(from_timm(random_model(tag).state_dict(), 'transformers')[0], path)
            repo_id, _, commit = cfg.hf_hub_id.partition('@')
            server.add_repo(repo_id, {'model.safetensors': path}, commit=commit or None)
        elif cfg.url:
            path = path.with_suffix('.pth')
            state_dict, _ = from_timm(random_model(tag, num_classes=0).state_dict(), 'mmdet')
            state_dict = {f'backbone.{k}': v for k, v in state_dict.items()}
            state_dict['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
            torch.save({'meta': {}, 'state_dict': state_dict}, path)
            server.add_file('mirror' + urlparse(str(cfg.url)).path, path)
    add_owl(server, folder)


def add_owl(server, folder: Path) -> None:
    """The repository that timm's `test_model_inference` reads: weights, a picture, tensors to compare with."""
    import numpy as np
    from PIL import Image

    tag = 'test_pvt_owl.loopback'
    model = random_model(tag)
    with torch.no_grad():
        model.head.bias[24] = 5.  # the class of an owl, which the test asks for
    files = {'model.safetensors': folder / f'{tag}.safetensors'}
    save_file(model.state_dict(), files['model.safetensors'])
    files['test/test_owl.jpg'] = folder / 'test_owl.jpg'
    ramp = np.linspace(0, 255, 96).astype('uint8')
    picture = np.stack([np.tile(ramp, (96, 1)), np.tile(ramp[:, None], (1, 96)), np.full((96, 96), 90, 'uint8')], 2)
    Image.fromarray(picture).save(files['test/test_owl.jpg'], quality=95)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    inputs = dict(
        rand=torch.randn(1, 3, 32, 32), owl=transform(Image.open(files['test/test_owl.jpg'])).unsqueeze(0))
    for name, x in inputs.items():
        with torch.inference_mode():
            features = model.forward_features(x)
            pre_logits = model.forward_head(features, pre_logits=True)
            tensors = dict(input=x, output=model(x), features=features, pre_logits=pre_logits)
        path = files[f'test/{name}_tensors.safetensors'] = folder / f'{name}_tensors.safetensors'
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    server.add_repo('timm/' + tag, files)
