""" What a conversion writes into its folder, one function per target format. """
import copy
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save
from timm.models import get_pretrained_cfg

from pvt_timm.checkpoints import StateDict
from pvt_timm.labels import LABELS_FILE, labels_text
from pvt_timm.pvt import VARIANTS
from pvt_timm.version import __version__

from .reading import CLASS_ROW, POS_EMBED, Weights
from .report import Report
from .sources import CLASS_ROW_FILE

__all__ = ['CARDS', 'WRITERS', 'transformers_config', 'write_card']

CARDS = Path(__file__).parent / 'cards'  # texts of model cards


def _save_tensors(tensors: StateDict, file: Path) -> None:
    """Write a safetensors or torch file, as its name says."""
    # in memory of their own: safetensors refuses parts of other tensors, torch.save would write the whole
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    if file.suffix == '.safetensors':
        file.write_bytes(save(tensors, metadata={'format': 'pt'}))  # a file of `save_file` is its owner's alone
    else:
        torch.save(OrderedDict(tensors), file)


def write_timm(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """model.safetensors and config.json in the layout of timm's hub repositories, and what timm has no place for."""
    _save_tensors(tensors, folder / 'model.safetensors')
    info, cfg = weights.info, dict(weights.cfg)
    if weights.has_bare_row:
        _save_tensors({CLASS_ROW: weights.state_dict[POS_EMBED][:, :1]}, folder / CLASS_ROW_FILE)
    names = cfg.pop('label_names', None)
    default: Any = get_pretrained_cfg(weights.variant)
    _write_json({
        'architecture': weights.variant,
        'num_classes': info.num_classes,
        'num_features': info.embed_dims[-1],
        'global_pool': weights.model_args.get('global_pool', 'token' if info.class_token and info.norm else 'avg'),
        'model_args': weights.model_args,
        **({'label_names': names} if names else {}),
        'pretrained_cfg': {
            **cfg,
            'num_classes': info.num_classes,
            'min_input_size': [info.in_chans, 32, 32],
            'pool_size': [n // 32 for n in cfg['input_size'][1:]],
            'first_conv': default.first_conv,
            'classifier': default.classifier,
        },
    }, folder / 'config.json')


def write_bare(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """A bare state dict, as whai362/PVT and OpenMMLab publish, with the names of the classes beside it."""
    _save_tensors(tensors, folder / f'{weights.variant}.pth')
    names = weights.cfg.get('label_names')
    if names:
        (folder / LABELS_FILE).write_bytes(labels_text(names))


def write_transformers(folder: Path, weights: Weights, tensors: StateDict) -> None:
    """What `PvtForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained` read."""
    cfg = weights.cfg
    _save_tensors(tensors, folder / 'model.safetensors')
    _write_json(transformers_config(weights), folder / 'config.json')
    _write_json({
        'image_processor_type': 'PvtImageProcessor',
        'size': dict(zip(('height', 'width'), cfg['input_size'][1:])),
        'resample': {'nearest': 0, 'lanczos': 1, 'bilinear': 2}.get(cfg['interpolation'], 3),
        'image_mean': cfg['mean'],
        'image_std': cfg['std'],
    }, folder / 'preprocessor_config.json')


WRITERS: Dict[str, Callable[[Path, Weights, StateDict], None]] = {
    'timm': write_timm,
    'original': write_bare,
    'transformers': write_transformers,
    'mmdet': write_bare,
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
        'mlp_ratios': [int(r) for r in info.mlp_ratios],
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6,
        'qkv_bias': True,
        'num_labels': info.num_classes,
        'id2label': dict(enumerate(labels)),
        'label2id': {name: i for i, name in enumerate(labels)},
        'dtype': dtype,
        'torch_dtype': dtype,
    }


def _write_json(content: Dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def write_card(folder: Path, weights: Weights, report: Report, about: Optional[str]) -> None:
    """README.md with `about`, by default what loads the weights, and the report."""
    library = {'mmdet': 'mmdetection', 'original': None}.get(str(report.to), report.to)  # the original's code is none
    task = 'image-classification' if weights.info.num_classes else 'image-feature-extraction'
    licence = weights.cfg.get('license', '')
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[task, *([library] if library else []), 'pvt'],
        license=licence if re.fullmatch(r'[a-z0-9.-]+', licence) else None,
    )
    shown, source = copy.copy(report), Path(report.source)
    if source.exists():  # folders of this machine are private
        shown.source = source.absolute().name
    ModelCard.from_template(
        data, str(CARDS / 'converted.md'), about=about, to=report.to, variant=weights.variant,
        depths=list(weights.info.depths), version=__version__, report=shown.to_text(),
        class_row=(folder / CLASS_ROW_FILE).exists(),
    ).save(folder / 'README.md')
