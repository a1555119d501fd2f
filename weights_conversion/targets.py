""" What a conversion writes into its folder, one function per target format. """
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from pvt_timm.labels import LABELS_FILE
from pvt_timm.pvt import VARIANTS
from pvt_timm.version import __version__

from .reading import StateDict, Weights, default_cfg
from .report import Report
from .sources import CLASS_ROW_FILE, clean

__all__ = ['WRITERS', 'save_tensors', 'transformers_config', 'write_card']


def save_tensors(tensors: StateDict, file: Path) -> None:
    """Write a safetensors or torch file, as its name says."""
    # in memory of their own: safetensors refuses parts of other tensors, torch.save would write the whole
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    if file.suffix == '.safetensors':
        save_file(tensors, file, metadata={'format': 'pt'})
    else:
        torch.save(OrderedDict(tensors), file)


def write_timm(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """model.safetensors and config.json in the layout of timm's hub repositories."""
    save_tensors(tensors, folder / 'model.safetensors')
    info, cfg = weights.info, dict(weights.cfg)
    names = cfg.pop('label_names', None)
    default = default_cfg(weights.variant)
    _write_json({
        'architecture': weights.variant,
        'num_classes': info.num_classes,
        'num_features': info.embed_dims[-1],
        'global_pool': weights.model_args.get('global_pool', 'token' if info.class_token and info.norm else 'avg'),
        'model_args': weights.model_args,
        **({'label_names': names} if names else {}),
        'pretrained_cfg': {
            'custom_load': False,
            'fixed_input_size': False,
            'min_input_size': [info.in_chans, 32, 32],
            'pool_size': [n // 32 for n in cfg['input_size'][1:]],
            **cfg,
            'num_classes': info.num_classes,
            **{k: getattr(default, k) for k in ('first_conv', 'classifier', 'paper_ids', 'paper_name')},
        },
    }, folder / 'config.json')


def write_original(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """A bare state dict, as whai362/PVT publishes, with the names of the classes beside it."""
    save_tensors(tensors, folder / f'{weights.variant}.pth')
    names = weights.cfg.get('label_names')
    if names:
        (folder / LABELS_FILE).write_text(''.join(f'{label}\n' for label in names), encoding='utf-8')


def write_mmdet(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """A bare state dict for mmdetection's backbone."""
    save_tensors(tensors, folder / f'{weights.variant}.pth')


def write_transformers(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """What `PvtForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained` read."""
    cfg = weights.cfg
    save_tensors(tensors, folder / 'model.safetensors')
    _write_json(transformers_config(weights), folder / 'config.json')
    _write_json({
        'image_processor_type': 'PvtImageProcessor',
        'do_resize': True,
        'size': dict(zip(('height', 'width'), cfg['input_size'][1:])),
        'resample': {'nearest': 0, 'lanczos': 1, 'bilinear': 2}.get(cfg['interpolation'], 3),
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': cfg['mean'],
        'image_std': cfg['std'],
    }, folder / 'preprocessor_config.json')


WRITERS: Dict[str, Callable[[Path, Weights, StateDict], None]] = {
    'timm': write_timm,
    'original': write_original,
    'transformers': write_transformers,
    'mmdet': write_mmdet,
}


def transformers_config(weights: Weights) -> Dict[str, Any]:
    """config.json for transformers' PvtForImageClassification."""
    info = weights.info
    labels = weights.cfg.get('label_names') or [f'LABEL_{i}' for i in range(info.num_classes)]
    dtype = str(info.dtype).removeprefix('torch.')
    return {
        'architectures': ['PvtForImageClassification'],
        'model_type': 'pvt',
        'image_size': info.img_size[0],
        'num_channels': info.in_chans,
        'depths': info.depths,
        'hidden_sizes': info.embed_dims,
        'num_attention_heads': VARIANTS[weights.variant]['num_heads'],
        'sequence_reduction_ratios': info.sr_ratios,
        'mlp_ratios': [int(r) if r == int(r) else r for r in info.mlp_ratios],
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6,
        'qkv_bias': True,
        'num_labels': info.num_classes,
        'id2label': {str(i): name for i, name in enumerate(labels)},
        'label2id': {name: i for i, name in enumerate(labels)},
        'dtype': dtype,
        'torch_dtype': dtype,
    }


def _write_json(content: Dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


# ---- model card -----------------------------------------------------------------------------------------------------

# library (the original's code is none) and what loads the folder there
_LOADED_BY = {
    'timm': ('timm', "`timm.create_model('local-dir:FOLDER', pretrained=True)` after `import pvt_timm`, also with "
             '`features_only=True`, or `hf-hub:OWNER/REPO` in place of the folder'),
    'transformers': ('transformers', "`PvtForImageClassification.from_pretrained('FOLDER')`"),
    'mmdet': ('mmdetection', "`backbone=dict(type='PyramidVisionTransformer', num_layers=DEPTHS, "
              "init_cfg=dict(type='Pretrained', checkpoint='FILE'))` in a config"),
    'original': (None, '`load_state_dict` of classification/pvt.py, or `pretrained=` in a config of detection/ and '
                 'segmentation/, of https://github.com/whai362/PVT'),
}


def _code(text: Any) -> str:
    """Text from elsewhere as an inline code span that it cannot leave."""
    return '`' + re.sub(r'[`|<>]', '?', clean(text, 200)) + '`'


def _provenance(weights: Weights, report: Report) -> str:
    """Table of where the weights come from and what became of them."""
    rows = [
        ('Source', _code(report.source)),
        ('File', f'{_code(report.file)}, {report.bytes:,} bytes'),
        ('sha256', _code(report.sha256) + (f', the public file of {report.known}' if report.known else '')),
        ('Source format', _code(report.origin())),
        ('Converter', f'pvt-timm {__version__}'),
        ('Target format', f'{report.to}, {report.dtype}'),
        ('Input', 'x'.join(map(str, weights.cfg['input_size']))),
        ('Parts', f'{", ".join(weights.parts) or "backbone"}; {weights.info.num_classes} classes'),
    ]
    check = report.verification
    if check:
        rows.append(('Verified', f'outputs equal those of {check["reference"]} in float64, within '
                                 f'{check["tolerance"]:g} with the original\'s eps'))
    dropped: Dict[str, List[str]] = {}
    for key, why in report.dropped.items():
        dropped.setdefault(why, []).append(key)
    for why, keys in dropped.items():
        shown = ', '.join(map(_code, keys[:8])) + (f' and {len(keys) - 8} more' if len(keys) > 8 else '')
        rows.append(('Left out', f'{shown} ({_code(why)})'))
    rows += [('Note', _code(note)) for note in report.notes]
    return '\n'.join(['| Provenance | |', '|---|---|', *(f'| {k} | {v} |' for k, v in rows)])


def write_card(folder: Path, weights: Weights, report: Report, about: Optional[str]) -> None:
    """README.md with `about`, by default what loads the weights, and where they come from."""
    library, use = _LOADED_BY[str(report.to)]
    use = use.replace('DEPTHS', str(list(weights.info.depths))).replace('FILE', f'{weights.variant}.pth')
    task = 'image-classification' if weights.info.num_classes else 'image-feature-extraction'
    licence = weights.cfg.get('license', '')
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[task, *([library] if library else []), 'pvt'],
        license=licence if re.fullmatch(r'[a-z0-9.-]+', licence) else None,
    )
    about = about or (
        f'# {weights.variant}\n\nWeights of a [Pyramid Vision Transformer](https://arxiv.org/abs/2102.12122) (v1), '
        f'converted by pvt-timm. What was changed, if anything, is said below.\n\nTo load them: {use}.')
    notes = '' if not (folder / CLASS_ROW_FILE).exists() else (
        f'\n\n`{CLASS_ROW_FILE}` holds the one row of the source\'s `pos_embed4` that belongs to the class token. No '
        'dense model uses it. It is kept so that the source can be restored.')
    card = f'---\n{data.to_yaml()}\n---\n\n{about}\n\n{_provenance(weights, report)}{notes}\n'
    ModelCard(card).save(folder / 'README.md')
