""" What a conversion writes into its folder, one function per target format. """
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
from safetensors.torch import save_file

from pvt_timm import __version__
from pvt_timm.checkpoints import Description
from pvt_timm.pvt import VARIANTS, find_variant

from .report import Report, clean
from .sources import CLASS_ROW_FILE

__all__ = ['Plan', 'WRITERS', 'num_heads', 'transformers_config']

CLASS_ROW = 'pos_embed4.class_row'


@dataclass
class Plan:
    """What to write.

    Attributes:
        state_dict: Tensors under the names of the target.
        class_row: Class token row that timm has no place for, None if there is none.
        info: Architecture of what is written.
        model_args: Arguments for `timm.create_model` besides the name.
        cfg: Preprocessing and labels.
        report: What is known about the source.
    """
    state_dict: Dict[str, torch.Tensor]
    class_row: Optional[torch.Tensor]
    info: Description
    model_args: Dict[str, Any]
    cfg: Dict[str, Any]
    report: Report


def num_heads(variant: str) -> Tuple[int, ...]:
    """Attention heads per stage, which no state dict tells."""
    return VARIANTS[variant]['num_heads']


def write_timm(folder: Path, plan: Plan) -> None:
    """model.safetensors and config.json in the layout of timm's hub repositories."""
    _save_safetensors(plan.state_dict, folder / 'model.safetensors')
    if plan.class_row is not None:
        _save_safetensors({CLASS_ROW: plan.class_row}, folder / CLASS_ROW_FILE)
    _write_json(timm_config(plan), folder / 'config.json')
    _write_card(folder, plan, _USE_TIMM if plan.info.num_classes else _USE_TIMM_FEATURES)


def write_original(folder: Path, plan: Plan) -> None:
    """A bare state dict, as whai362/PVT publishes."""
    _save_torch(plan.state_dict, folder / f'{find_variant(plan.info.depths, plan.info.embed_dims)}.pth')
    _write_card(folder, plan, _USE_ORIGINAL if plan.info.class_token else _USE_ORIGINAL_DENSE)


def write_mmdet(folder: Path, plan: Plan) -> None:
    """A bare state dict for mmdetection's backbone."""
    _save_torch(plan.state_dict, folder / f'{find_variant(plan.info.depths, plan.info.embed_dims)}.pth')
    _write_card(folder, plan, _USE_MMDET)


def write_transformers(folder: Path, plan: Plan) -> None:
    """What `PvtForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained` read."""
    _save_safetensors(plan.state_dict, folder / 'model.safetensors')
    _write_json(transformers_config(plan), folder / 'config.json')
    resample = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3}.get(plan.cfg.get('interpolation'), 3)
    _write_json({
        'image_processor_type': 'PvtImageProcessor',
        'do_resize': True,
        'size': dict(zip(('height', 'width'), plan.info.img_size)),
        'resample': resample,
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': list(plan.cfg['mean']),
        'image_std': list(plan.cfg['std']),
    }, folder / 'preprocessor_config.json')
    _write_card(folder, plan, _USE_TRANSFORMERS)


WRITERS: Dict[str, Callable[[Path, Plan], None]] = {
    'timm': write_timm,
    'original': write_original,
    'transformers': write_transformers,
    'mmdet': write_mmdet,
}


