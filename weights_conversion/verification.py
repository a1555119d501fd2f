""" Compare a conversion with the code that the weights came from: same weights, same images, float64. """
import contextlib
import math
import os
import runpy
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

import timm
import torch
from torch import nn

from pvt_timm.checkpoints import StateDict, from_timm
from pvt_timm.files import read_checkpoint
from pvt_timm.pvt import VARIANTS

from .reading import Weights
from .targets import transformers_config

__all__ = ['CHECKOUT', 'NoReferenceError', 'TOLERANCE', 'VerificationError', 'import_original', 'verify']

TOLERANCE = 1e-10  # float64
CHECKOUT = 'PVT_CHECKOUT'  # environment variable with the path of a checkout of whai362/PVT
ORIGINAL_EPS = 1e-5  # of the norms in patch embeddings and spatial reductions


class VerificationError(ValueError):
    """The outputs differ by more than the tolerance."""


class NoReferenceError(ValueError):
    """No implementation to compare with is installed."""


@dataclass
class Reference:
    """Somebody else's model."""
    name: str  # for the report
    format: str  # of the state dicts that it loads
    model: nn.Module
    blocks: List[nn.Module]  # the last one of each stage
    norms: List[Any]  # those with eps 1e-6 where the original has 1e-5


def verify(weights: Weights, target: Weights, tensors: StateDict, folder: Path, to: str) -> Dict[str, Any]:
    """Compare the source with the timm model, and what is in `folder` with the `tensors` that were meant.

    Returns:
        'reference' (name), 'tolerance', 'passed', and 'differences': name of an output to its largest difference (of
        the largest value or of 1) as the reference ships, and with the original's eps, which decides.

    Raises:
        VerificationError: The outputs differ by more than `TOLERANCE`.
        NoReferenceError: No implementation to compare with is installed.
        ValueError: The written file is not what was meant.
    """
    fmt = weights.converted.format
    reference = _reference(fmt, weights)
    _check_written(tensors, folder, to)
    if reference.format == fmt:
        name, raw = reference.name, weights.converted.raw
    else:  # the weights of a stand-in come through our table
        name = f'{reference.name} (in place of the code of the {fmt} format)'
        raw = from_timm(weights.for_model(), reference.format)[0]
    differences = _compare(weights, reference, raw)
    if to not in ('timm', fmt):  # the target's own code on what was written, where it is installed
        with contextlib.suppress(NoReferenceError):
            written = _reference(to, target)
            found = _compare(target, written, tensors) if written.format == to else {}
            differences.update({f'{output}, written': values for output, values in found.items()})
    if not all(exact <= TOLERANCE for _, exact in differences.values()):
        text = ', '.join(f'{output} by {exact:.1e}' for output, (_, exact) in differences.items())
        raise VerificationError(f'Verification against {name} failed (tolerance {TOLERANCE:g}): {text}.')
    return {'reference': name, 'tolerance': TOLERANCE, 'passed': True, 'differences': differences}


