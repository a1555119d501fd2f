""" What a conversion writes into its folder, one function per target format, which returns an example of use. """
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from timm.models import PretrainedCfg, get_pretrained_cfg

from pvt_timm.checkpoints import Description
from pvt_timm.labels import LABELS_FILE
from pvt_timm.pvt import VARIANTS, find_variant
from pvt_timm.version import __version__

from .report import Report, clean
from .sources import CLASS_ROW_FILE

__all__ = ['CLASS_ROW', 'Contents', 'WRITERS', 'default_cfg', 'transformers_config', 'variant_of', 'write_card']

CLASS_ROW = 'pos_embed4.class_row'


@dataclass
class Contents:
    """What to write."""
    state_dict: Dict[str, torch.Tensor]  # under the names of the target
    class_row: Optional[torch.Tensor]  # class token row that timm has no place for, None if there is none
    info: Description  # architecture of what is written
    model_args: Dict[str, Any]  # arguments for `timm.create_model` besides the name
    cfg: Dict[str, Any]  # preprocessing and labels
    report: Report  # what is known about the source
    about: Optional[str] = None  # text of the model card before the table, None for an example of use


def variant_of(info: Description) -> str:
    """Name of the timm model. The caller knows that it is one."""
    name = find_variant(info.depths, info.embed_dims)
    assert name is not None
    return name


def default_cfg(name: str) -> PretrainedCfg:
    """Pretrained config of a timm model, with or without a tag."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return cfg


def write_timm(folder: Path, contents: Contents) -> str:
    """model.safetensors and config.json in the layout of timm's hub repositories."""
    _save_safetensors(contents.state_dict, folder / 'model.safetensors')
    if contents.class_row is not None:
        _save_safetensors({CLASS_ROW: contents.class_row}, folder / CLASS_ROW_FILE)
    _write_json(timm_config(contents), folder / 'config.json')
    use = 'import timm\nimport pvt_timm  # registers the models\n\n'
    if contents.info.num_classes:
        use += "model = timm.create_model('local-dir:FOLDER', pretrained=True)  # or hf-hub:OWNER/REPO\n"
    return use + "backbone = timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)"


def write_original(folder: Path, contents: Contents) -> str:
    """A bare state dict, as whai362/PVT publishes, with the names of the classes beside it."""
    info, name = contents.info, variant_of(contents.info)
    _save_torch(contents.state_dict, folder / f'{name}.pth')
    if contents.cfg.get('label_names'):
        text = ''.join(f'{label}\n' for label in contents.cfg['label_names'])
        (folder / LABELS_FILE).write_text(text, encoding='utf-8')
    if not info.class_token:
        return ('# in a config of detection/ or segmentation/ of https://github.com/whai362/PVT\n'
                f"model = dict(pretrained='{name}.pth', backbone=dict(type='{name}'))")
    return (f'import torch\nfrom pvt import {name}  # classification/pvt.py of https://github.com/whai362/PVT\n\n'
            f'model = {name}(num_classes={info.num_classes}, in_chans={info.in_chans}, img_size={info.img_size[0]})\n'
            f"model.load_state_dict(torch.load('{name}.pth', weights_only=True))")


def write_mmdet(folder: Path, contents: Contents) -> str:
    """A bare state dict for mmdetection's backbone."""
    name = variant_of(contents.info)
    _save_torch(contents.state_dict, folder / f'{name}.pth')
    return ('# in a config of mmdetection\nmodel = dict(backbone=dict(\n'
            f"    type='PyramidVisionTransformer', num_layers={list(contents.info.depths)},\n"
            f"    init_cfg=dict(type='Pretrained', checkpoint='{name}.pth')))")


def write_transformers(folder: Path, contents: Contents) -> str:
    """What `PvtForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained` read."""
    cfg = contents.cfg
    _save_safetensors(contents.state_dict, folder / 'model.safetensors')
    _write_json(transformers_config(contents.info, cfg.get('label_names')), folder / 'config.json')
    _write_json({
        'image_processor_type': 'PvtImageProcessor',
        'do_resize': True,
        'size': dict(zip(('height', 'width'), cfg['input_size'][1:])),
        'resample': {'nearest': 0, 'lanczos': 1, 'bilinear': 2}.get(cfg['interpolation'], 3),
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': list(cfg['mean']),
        'image_std': list(cfg['std']),
    }, folder / 'preprocessor_config.json')
    return ('from transformers import AutoImageProcessor, PvtForImageClassification\n\n'
            "processor = AutoImageProcessor.from_pretrained('FOLDER')\n"
            "model = PvtForImageClassification.from_pretrained('FOLDER')")


WRITERS: Dict[str, Callable[[Path, Contents], str]] = {
    'timm': write_timm,
    'original': write_original,
    'transformers': write_transformers,
    'mmdet': write_mmdet,
}


