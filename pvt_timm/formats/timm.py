""" The format of this package: timm's names, in folders that timm loads with 'local-dir:' and 'hf-hub:'. """
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

from .format import Format, Said, tuple_of
from .names import Row, StateDict
from .values import image_size, problem_type, read_preprocessing, shown
from .writing import write_json, write_tensors

if TYPE_CHECKING:
    from ..weights import Weights

__all__ = ['CLASS_ROW', 'CLASS_ROW_FILE', 'FORMATS']

# The original's dense checkpoints keep a row for the class token in the last position embedding. No timm model uses
# that row, so it is kept in a separate file with this name.
CLASS_ROW_FILE = 'class_row.safetensors'
CLASS_ROW = 'pos_embed4.class_row'
POS_EMBED = 'stages.3.pos_embed'

_NAMES = (
    'stages.{i}.pos_embed',
    'stages.{i}.cls_token',
    'stages.{i}.patch_embed.proj.{p}',
    'stages.{i}.patch_embed.norm.{p}',
    'stages.{i}.blocks.{j}.{layer}.{p}',
    'norm.{p}',
    'head.{p}',
)


class TimmFormat(Format):
    name = 'timm'
    table = tuple(Row(name, name) for name in _NAMES)
    first_weight = ('stages.0.patch_embed.proj.weight',)
    start = re.compile(r'(?:stages|norm\d*|head\.(?:weight|bias))\b')
    is_target = True
    library = 'timm'

    def read_config(self, config: Mapping[str, Any]) -> Optional[Said]:
        if not {'architecture', 'pretrained_cfg', 'model_args'} & set(config):
            return None
        from ..labels import labels_in

        said = Said('config.json')
        said.architecture = _text(config, 'architecture')
        said.model_args = {name: tuple_of(value) for name, value in _inner(config, 'model_args').items()}
        for name in ('global_pool', 'num_classes'):
            if config.get(name) is not None:
                said.model_args.setdefault(name, config[name])
        said.problem_type = problem_type(_text(config, 'problem_type'))
        if config.get('problem_type') and said.problem_type is None:
            said.notes.append(f'left out the problem_type that config.json says: {shown(config["problem_type"])}')

        pretrained_cfg = _inner(config, 'pretrained_cfg')
        said.tag = _text(pretrained_cfg, 'tag')
        read_preprocessing(said, pretrained_cfg)
        if pretrained_cfg.get('input_size') is not None:
            said.img_size = image_size(pretrained_cfg['input_size'])
            if said.img_size is None:
                said.notes.append(
                    f'left out the input_size that config.json says: {shown(pretrained_cfg["input_size"])}')
        for name in ('license', 'origin_url'):
            value = pretrained_cfg.get(name)
            setattr(said, name, value if isinstance(value, str) else None)
        try:
            said.label_names = labels_in(dict(config))
        except ValueError as e:
            said.notes.append(f'left out the label names in config.json: {e}')
        return said

    def check_parts(self, weights: 'Weights', drop: Sequence[str]) -> List[str]:
        return []  # everything has a place

    def write(self, folder: Path, weights: 'Weights', tensors: StateDict) -> None:
        """Write model.safetensors and config.json as in timm's hub repositories, and what timm has no place for."""
        write_tensors(tensors, folder / 'model.safetensors')
        if weights.has_bare_row:
            write_tensors({CLASS_ROW: weights.state_dict[POS_EMBED][:, :1]}, folder / CLASS_ROW_FILE)
        info, args = weights.info, weights.model_args
        output_fmt = args.get('output_fmt', 'NLC' if info.class_token else 'NCHW')
        has_class_token = info.class_token and output_fmt == 'NLC'  # in its output
        cfg: Dict[str, Any] = {
            **weights.preprocessing,
            **weights.origin,
            'num_classes': info.num_classes,
            'min_input_size': [info.in_chans, 32, 32],
            # size of the last feature map. A model with class token returns tokens instead.
            'pool_size': None if has_class_token else [n // 32 for n in weights.preprocessing['input_size'][1:]],
            'first_conv': 'stages.0.patch_embed.proj',
            'classifier': 'head',
        }
        content: Dict[str, Any] = {
            'architecture': weights.variant,
            'num_classes': info.num_classes,
            'num_features': info.embed_dims[-1],
            'global_pool': args.get('global_pool', 'token' if has_class_token else 'avg'),
            'model_args': args,
        }
        if weights.label_names:
            content['label_names'] = weights.label_names
        if weights.problem_type:
            content['problem_type'] = weights.problem_type
        write_json({**content, 'pretrained_cfg': cfg}, folder / 'config.json')

    def how_to_load(self, weights: 'Weights') -> str:
        return (
            "`timm.create_model('local-dir:FOLDER', pretrained=True)` after `import pvt_timm`, also with "
            '`features_only=True`, or `hf-hub:OWNER/REPO` in place of the folder.')


class TimmFeaturesFormat(TimmFormat):
    """Names of `features_only=True` models, which flatten the stages. It is read only."""
    name = 'timm_features'
    table = tuple(Row(name, name.replace('stages.', 'stages_')) for name in _NAMES)
    first_weight = ('stages_0.patch_embed.proj.weight',)
    start = re.compile(r'(?:stages_\d+|norm\d*|head\.(?:weight|bias))\b')
    is_target = False


FORMATS = [TimmFormat(), TimmFeaturesFormat()]


def _text(config: Mapping[str, Any], name: str) -> Optional[str]:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'Expected a text for {name} in config.json, got {shown(value)}.')
    return value


def _inner(config: Mapping[str, Any], name: str) -> Dict[str, Any]:
    """Return an object inside of a config, without its entries that are null."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'Expected an object for {name} in config.json, got {shown(value)}.')
    return {key: x for key, x in (value or {}).items() if x is not None}
