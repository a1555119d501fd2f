""" Checkpoints of every format for the converter's tests, with random bit patterns as weights. """
import argparse
import contextlib
import io
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import timm
import torch
from safetensors.torch import save_file

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.checkpoints import from_timm
from weights_conversion.cli import main

StateDict = Dict[str, torch.Tensor]

# what of a model each format has
FORMATS = ('timm', 'timm-dense', 'original', 'original-dense', 'transformers', 'transformers-base', 'mmdet')
DENSE = ('timm-dense', 'original-dense', 'mmdet')


def random_bits(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern: NaN with payloads, infinities, denormals, minus zero."""
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
    """A bare state dict of format `fmt`."""
    size = {} if img_size is None else {'img_size': img_size}
    dense = {'class_token': False} if fmt in DENSE and fmt != 'original-dense' else {}
    classes = 0 if fmt in DENSE or fmt == 'transformers-base' else num_classes
    model = timm.create_model(variant, device='meta', in_chans=in_chans, num_classes=classes, **size, **dense)
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
    """What training code puts around weights."""
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
    """Write a file, in the format that its name says."""
    if path.suffix == '.safetensors':
        save_file({k: v.contiguous() for k, v in checkpoint.items()}, path, metadata={'format': 'pt'})
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(a: StateDict, b: StateDict) -> bool:
    """Same keys, types, shapes and bit patterns."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(
        *(x[k].detach().contiguous().view(torch.uint8) for x in (a, b))) for k in a)


def run(*argv: Any) -> Tuple[Any, str, str]:
    """`pvt-convert` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()
