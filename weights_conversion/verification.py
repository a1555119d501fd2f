""" Compare a conversion with the code that the weights came from: same weights, same images, float64. """
import importlib.util
import math
import os
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Tuple
from unittest import mock

import timm
import torch
from torch import nn

from pvt_timm.checkpoints import Description, describe, drop_parts, from_timm, map_to_timm
from pvt_timm.files import read_checkpoint
from pvt_timm.pvt import VARIANTS

from .targets import Contents, transformers_config, variant_of

if TYPE_CHECKING:
    from .converter import Loaded

__all__ = ['CHECKOUT', 'NoReferenceError', 'TOLERANCE', 'import_original', 'reference_for', 'verify']

TOLERANCE = 1e-10  # float64
CHECKOUT = 'PVT_CHECKOUT'  # environment variable with the path of a checkout of whai362/PVT
ORIGINAL_EPS = 1e-5  # of the norms in patch embeddings and spatial reductions
_FINAL_NORM = 'pvt.encoder.layer_norm'  # where transformers has the original's eps

StateDict = Mapping[str, torch.Tensor]


class NoReferenceError(ValueError):
    """No implementation to compare with is installed."""


@dataclass
class Reference:
    """Somebody else's implementation."""
    name: str  # for the report
    format: str  # of the state dicts that it loads
    build: Callable[[Description], nn.Module]
    last_blocks: Callable[[Any], List[nn.Module]]  # the last block of each stage of such a model
    small_eps: Tuple[str, ...] = ()  # ends of the names of norms with eps 1e-6 where the original has 1e-5


def reference_for(fmt: str, complete: bool) -> Reference:
    """The implementation to compare with: the format's own where it is installed, else another one that fits.

    Args:
        fmt: Format of the checkpoint.
        complete: It has a class token and a norm, else neither and no head.

    Raises:
        NoReferenceError: None is installed. The message says which to install.
    """
    if not complete:
        return _mmdet()
    if fmt == 'original' and os.environ.get(CHECKOUT):
        return _original(Path(os.environ[CHECKOUT]))
    return _transformers()


def verify(loaded: 'Loaded', contents: Contents, folder: Path, to: str) -> Dict[str, Any]:
    """Compare the source with the timm model, and the written file with what was meant.

    Args:
        loaded: The source.
        contents: What was to be written.
        folder: Where it was written.
        to: Format of what was written.

    Returns:
        For `Report.verification`.

    Raises:
        ValueError: The written file is not what was meant, or no implementation to compare with is installed.
    """
    info, fmt = loaded.info, loaded.converted.format
    reference = _reference(fmt, info, loaded.report.head)
    _check_written(contents, folder, to)
    own = reference.format == fmt
    # the weights of a stand-in come through our table
    raw = _raw_source(loaded) if own else from_timm(
        _fit(loaded.state_dict, info, reference.format), reference.format)[0]
    runs = _compare(loaded.state_dict, info, reference, raw, 'source and timm')
    if to not in ('timm', fmt):
        runs += _compare_target(contents, folder, to)
    passed = all(d['absolute'] <= TOLERANCE * max(1., d['largest'])
                 for run in runs if run['decisive'] for d in run['differences'])
    return {
        'reference': reference.name + ('' if own else f' (in place of the code of the {fmt} format)'),
        'size': list(info.img_size),
        'images': 2,
        'tolerance': TOLERANCE,
        'measure': 'of the largest value or of 1, with the original\'s eps',
        'passed': passed,
        'runs': runs,
    }


def _reference(fmt: str, info: Description, head: bool) -> Reference:
    if info.class_token != info.norm or head and not info.norm:
        raise NoReferenceError(
            '--verify compares checkpoints with class token and norm, or with neither (and without head).')
    return reference_for(fmt, info.norm)


def _compare_target(contents: Contents, folder: Path, to: str) -> List[Dict[str, Any]]:
    """Run the target's own code on the written file, where it is installed."""
    raw = read_checkpoint(folder)
    written = map_to_timm(raw).state_dict
    info = describe(written, contents.info.img_size)
    try:
        reference = _reference(to, info, 'head.weight' in written)
    except NoReferenceError:
        return []
    return _compare(written, info, reference, raw, 'written file and timm') if reference.format == to else []


