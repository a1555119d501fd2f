""" Makes checkpoints of every format, with random bit patterns or the weights of a model, and servers for them. """
import argparse
import contextlib
import io
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union
from urllib.parse import urlsplit

import timm
import torch
from safetensors.torch import save as safetensors_bytes, save_file

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.formats.architecture import drop_parts
from pvt_timm.formats.mapping import from_timm
from weights_conversion.cli import main

StateDict = Dict[str, torch.Tensor]

# what of a model each format has
FORMATS = ('timm', 'timm-dense', 'original', 'original-dense', 'transformers', 'transformers-base', 'mmdet')
DENSE = ('timm-dense', 'original-dense', 'mmdet')


def random_bits(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return random bit patterns, such as NaN with payloads, infinities, denormals and minus zero."""
    data = torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return data.view(dtype).squeeze(-1)


def random_values(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(tuple(shape), generator=generator) * .1).to(dtype)


def make(
        fmt: str,
        variant: str = 'test_pvt',
        num_classes: int = 7,
        in_chans: int = 3,
        img_size: Union[int, Tuple[int, int], None] = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        fill=random_bits,
) -> StateDict:
    """Return a plain state dict of format `fmt`."""
    classes = 0 if fmt in DENSE or fmt == 'transformers-base' else num_classes
    class_token = fmt not in DENSE or fmt == 'original-dense'
    model = timm.create_model(  # which leaves out None
        variant, device='meta', in_chans=in_chans, num_classes=classes, img_size=img_size, class_token=class_token)
    generator = torch.Generator().manual_seed(seed)
    state_dict = {k: fill(v.shape, dtype, generator) for k, v in model.state_dict().items()}
    if fmt == 'original-dense':  # the row of the class token is there, the token is not
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(('norm.', 'head.')) and 'cls' not in k}
    if fmt.startswith('timm'):
        return state_dict
    state_dict, _ = from_timm(state_dict, fmt.partition('-')[0])
    if fmt == 'transformers-base':
        return {k.removeprefix('pvt.'): v for k, v in state_dict.items()}
    return state_dict


def wrap(state_dict: StateDict, wrapper: Optional[str] = None, prefix: str = '') -> Dict[str, Any]:
    """Put weights into a dict as training code does, with other entries around them."""
    out: Dict[str, Any] = {prefix + k: v for k, v in state_dict.items()}
    if prefix.endswith('backbone.'):
        out['neck.convs.0.weight'] = torch.ones(2, 3)
        out['bbox_head.bias'] = torch.ones(4)
    if wrapper is None:
        return out
    return {
        'meta': {'epoch': 12, 'CLASSES': ('cat', 'dog'), 'config': 'model = dict()\n'},
        wrapper: out,
        'optimizer': {'state': {0: {'step': torch.tensor(3.), 'avg': torch.zeros(5)}}, 'param_groups': [{'lr': .1}]},
        'args': argparse.Namespace(lr=.1, model='pvt_small', sizes=[1, 2]),
        'epoch': 12,
    }


def save(checkpoint: Dict[str, Any], path: Path, legacy: bool = False) -> Path:
    """Write a file in the format of its extension, and return its path."""
    if path.suffix == '.safetensors':
        save_file({k: v.contiguous() for k, v in checkpoint.items()}, path, metadata={'format': 'pt'})
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def serve(server, tag: str, model: torch.nn.Module) -> None:
    """Serve weights of a model at the hub or url of a tag, in the format of the published file."""
    cfg = timm.get_pretrained_cfg(tag)
    if cfg.hf_hub_id:
        repo_id, _, commit = cfg.hf_hub_id.partition('@')
        state_dict = {k: v.contiguous() for k, v in from_timm(model.state_dict(), 'transformers')[0].items()}
        server.add_repo(
            repo_id, {'model.safetensors': safetensors_bytes(state_dict), 'config.json': '{}'}, commit=commit or None)
    else:  # OpenMMLab's: a detector, its metadata, and no class token, norm or head
        state_dict = from_timm(drop_parts(model.state_dict(), ('class_token', 'norm', 'head')), 'mmdet')[0]
        file = io.BytesIO()
        torch.save({
            'meta': {'mmdet_version': '2.16.0', 'CLASSES': ('person', 'bicycle'), 'epoch': 12},
            'state_dict': wrap(state_dict, prefix='backbone.')}, file)
        server.add_file(urlsplit(cfg.url).path, file.getvalue())


def same(a: Union[StateDict, torch.nn.Module], b: Union[StateDict, torch.nn.Module]) -> bool:
    """Return whether keys, types, shapes and bits are equal."""
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(
        *(x[k].detach().contiguous().view(torch.uint8) for x in (a, b))) for k in a)


def run(*argv: Any) -> Tuple[Any, str, str]:
    """Run `pvt-convert` in this process. Return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()
