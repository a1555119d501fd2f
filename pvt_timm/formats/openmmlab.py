""" The format of OpenMMLab: PyramidVisionTransformer of mmdetection, also as `backbone.*` of detectors and segmenters.

It has no class token, no final norm and no head. Its norms have eps 1e-6 everywhere.
"""
import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch

from .format import Format, NoReferenceError, Reference, Said, layer_norms
from .names import Row, StateDict
from .values import class_names, numbers, shown
from .writing import write_tensors

if TYPE_CHECKING:
    from ..weights import Weights

__all__ = ['FORMATS', 'Unknown', 'find_dicts', 'normalisation', 'read_backbone', 'read_config_text']

MAX_CONFIG_LENGTH = 2 ** 20  # characters of the config in a file
EPS = 1e-6


def _to_linear(x: torch.Tensor) -> torch.Tensor:
    """Return the weight of a 1x1 convolution as the weight of a linear layer.

    Other kernels are returned unchanged, and refused later because of their shape.
    """
    return x[:, :, 0, 0] if x.shape[2:] == (1, 1) else x


def _to_conv1x1(x: torch.Tensor) -> torch.Tensor:
    return x[..., None, None] if x.ndim == 2 else x


class OpenMMLabFormat(Format):
    name = 'mmdet'
    table = (
        #   timm                                     mmdetection
        Row('stages.{i}.pos_embed',                 'layers.{i}.1.0.pos_embed'),
        Row('stages.{i}.patch_embed.proj.{p}',      'layers.{i}.0.projection.{p}'),
        Row('stages.{i}.patch_embed.norm.{p}',      'layers.{i}.0.norm.{p}'),
        Row('stages.{i}.blocks.{j}.norm1.{p}',      'layers.{i}.1.{b}.norm1.{p}'),
        Row(('stages.{i}.blocks.{j}.attn.q.{p}',
             'stages.{i}.blocks.{j}.attn.kv.{p}'),  'layers.{i}.1.{b}.attn.attn.in_proj_{p}',
            our_pieces=(1, 2), their_pieces=(3,)),
        Row('stages.{i}.blocks.{j}.attn.sr.{p}',    'layers.{i}.1.{b}.attn.sr.{p}'),
        Row('stages.{i}.blocks.{j}.attn.norm.{p}',  'layers.{i}.1.{b}.attn.norm.{p}'),
        Row('stages.{i}.blocks.{j}.attn.proj.{p}',  'layers.{i}.1.{b}.attn.attn.out_proj.{p}'),
        Row('stages.{i}.blocks.{j}.norm2.{p}',      'layers.{i}.1.{b}.norm2.{p}'),
        Row('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'layers.{i}.1.{b}.ffn.layers.0.{p}',
            to_ours=_to_linear, to_theirs=_to_conv1x1),
        Row('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'layers.{i}.1.{b}.ffn.layers.3.{p}',
            to_ours=_to_linear, to_theirs=_to_conv1x1),
    )
    first_weight = ('layers.0.0.projection.weight',)
    start = re.compile(r'(?:layers|norm\d*)\b')
    model_args = {'embed_norm_eps': EPS}
    is_target = True
    library = 'mmdetection'

    def read_meta(self, checkpoint: Mapping[str, Any]) -> Optional[Said]:
        """Return names and colours of classes, arguments of the PVT, and the normalisation of images, from `meta`."""
        meta = checkpoint.get('meta')
        if not isinstance(meta, Mapping):
            return None
        said = Said("the config in the checkpoint ('meta')")
        dataset = meta.get('dataset_meta')
        for place in (dataset, meta):
            if isinstance(place, Mapping):
                said.label_names = said.label_names or _first(class_names, place, 'classes', 'CLASSES')
                said.palette = said.palette or _first(_colours, place, 'palette', 'PALETTE')
        config = read_config_text(meta)
        said.model_args = read_backbone(config)
        found = normalisation(config)
        if found is not None:
            said.mean, said.std = found
        return said

    def check_parts(self, weights: 'Weights', drop: Sequence[str]) -> List[str]:
        have = ['class_token', *weights.parts] if weights.has_bare_row else weights.parts
        left = [part for part in have if part not in drop]
        if left:
            raise ValueError(
                f'The mmdet format has no place for {", ".join(left)}: leave them out with --drop {" ".join(have)}.')
        weights.refuse_args(self.name, but=('img_size', 'in_chans', 'class_token', 'embed_norm_eps', 'global_pool'))
        return self.check_eps(weights, EPS) + self.notes_on_images(weights)

    def write(self, folder: Path, weights: 'Weights', tensors: StateDict) -> None:
        """Write a bare state dict, which mmdetection's `init_cfg` reads."""
        write_tensors(tensors, folder / f'{weights.variant}.pth')

    def reference(self, weights: 'Weights') -> Reference:
        try:
            import mmdet
            from mmdet.models.backbones.pvt import PyramidVisionTransformer
        except Exception as e:  # versions of packages that do not fit together raise all kinds of errors
            raise NoReferenceError(
                '--verify of a dense backbone needs mmdetection (mmdet, mmengine, mmcv), its import failed: '
                f'{" ".join(str(e).split())[:200]}') from e
        info, heads = weights.info, weights.num_heads
        width = info.embed_dims[0] // heads[0]  # of a head, the same in all stages
        model = PyramidVisionTransformer(
            pretrain_img_size=info.img_size, in_channels=info.in_chans, embed_dims=width,
            num_layers=list(info.depths), num_heads=[dim // width for dim in info.embed_dims],
            mlp_ratios=[int(ratio) for ratio in info.mlp_ratios], sr_ratios=list(info.sr_ratios))
        return Reference(
            name=f'mmdetection {mmdet.__version__}',
            format=self.name,
            model=model,
            blocks=[layer[1][-1] for layer in model.layers],
            norms=layer_norms(model, '.0.norm', '.attn.norm'),
        )

    def how_to_load(self, weights: 'Weights') -> str:
        info = weights.info
        width = info.embed_dims[0] // weights.num_heads[0]
        usual = {'embed_dims': 64, 'pretrain_img_size': 224, 'in_channels': 3, 'num_heads': [1, 2, 5, 8],
                 'sr_ratios': [8, 4, 2, 1], 'mlp_ratios': [8, 8, 4, 4]}
        args = {'embed_dims': width, 'pretrain_img_size': _one_if_square(info.img_size), 'in_channels': info.in_chans,
                'num_heads': [dim // width for dim in info.embed_dims], 'sr_ratios': list(info.sr_ratios),
                'mlp_ratios': [int(ratio) for ratio in info.mlp_ratios]}
        others = ''.join(f', {name}={value}' for name, value in args.items() if value != usual[name])
        return (
            f"`backbone=dict(type='PyramidVisionTransformer', num_layers={list(info.depths)}{others}, "
            f"init_cfg=dict(type='Pretrained', checkpoint='{weights.variant}.pth'))` in a config.")


FORMATS = [OpenMMLabFormat()]


# ---- the config in a checkpoint --------------------------------------------------------------------------------------

def read_config_text(meta: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the config that OpenMMLab's training keeps as Python text in a checkpoint. Nothing in it is executed.

    Args:
        meta: The value of 'meta' in the checkpoint.

    Returns:
        Names at the top of the config and their values: dicts, lists, tuples, numbers, texts and None. Any other value
        becomes an `Unknown`. Empty without a config.

    Raises:
        ValueError: The text is too long, or no Python.
    """
    text = meta.get('cfg') or meta.get('config')
    if not isinstance(text, str):
        return {}
    if len(text) > MAX_CONFIG_LENGTH:
        raise ValueError(f'Expected a config of at most {MAX_CONFIG_LENGTH} characters in the checkpoint, got '
                         f'{len(text)}.')
    config: Dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name):
                    config[target.id] = _value(statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f'Cannot read the config in the checkpoint: {type(e).__name__}, {shown(str(e))}.') from e
    return config


class Unknown:
    """Stands for a value in a config that is not a dict, list, tuple, number, text or None."""


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_value(x) for x in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(x) for x in node.elts)
    if isinstance(node, ast.Dict):
        pairs = [(_value(key) if key else None, _value(x)) for key, x in zip(node.keys, node.values)]
        return {key: x for key, x in pairs if isinstance(key, (str, int, float, bool, tuple))}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        return -value if isinstance(value, (int, float)) else Unknown()
    return Unknown()


# Settings of mmdetection's backbone for which only one value is supported
_BACKBONE = {
    'patch_norm': True, 'use_abs_pos_embed': True, 'use_conv_ffn': False, 'norm_after_stage': False,
    'patch_sizes': (4, 2, 2, 2), 'strides': (4, 2, 2, 2), 'paddings': (0, 0, 0, 0)}


def read_backbone(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments of the timm model that the config of a PyramidVisionTransformer gives.

    Raises:
        ValueError: The config has a setting that the timm model has no argument for. The message names it.
    """
    model = config.get('model')
    backbone = model.get('backbone') if isinstance(model, dict) else None
    if not isinstance(backbone, dict) or backbone.get('type') not in ('PyramidVisionTransformer',
                                                                      'mmdet.PyramidVisionTransformer'):
        return {}
    for name, ours in _BACKBONE.items():
        theirs = backbone.get(name, ours)
        if (tuple(theirs) if isinstance(theirs, list) else theirs) != ours:
            raise ValueError(f'Expected {name} {shown(ours)} of the backbone, the config of the checkpoint says '
                             f'{shown(theirs)}.')
    act, norm = backbone.get('act_cfg'), backbone.get('norm_cfg')
    if isinstance(act, dict) and act.get('type', 'GELU') != 'GELU':
        raise ValueError(
            f'Expected act_cfg GELU of the backbone, the config of the checkpoint says {shown(act["type"])}.')
    if isinstance(norm, dict) and (norm.get('type', 'LN'), norm.get('eps', EPS)) != ('LN', EPS):
        raise ValueError(f'Expected norm_cfg LN with eps {EPS:g} of the backbone, the config of the checkpoint says '
                         f'{shown(norm.get("type"))} and {shown(norm.get("eps"))}.')
    names = ('num_heads', 'sr_ratios', 'mlp_ratios', 'qkv_bias')
    return {name: backbone[name] for name in names if backbone.get(name) is not None}


def find_dicts(config: Any, wanted: str) -> Iterator[Dict[str, Any]]:
    """Yield all dicts inside of a config whose `type` is `wanted`, with or without the name of a package before it."""
    if isinstance(config, dict):
        name = config.get('type')
        if isinstance(name, str) and name.rpartition('.')[2] == wanted:
            yield config
    values = config.values() if isinstance(config, dict) else config if isinstance(config, (list, tuple)) else ()
    for value in values:
        yield from find_dicts(value, wanted)


def normalisation(config: Dict[str, Any]) -> Optional[Tuple[Tuple[float, ...], Tuple[float, ...]]]:
    """Return mean and std of a config, for images with values from 0 to 1, None if it has none.

    Raises:
        ValueError: The config gives different ones, or says that images are BGR.
    """
    found = sorted(set(_normalisations(config)))
    if len(found) > 1:
        several = ' and '.join(f'mean {list(mean)}, std {list(std)}, RGB {rgb}' for mean, std, rgb in found)
        raise ValueError(f'Expected one normalisation of images in the config of the checkpoint, got {several}.')
    for mean, std, rgb in found:
        if not rgb:
            raise ValueError(
                'Expected a model for RGB images, the config of the checkpoint says BGR (to_rgb or bgr_to_rgb is '
                'False).')
        return tuple(round(x / 255, 6) for x in mean), tuple(round(x / 255, 6) for x in std)
    return None


def _normalisations(config: Dict[str, Any]) -> Iterator[Tuple[Tuple[float, ...], Tuple[float, ...], bool]]:
    """Yield (mean, std, whether images are RGB) for every place where a config of mmdetection 3 or 2 gives them."""
    model = config.get('model')
    preprocessor = model.get('data_preprocessor') if isinstance(model, dict) else None
    places: List[Tuple[Any, str, bool]] = [  # a dict, its key that says whether images are RGB, the default of that key
        (preprocessor or config.get('data_preprocessor'), 'bgr_to_rgb', False),
        (config.get('img_norm_cfg'), 'to_rgb', True),
    ]
    places += [(step, 'to_rgb', True) for step in find_dicts(config, 'Normalize')]
    for place, order, default in places:
        if isinstance(place, dict) and place.get('mean') is not None and place.get('std') is not None:
            mean, std = numbers(place['mean'], low=0), numbers(place['std'], low=1e-9)
            if mean is None or std is None:
                raise ValueError('Expected mean and std of images as numbers in the config of the checkpoint, got '
                                 f'{shown(place["mean"])} and {shown(place["std"])}.')
            rgb = place.get(order, default)
            if not isinstance(rgb, bool):
                raise ValueError(
                    f'Expected True or False for {order} in the config of the checkpoint, got {shown(rgb)}.')
            yield mean, std, rgb


def _one_if_square(size: Tuple[int, int]) -> Any:
    return size[0] if size[0] == size[1] else list(size)


def _first(read: Any, place: Mapping[str, Any], *names: str) -> Any:
    found = (read(place.get(name)) for name in names)
    return next((x for x in found if x), None)


def _colours(value: Any) -> Optional[List[Any]]:
    return list(value) if isinstance(value, (list, tuple)) else None