def timm_config(contents: Contents) -> Dict[str, Any]:
    """config.json of a timm repository."""
    info = contents.info
    default = default_cfg(variant_of(info))
    config = {
        'architecture': variant_of(info),
        'num_classes': info.num_classes,
        'num_features': info.embed_dims[-1],
        'global_pool': contents.model_args.get('global_pool', 'token' if info.class_token and info.norm else 'avg'),
        'model_args': contents.model_args,
        'pretrained_cfg': {
            'custom_load': False,
            'fixed_input_size': False,
            'min_input_size': [info.in_chans, 32, 32],
            'pool_size': [n // 32 for n in contents.cfg['input_size'][1:]],
            **{k: v for k, v in contents.cfg.items() if k != 'label_names'},
            'num_classes': info.num_classes,
            'first_conv': default.first_conv,
            'classifier': default.classifier,
            'paper_ids': default.paper_ids,
            'paper_name': default.paper_name,
        },
    }
    if contents.cfg.get('label_names'):
        config['label_names'] = list(contents.cfg['label_names'])
    return config


def transformers_config(info: Description, labels: Optional[List[str]] = None) -> Dict[str, Any]:
    """config.json for transformers' PvtForImageClassification."""
    labels = labels or [f'LABEL_{i}' for i in range(info.num_classes)]
    dtype = str(info.dtype).removeprefix('torch.')
    return {
        'architectures': ['PvtForImageClassification'],
        'model_type': 'pvt',
        'image_size': info.img_size[0],
        'num_channels': info.in_chans,
        'num_encoder_blocks': 4,
        'depths': list(info.depths),
        'hidden_sizes': list(info.embed_dims),
        'num_attention_heads': list(VARIANTS[variant_of(info)]['num_heads']),
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
    torch.save(OrderedDict(_own_memory(tensors)), file)


def _own_memory(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Tensors of which none is a part of another: safetensors refuses that, torch.save would write the whole."""
    return {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


# ---- model card -----------------------------------------------------------------------------------------------------

# what loads each format; the original's code is no library
_LIBRARIES = {'timm': 'timm', 'transformers': 'transformers', 'mmdet': 'mmdetection', 'original': None}


def _code(text: Any) -> str:
    """Text from elsewhere as an inline code span that it cannot leave."""
    return '`' + re.sub(r'[`|<>]', '?', clean(text, 200)) + '`'


def _provenance(contents: Contents) -> str:
    """Table of where the weights come from and what became of them."""
    info, report = contents.info, contents.report
    parts = [name for name, there in (
        ('class token', info.class_token), ('final norm', info.norm), ('head', info.num_classes)) if there]
    rows = [
        ('Source', _code(report.source)),
        ('File', f'{_code(report.file)}, {report.bytes:,} bytes'),
        ('sha256', _code(report.sha256) + (f', the public file of {report.known}' if report.known else '')),
        ('Source format', report.format + (f' in {_code(" > ".join(report.wrappers))}' if report.wrappers else '')
         + (f', names start with {_code(report.prefix)}' if report.prefix else '')),
        ('Weights', report.weights),
        ('Converter', f'pvt-timm {__version__}'),
        ('Target format', str(report.to)),
        ('Type', report.dtype),
        ('Input', 'x'.join(map(str, contents.cfg['input_size']))),
        ('Parts', ', '.join(parts) or 'backbone'),
        ('Classes', str(info.num_classes)),
    ]
    check = report.verification
    if check:
        rows.append(('Verified', f'outputs equal those of {check["reference"]} in float64 (tolerance '
                                 f'{check["tolerance"]:g} {check["measure"]})'))
    if report.dtype != report.source_dtype:
        rows.append(('Changed', f'cast from {report.source_dtype} to {report.dtype}'))
    if info.img_size != report.img_size:
        rows.append(('Changed', 'position embeddings resized (bilinear) from the grid of {}x{} to that of {}x{} images'
                     .format(*report.img_size, *info.img_size)))
    dropped: Dict[str, List[str]] = {}
    for key, why in report.dropped.items():
        dropped.setdefault(why, []).append(key)
    for why, keys in dropped.items():
        shown = ', '.join(map(_code, keys[:8])) + (f' and {len(keys) - 8} more' if len(keys) > 8 else '')
        rows.append(('Left out', f'{shown} ({_code(why)})'))
    rows += [('Note', _code(w)) for w in report.warnings]
    return '\n'.join(['| Provenance | |', '|---|---|', *(f'| {k} | {v} |' for k, v in rows)])


def write_card(folder: Path, contents: Contents, use: str) -> None:
    """README.md with an example of use and the provenance of the weights."""
    info, report = contents.info, contents.report
    library = _LIBRARIES[str(report.to)]
    task = 'image-classification' if info.num_classes else 'image-feature-extraction'
    licence = contents.cfg.get('license', '')
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[task, *([library] if library else []), 'pvt'],
        license=licence if re.fullmatch(r'[a-z0-9.-]+', licence) else None,
    )
    about = contents.about or '\n'.join([
        f'# {variant_of(info)}', '',
        'Weights of a [Pyramid Vision Transformer](https://arxiv.org/abs/2102.12122) (v1), converted by pvt-timm. What '
        'was changed, if anything, is said below.', '', '```python', use, '```'])
    notes = '' if contents.class_row is None else (
        f'\n\n`{CLASS_ROW_FILE}` holds the one row of the source\'s `pos_embed4` that belongs to the class token. No '
        'dense model uses it. It is kept so that the source can be restored.')
    ModelCard(f'---\n{data.to_yaml()}\n---\n\n{about}\n\n{_provenance(contents)}{notes}\n').save(folder / 'README.md')