@torch.inference_mode()
def _compare(weights: Weights, reference: Reference, raw: StateDict) -> Dict[str, List[float]]:
    """Run the timm model with `weights` and the reference with `raw` on noise and on a smooth ramp."""
    size = weights.info.img_size
    noise = torch.randn(
        1, weights.info.in_chans, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ramp = torch.outer(*(torch.linspace(-n, n, pixels, dtype=torch.float64) for n, pixels in zip((2, 1), size)))
    images = torch.cat([noise, ramp.expand_as(noise)])
    ours = weights.create_model(dtype=torch.float64, global_pool=None)  # the usual one, as the references have
    ours.load_state_dict(weights.for_model())
    expected = _outputs(ours, [stage.blocks[-1] for stage in ours.stages], images)
    theirs = reference.model.double()
    theirs.load_state_dict(raw)
    as_it_ships = _outputs(theirs, reference.blocks, images)
    for norm in reference.norms:
        norm.eps = ORIGINAL_EPS
    exact = _outputs(theirs, reference.blocks, images)
    return {k: [_difference(v, got[k]) for got in (as_it_ships, exact)] for k, v in expected.items() if k in exact}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    difference = (a - b).abs().max() / b.abs().max().clamp(min=1) if a.shape == b.shape else torch.tensor(math.inf)
    return difference.nan_to_num(math.inf).item()


def _outputs(model: nn.Module, blocks: List[nn.Module], images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Tokens after every stage, and logits where there is a head."""
    out: Dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, __, x, name=f'stage {n}': out.update({name: x[0] if isinstance(x, tuple) else x}))
        for n, block in enumerate(blocks, 1)]
    result = model.eval()(images)
    for hook in hooks:
        hook.remove()
    result = getattr(result, 'logits', result)
    if isinstance(result, torch.Tensor) and result.ndim == 2:
        out['logits'] = result
    return out


def _check_written(tensors: StateDict, folder: Path, to: str) -> None:
    """Read the written file back, for timm also in the way that users do."""
    _check_equal(read_checkpoint(folder), tensors)
    if to == 'timm':
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
        # the model has one type, the file may have several
        _check_equal(loaded, {k: v.to(loaded[k].dtype) if k in loaded else v for k, v in tensors.items()})


def _check_equal(found: StateDict, meant: StateDict) -> None:
    wrong = found.keys() ^ meant.keys() or {k for k, v in meant.items() if found[k].dtype != v.dtype or not torch.equal(
        *(x.detach().contiguous().view(torch.uint8) for x in (found[k], v)))}  # equal also for NaN
    if wrong:
        raise ValueError(f'The written file differs from what was meant in {min(wrong)}.')


# ---- implementations ------------------------------------------------------------------------------------------------

def _reference(fmt: str, weights: Weights) -> Reference:
    """The implementation to compare with: the format's own where it is installed, else another one that fits."""
    info = weights.info
    if info.class_token != info.norm or info.num_classes and not info.norm:
        raise NoReferenceError(
            '--verify compares checkpoints with class token and norm, or with neither (and without head).')
    if not info.norm:
        return _mmdet(weights)
    if fmt == 'original' and os.environ.get(CHECKOUT):
        return _original(weights, Path(os.environ[CHECKOUT]))
    return _transformers(weights)


def _norms(model: nn.Module, *ends: str) -> List[Any]:
    return [m for k, m in model.named_modules() if isinstance(m, nn.LayerNorm) and k.endswith(ends)]


def _transformers(weights: Weights) -> Reference:
    try:
        from transformers import PvtConfig, PvtForImageClassification, __version__
    except ImportError as e:
        raise NoReferenceError('--verify needs transformers here: pip install transformers.') from e
    config = {k: v for k, v in transformers_config(weights).items() if 'dtype' not in k}
    model: Any = PvtForImageClassification(PvtConfig(**config))
    norms = _norms(model.pvt.encoder, '.layer_norm')  # not the final one, which is 'layer_norm'
    return Reference(
        f'transformers {__version__}', 'transformers', model, [b[-1] for b in model.pvt.encoder.block], norms)


def _mmdet(weights: Weights) -> Reference:
    try:
        import mmdet
        from mmdet.models.backbones.pvt import PyramidVisionTransformer
    except Exception as e:  # whatever an unfitting set of packages raises
        raise NoReferenceError(
            '--verify of a dense backbone needs mmdetection (mmdet, mmengine, mmcv), its import failed: '
            f'{" ".join(str(e).split())[:200]}') from e
    info, heads = weights.info, VARIANTS[weights.variant]['num_heads']
    width = info.embed_dims[0] // heads[0]  # of a head, the same in all stages
    model = PyramidVisionTransformer(
        pretrain_img_size=info.img_size, in_channels=info.in_chans, embed_dims=width,
        num_layers=list(info.depths), num_heads=[d // width for d in info.embed_dims],
        mlp_ratios=[int(r) for r in info.mlp_ratios], sr_ratios=list(info.sr_ratios))
    return Reference(f'mmdetection {mmdet.__version__}', 'mmdet', model, [layer[1][-1] for layer in model.layers],
                     _norms(model, '.0.norm', '.attn.norm'))


def _original(weights: Weights, checkout: Path) -> Reference:
    info = weights.info
    build = getattr(import_original(checkout), weights.variant, None)
    if build is None or info.img_size[0] != info.img_size[1]:
        raise NoReferenceError(
            f'--verify: the original code has no {weights.variant} for {info.img_size[0]}x{info.img_size[1]}.')
    model = build(img_size=info.img_size[0], in_chans=info.in_chans, num_classes=info.num_classes)
    blocks = [getattr(model, f'block{i}')[-1] for i in range(1, 5)]
    return Reference(f'whai362/PVT in {checkout.name}', 'original', model, blocks, [])


def import_original(checkout: Path) -> types.SimpleNamespace:
    """What classification/pvt.py of a checkout defines. Its models stay out of timm's registry."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it imports from timm's old places
        with mock.patch('timm.models.registry.register_model', lambda fn: fn):
            return types.SimpleNamespace(**runpy.run_path(str(checkout / 'classification' / 'pvt.py')))