def timm_config(plan: Plan) -> Dict[str, Any]:
    """config.json of a timm repository."""
    info, size = plan.info, list(plan.info.img_size)
    default = timm.models.get_pretrained_cfg(find_variant(info.depths, info.embed_dims))
    cfg = {k: v for k, v in plan.cfg.items() if k != 'label_names'}
    pretrained_cfg = {
        'custom_load': False,
        'input_size': [info.in_chans, *size],
        'fixed_input_size': False,
        'min_input_size': [info.in_chans, 32, 32],
        'pool_size': [n // 32 for n in size],
        **cfg,
        'num_classes': info.num_classes,
        'first_conv': default.first_conv,
        'classifier': default.classifier,
        'paper_ids': 'arXiv:2102.12122',
        'paper_name': 'Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions',
    }
    config = {
        'architecture': find_variant(info.depths, info.embed_dims),
        'num_classes': info.num_classes,
        'num_features': info.embed_dims[-1],
        'global_pool': plan.model_args.get('global_pool', 'token' if info.class_token and info.norm else 'avg'),
        'model_args': plan.model_args,
        'pretrained_cfg': pretrained_cfg,
    }
    if plan.cfg.get('label_names'):
        config['label_names'] = list(plan.cfg['label_names'])
    return config


def transformers_config(plan: Plan) -> Dict[str, Any]:
    """config.json for transformers' PvtForImageClassification."""
    info = plan.info
    labels = plan.cfg.get('label_names') or [f'LABEL_{i}' for i in range(info.num_classes)]
    dtype = str(info.dtype).removeprefix('torch.')
    return {
        'architectures': ['PvtForImageClassification'],
        'model_type': 'pvt',
        'image_size': info.img_size[0],
        'num_channels': info.in_chans,
        'num_encoder_blocks': 4,
        'depths': list(info.depths),
        'hidden_sizes': list(info.embed_dims),
        'num_attention_heads': list(num_heads(find_variant(info.depths, info.embed_dims))),
        'sequence_reduction_ratios': list(info.sr_ratios),
        'mlp_ratios': [int(r) if r == int(r) else r for r in info.mlp_ratios],
        'patch_sizes': [info.patch_size, 2, 2, 2],
        'strides': [info.patch_size, 2, 2, 2],
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


def _save_safetensors(tensors: Dict[str, torch.Tensor], file: Path) -> None:
    save_file(_own_memory(tensors), file, metadata={'format': 'pt'})


def _save_torch(tensors: Dict[str, torch.Tensor], file: Path) -> None:
    # torch.save writes whole storages, also where a tensor is a small part of one
    tensors = OrderedDict(
        (k, v if v.untyped_storage().nbytes() == v.nbytes else v.clone()) for k, v in _own_memory(tensors).items())
    torch.save(tensors, file)


def _own_memory(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Contiguous tensors, no two of which overlap."""
    out = {k: v.detach().contiguous() for k, v in tensors.items()}
    end = 0
    for k, v in sorted(out.items(), key=lambda kv: kv[1].data_ptr()):
        if v.data_ptr() < end:
            out[k] = v.clone()
        else:
            end = v.data_ptr() + v.nbytes
    return out


# ---- model card -----------------------------------------------------------------------------------------------------

_USE_TIMM = '''\
import timm
import pvt_timm  # registers the models

model = timm.create_model('local-dir:FOLDER', pretrained=True)  # or hf-hub:OWNER/REPO
backbone = timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)
'''
_USE_TIMM_FEATURES = '''\
import timm
import pvt_timm  # registers the models

backbone = timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)  # or hf-hub:OWNER/REPO
'''
_USE_ORIGINAL = '''\
import torch
from pvt import VARIANT  # classification/pvt.py of https://github.com/whai362/PVT

model = VARIANT(ARGS)
model.load_state_dict(torch.load('VARIANT.pth', weights_only=True))
'''
_USE_ORIGINAL_DENSE = '''\
# in a config of detection/ or segmentation/ of https://github.com/whai362/PVT
model = dict(pretrained='VARIANT.pth', backbone=dict(type='VARIANT'))
'''
_USE_MMDET = '''\
# in a config of mmdetection
model = dict(backbone=dict(
    type='PyramidVisionTransformer', num_layers=DEPTHS,
    init_cfg=dict(type='Pretrained', checkpoint='VARIANT.pth')))
'''
_USE_TRANSFORMERS = '''\
from transformers import AutoImageProcessor, PvtForImageClassification

processor = AutoImageProcessor.from_pretrained('FOLDER')
model = PvtForImageClassification.from_pretrained('FOLDER')
'''


def _code(text: Any) -> str:
    """Text from elsewhere as an inline code span that it cannot leave."""
    return '`' + re.sub(r'[`|<>]', '?', clean(text, 200)) + '`'


def _write_card(folder: Path, plan: Plan, use: str) -> None:
    info, report = plan.info, plan.report
    args = [f'num_classes={info.num_classes}'] if info.num_classes != 1000 else []
    if info.in_chans != 3:
        args.append(f'in_chans={info.in_chans}')
    if info.img_size != (224, 224):
        args.append(f'img_size={info.img_size[0]}')
    for name, value in dict(VARIANT=find_variant(info.depths, info.embed_dims), ARGS=', '.join(args), DEPTHS=list(info.depths)).items():
        use = use.replace(name, str(value))
    library = 'transformers' if report.to == 'transformers' else 'timm'
    task = 'image-classification' if info.num_classes else 'image-feature-extraction'
    head = ['---', f'library_name: {library}', f'pipeline_tag: {task}', 'tags:', f'- {task}', f'- {library}', '- pvt']
    licence = plan.cfg.get('license')
    if licence and re.fullmatch(r'[a-z0-9.-]+', licence):
        head.append(f'license: {licence}')
    parts = [name for name, there in (
        ('class token', info.class_token), ('final norm', info.norm), ('head', info.num_classes)) if there]
    dropped: Dict[str, List[str]] = {}
    for key, why in report.dropped.items():
        dropped.setdefault(why, []).append(key)
    rows = [
        ('Source', _code(report.source)),
        ('File', f'{_code(report.file)}, {report.bytes:,} bytes'),
        ('sha256', _code(report.sha256) + (f', {report.known}' if report.known else '')),
        ('Source format', report.format + (f' in {_code(" > ".join(report.wrappers))}' if report.wrappers else '')
         + (f', names start with {_code(report.prefix)}' if report.prefix else '')),
        ('Weights', report.weights),
        ('Converter', f'pvt-timm {__version__}'),
        ('Target format', str(report.to)),
        ('Type', report.dtype),
        ('Input', f'{info.in_chans} x {info.img_size[0]} x {info.img_size[1]}'),
        ('Parts', ', '.join(parts) or 'backbone'),
        ('Classes', str(info.num_classes)),
    ]
    if report.dtype != report.source_dtype:
        rows.append(('Changed', f'cast from {report.source_dtype} to {report.dtype}'))
    if info.img_size != report.img_size:
        rows.append(('Changed', 'position embeddings resized (bilinear) from the grid of {}x{} to that of {}x{} images'
                     .format(*report.img_size, *info.img_size)))
    for why, keys in dropped.items():
        shown = ', '.join(map(_code, keys[:8])) + (f' and {len(keys) - 8} more' if len(keys) > 8 else '')
        rows.append(('Left out', f'{shown} ({_code(why)})'))
    rows += [('Note', _code(w)) for w in report.warnings]
    changed = any(name == 'Changed' for name, _ in rows)
    lines = [
        *head, '---', '', f'# {find_variant(info.depths, info.embed_dims)}', '',
        'Weights of a [Pyramid Vision Transformer](https://arxiv.org/abs/2102.12122) (v1), converted without a change '
        'to their values' + (' but those under "Changed".' if changed else '.'), '',
        '```python', use.rstrip(), '```', '',
        '| Provenance | |', '|---|---|', *(f'| {k} | {v} |' for k, v in rows), '',
    ]
    if plan.class_row is not None:
        lines += [
            f'`{CLASS_ROW_FILE}` holds the one row of the source\'s `pos_embed4` that belongs to the class token. No '
            'dense model uses it. It is kept so that the source can be restored.', '']
    (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