@torch.inference_mode()
def _compare(
        state_dict: StateDict,
        info: Description,
        reference: Reference,
        raw: StateDict,
        name: str,
) -> List[Dict[str, Any]]:
    """Run the timm model with `state_dict` and the reference with `raw` on noise and on a smooth ramp."""
    noise = torch.randn(
        1, info.in_chans, *info.img_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ramp = torch.outer(*(torch.linspace(-n, n, size, dtype=torch.float64) for n, size in zip((2, 1), info.img_size)))
    images = torch.cat([noise, ramp.expand_as(noise)])
    ours: Any = _timm_model(state_dict, info)
    expected = _run(ours, [stage.blocks[-1] for stage in ours.stages], images)
    theirs = reference.build(info)
    try:
        theirs.load_state_dict(dict(raw))
    except RuntimeError as e:
        raise ValueError(f'{reference.name} does not load the weights: {" ".join(str(e).split())[:300]}') from e
    blocks = reference.last_blocks(theirs)
    runs = []
    if reference.small_eps:
        runs.append({'name': f'{name}, as it ships (eps 1e-6 in all norms)', 'decisive': False,
                     'differences': _differences(expected, _run(theirs, blocks, images))})
        for key, module in theirs.named_modules():
            if isinstance(module, nn.LayerNorm) and key.endswith(reference.small_eps) and key != _FINAL_NORM:
                module.eps = ORIGINAL_EPS
    runs.append({'name': f"{name}, with the original's eps", 'decisive': True,
                 'differences': _differences(expected, _run(theirs, blocks, images))})
    return runs


def _differences(expected: Dict[str, torch.Tensor], got: Dict[str, torch.Tensor]) -> List[Dict[str, Any]]:
    out = []
    for name in (k for k in expected if k in got):
        a, b = expected[name], got[name]
        largest = b.abs().max().item()
        absolute = (a - b).abs().max().item() if a.shape == b.shape else math.inf
        if not math.isfinite(absolute + largest):
            absolute, largest = math.inf, 1.
        out.append(dict(name=name, absolute=absolute, relative=absolute / max(largest, 1e-300), largest=largest))
    return out


def _run(model: nn.Module, blocks: List[nn.Module], images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Tokens after every stage, and logits where there is a head."""
    model = model.double().eval()
    out: Dict[str, torch.Tensor] = {}

    def keep(name: str, result: Any) -> None:
        out[name] = result[0] if isinstance(result, tuple) else result

    hooks = [block.register_forward_hook(lambda _, __, result, name=f'stage {n + 1}': keep(name, result))
             for n, block in enumerate(blocks)]
    result = model(images)
    for hook in hooks:
        hook.remove()
    result = getattr(result, 'logits', result)
    if isinstance(result, torch.Tensor) and result.ndim == 2:
        out['logits'] = result
    return out


def _timm_model(state_dict: StateDict, info: Description) -> nn.Module:
    kwargs: Dict[str, Any] = {}
    if not info.class_token:
        kwargs.update(class_token=False, output_fmt='NLC' if info.norm else 'NCHW')
    model = timm.create_model(
        variant_of(info), num_classes=info.num_classes, in_chans=info.in_chans, img_size=info.img_size,
        weight_init='skip', dtype=torch.float64, **kwargs)
    model.load_state_dict(dict(_fit(state_dict, info, 'timm')))
    return model


def _fit(state_dict: StateDict, info: Description, fmt: str) -> StateDict:
    """Without the class token row of dense checkpoints, which only the original has a place for."""
    if info.class_row and not info.class_token and fmt != 'original':
        return drop_parts(state_dict, ['class_token'])
    return state_dict


def _raw_source(loaded: 'Loaded') -> Dict[str, torch.Tensor]:
    """The weights of the source under their own names, read again."""
    state_dict: Any = read_checkpoint(loaded.source.file, max(loaded.report.bytes, 1))
    for wrapper in loaded.converted.wrappers:
        state_dict = state_dict[wrapper]
    prefix = loaded.converted.prefix
    names = [name for _, names in loaded.converted.mapped for name in names]
    # transformers' PvtModel lacks the 'pvt.' of PvtForImageClassification
    return {k: state_dict[prefix + k if prefix + k in state_dict else prefix + k.removeprefix('pvt.')] for k in names}


def _check_written(contents: Contents, folder: Path, to: str) -> None:
    """Read the written file back, for timm also in the way that users do."""
    _check_equal(read_checkpoint(folder), contents.state_dict)
    if to == 'timm':
        try:
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
        except (RuntimeError, ValueError) as e:
            raise ValueError(f'The written folder does not load in timm: {" ".join(str(e).split())[:300]}') from e
        # the model has one type, the file may have several
        _check_equal(loaded, {k: v.to(loaded[k].dtype) if k in loaded else v for k, v in contents.state_dict.items()})


def _check_equal(found: StateDict, meant: StateDict) -> None:
    if found.keys() != meant.keys():
        raise ValueError('The written file has other keys than were meant.')
    for k, v in meant.items():
        if found[k].dtype != v.dtype or not torch.equal(_bits(found[k]), _bits(v)):
            raise ValueError(f'The written file differs from what was meant in {k}.')


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns, which are equal also for NaN."""
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# ---- implementations ------------------------------------------------------------------------------------------------

def _transformers() -> Reference:
    try:
        from transformers import PvtConfig, PvtForImageClassification, __version__
    except ImportError as e:
        raise NoReferenceError('--verify needs transformers here: pip install transformers.') from e

    def build(info: Description) -> nn.Module:
        config = {k: v for k, v in transformers_config(info).items() if 'dtype' not in k}
        return PvtForImageClassification(PvtConfig(**config)).double()

    return Reference(
        f'transformers {__version__}', 'transformers', build,
        lambda model: [blocks[-1] for blocks in model.pvt.encoder.block], ('.layer_norm',))


def _mmdet() -> Reference:
    try:
        import mmdet
        from mmdet.models.backbones.pvt import PyramidVisionTransformer
    except Exception as e:  # whatever an unfitting set of packages raises
        raise NoReferenceError(
            '--verify of a dense backbone needs mmdetection (mmdet, mmengine, mmcv), its import failed: '
            f'{" ".join(str(e).split())[:200]}') from e

    def build(info: Description) -> nn.Module:
        return PyramidVisionTransformer(
            pretrain_img_size=info.img_size,
            in_channels=info.in_chans,
            embed_dims=info.embed_dims[0] // VARIANTS[variant_of(info)]['num_heads'][0],
            num_layers=list(info.depths),
            num_heads=[d // info.embed_dims[0] for d in info.embed_dims],
            mlp_ratios=[int(r) for r in info.mlp_ratios],
            sr_ratios=list(info.sr_ratios),
        ).double()

    return Reference(
        f'mmdetection {mmdet.__version__}', 'mmdet', build,
        lambda model: [layer[1][-1] for layer in model.layers], ('.0.norm', '.attn.norm'))


def _original(checkout: Path) -> Reference:
    module = import_original(checkout)

    def build(info: Description) -> nn.Module:
        build_variant = getattr(module, variant_of(info), None)
        if build_variant is None or info.img_size[0] != info.img_size[1]:
            raise NoReferenceError(
                f'--verify: the original code has no {variant_of(info)} for {info.img_size[0]}x{info.img_size[1]}.')
        return build_variant(
            img_size=info.img_size[0], in_chans=info.in_chans, num_classes=info.num_classes).double()

    return Reference(
        f'whai362/PVT in {checkout.name}', 'original', build,
        lambda model: [getattr(model, f'block{i}')[-1] for i in range(1, 5)])


def import_original(checkout: Path) -> types.ModuleType:
    """Import classification/pvt.py of a checkout, whose models stay out of timm's registry."""
    file = checkout / 'classification' / 'pvt.py'
    if not file.is_file():
        raise ValueError(f'Expected a checkout of whai362/PVT in {CHECKOUT}, {file} is not there.')
    spec = importlib.util.spec_from_file_location('_pvt_original', file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it imports from timm's old places
        with mock.patch('timm.models.registry.register_model', lambda fn: fn):
            spec.loader.exec_module(module)
    return module
