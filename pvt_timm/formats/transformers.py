""" The format of Hugging Face transformers: `PvtForImageClassification`, `PvtModel` and their configs. """
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .format import Format, NoReferenceError, Reference, Said, layer_norms
from .names import Row, StateDict
from .values import number, numbers, problem_type, shown, truth
from .writing import write_json, write_tensors

if TYPE_CHECKING:
    from ..weights import Weights

__all__ = ['FORMATS']

# transformers' names of activations and timm's
_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'relu': 'relu',
    'relu6': 'relu6',
    'leaky_relu': 'leaky_relu',
    'silu': 'silu',
    'swish': 'swish',
    'mish': 'mish',
    'sigmoid': 'sigmoid',
    'tanh': 'tanh',
}
# Pillow's numbers of interpolations and timm's names
_RESAMPLES = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}

_USUAL_CROP_PCTS = (1., 0.95, 0.9, 0.875)

# config.json: name there, name of the argument in timm
_LISTS_OF_INTEGERS = {
    'depths': 'depths',
    'hidden_sizes': 'embed_dims',
    'num_attention_heads': 'num_heads',
    'sequence_reduction_ratios': 'sr_ratios',
}
_RATES = {
    'hidden_dropout_prob': ('pos_drop_rate', 'proj_drop_rate'),
    'attention_probs_dropout_prob': ('attn_drop_rate',),
    'drop_path_rate': ('drop_path_rate',),
}
_KNOWN = {
    *_LISTS_OF_INTEGERS, *_RATES, 'hidden_act', 'id2label', 'image_size', 'layer_norm_eps', 'mlp_ratios',
    'num_channels', 'patch_sizes', 'qkv_bias', 'strides'}


class TransformersFormat(Format):
    name = 'transformers'
    table = (
        #   timm                                    transformers
        Row('stages.{i}.pos_embed',                 'pvt.encoder.patch_embeddings.{i}.position_embeddings'),
        Row('stages.3.cls_token',                   'pvt.encoder.patch_embeddings.3.cls_token'),
        Row('stages.{i}.patch_embed.proj.{p}',      'pvt.encoder.patch_embeddings.{i}.projection.{p}'),
        Row('stages.{i}.patch_embed.norm.{p}',      'pvt.encoder.patch_embeddings.{i}.layer_norm.{p}'),
        Row('stages.{i}.blocks.{j}.norm1.{p}',      'pvt.encoder.block.{i}.{j}.layer_norm_1.{p}'),
        Row('stages.{i}.blocks.{j}.attn.q.{p}',     'pvt.encoder.block.{i}.{j}.attention.self.query.{p}'),
        Row('stages.{i}.blocks.{j}.attn.kv.{p}',   ('pvt.encoder.block.{i}.{j}.attention.self.key.{p}',
                                                    'pvt.encoder.block.{i}.{j}.attention.self.value.{p}'),
            our_pieces=(2,)),
        Row('stages.{i}.blocks.{j}.attn.sr.{p}',    'pvt.encoder.block.{i}.{j}.attention.self.sequence_reduction.{p}'),
        Row('stages.{i}.blocks.{j}.attn.norm.{p}',  'pvt.encoder.block.{i}.{j}.attention.self.layer_norm.{p}'),
        Row('stages.{i}.blocks.{j}.attn.proj.{p}',  'pvt.encoder.block.{i}.{j}.attention.output.dense.{p}'),
        Row('stages.{i}.blocks.{j}.norm2.{p}',      'pvt.encoder.block.{i}.{j}.layer_norm_2.{p}'),
        Row('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'pvt.encoder.block.{i}.{j}.mlp.dense1.{p}'),
        Row('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'pvt.encoder.block.{i}.{j}.mlp.dense2.{p}'),
        Row('norm.{p}',                             'pvt.encoder.layer_norm.{p}'),
        Row('head.{p}',                             'classifier.{p}'),
    )
    # a checkpoint of `PvtModel` without a head has no 'pvt.' before its names
    first_weight = (
        'pvt.encoder.patch_embeddings.0.projection.weight', 'encoder.patch_embeddings.0.projection.weight')
    start = re.compile(r'(?:pvt|encoder|classifier\.(?:weight|bias))\b')
    prefers_square = True  # its `image_size` is one number
    is_target = True
    library = 'transformers'

    def full_names(self, tensors: Dict[str, Any]) -> Dict[str, Any]:
        if self.first_weight[1] not in tensors:
            return tensors
        full: Dict[str, Any] = {}
        for key, value in tensors.items():
            name = f'pvt.{key}' if key.startswith('encoder.') else key
            if name in full:
                raise ValueError(f"Expected every weight once, got {shown(key)} with and without 'pvt.' before it.")
            full[name] = value
        return full

    def read_config(self, config: Mapping[str, Any]) -> Optional[Said]:
        model_type = config.get('model_type')
        if model_type is None and not _KNOWN & set(config):
            return None
        if model_type not in (None, 'pvt'):
            raise ValueError(f"Expected model_type 'pvt', config.json says {shown(model_type)}.")
        from ..labels import labels_in

        said = Said('config.json')
        args = said.model_args
        for theirs, ours in _LISTS_OF_INTEGERS.items():
            if config.get(theirs) is not None:
                args[ours] = _integers(config, theirs)
        if config.get('mlp_ratios') is not None:
            args['mlp_ratios'] = tuple(float(x) for x in _integers(config, 'mlp_ratios'))
        if config.get('num_channels') is not None:
            args['in_chans'] = _integers(config, 'num_channels')[0]
        if config.get('image_size') is not None:
            sides = _integers(config, 'image_size')
            args['img_size'] = said.img_size = (sides[0], sides[-1])
        if config.get('patch_sizes') is not None:
            args['patch_size'] = _patch_size(config)
        if config.get('hidden_act') is not None:
            args['act_layer'] = _ACTIVATIONS.get(str(config['hidden_act']))
            if args['act_layer'] is None:
                raise ValueError(f'Expected hidden_act in {tuple(_ACTIVATIONS)}, config.json says '
                                 f'{shown(config["hidden_act"])}.')
        if config.get('qkv_bias') is not None:
            args['qkv_bias'] = truth(config['qkv_bias'])
            if args['qkv_bias'] is None:
                raise ValueError(f'Expected true or false for qkv_bias, config.json says {shown(config["qkv_bias"])}.')
        if config.get('layer_norm_eps') is not None:
            eps = _number(config, 'layer_norm_eps')
            # transformers has one eps, the original code has two (1e-6, and 1e-5 in some norms). With 1e-6, the weights
            # are taken for weights of the original code, and get its two values.
            if eps != 1e-6:
                args['norm_eps'] = args['embed_norm_eps'] = eps
        for theirs, ours_names in _RATES.items():
            if config.get(theirs) is not None:
                rate = _number(config, theirs)
                args.update(dict.fromkeys(ours_names, rate) if rate else {})
        said.problem_type = problem_type(config.get('problem_type'))
        if config.get('problem_type') is not None and said.problem_type is None:
            said.notes.append(f'left out the problem_type that config.json says: {shown(config["problem_type"])}')
        try:
            said.label_names = labels_in(dict(config))
        except ValueError as e:
            said.notes.append(f'left out the label names in config.json: {e}')
        return said

    def read_processor(self, config: Mapping[str, Any]) -> Optional[Said]:
        """Return what preprocessor_config.json says about images.

        Supported are images that are resized to a fixed size, and images whose shorter side is resized before a crop.
        """
        if not config:
            return None
        said = Said('preprocessor_config.json')
        if config.get('do_rescale') is False or config.get('do_resize') is False:
            raise ValueError('Expected images that are resized and scaled, preprocessor_config.json says do_rescale or '
                             'do_resize: false.')
        factor = config.get('rescale_factor', 1 / 255)
        if number(factor) is None or abs(factor * 255 - 1) > 1e-3:
            raise ValueError(f'Expected rescale_factor 1/255, preprocessor_config.json says {shown(factor)}.')
        for theirs, ours in (('image_mean', 'mean'), ('image_std', 'std')):
            if config.get(theirs) is not None:
                found = numbers(config[theirs], low=0 if ours == 'mean' else 1e-9)
                if found is None:
                    said.notes.append(f'left out the {theirs} that preprocessor_config.json says: '
                                      f'{shown(config[theirs])}')
                setattr(said, ours, found)
        if config.get('do_normalize') is False:
            said.mean, said.std = (0.,), (1.,)
        if config.get('resample') is not None:
            resample = config['resample']
            is_number = isinstance(resample, int) and not isinstance(resample, bool)
            said.interpolation = _RESAMPLES.get(resample) if is_number else None
            if said.interpolation is None:
                said.notes.append(f'left out the resample that preprocessor_config.json says: {shown(resample)}')
        if config.get('size') is not None:
            _read_size(said, config)
        return said

    def check_parts(self, weights: 'Weights', drop: Sequence[str]) -> List[str]:
        keep = [part for part in weights.parts if part not in drop]
        if not {'class_token', 'norm'} <= set(keep):
            raise ValueError('The transformers format needs a class token and a final norm, nothing is made up.')
        pool = weights.args.get('global_pool', 'token')
        if pool != 'token' and 'head' in keep:
            raise ValueError(f'The head takes global_pool={pool!r}, transformers always the class token: --drop head.')
        # patch_size is not in the list: transformers sizes its position embeddings for patches of 4 pixels
        weights.refuse_args(self.name, but=(
            'img_size', 'in_chans', 'num_heads', 'sr_ratios', 'mlp_ratios', 'qkv_bias', 'global_pool', 'act_layer',
            'norm_eps', 'embed_norm_eps'))
        if any(ratio != int(ratio) for ratio in weights.info.mlp_ratios):
            raise ValueError(f'The transformers format has whole numbers as mlp_ratios, not {weights.info.mlp_ratios}.')
        eps = weights.args.get('norm_eps', 1e-6)
        if weights.embed_norm_eps != eps and (eps, weights.embed_norm_eps) != (1e-6, 1e-5):  # the original's two
            raise ValueError(
                f'The transformers format has one layer_norm_eps, this model has norm_eps={eps:g} and '
                f'embed_norm_eps={weights.embed_norm_eps:g}.')
        if weights.args.get('act_layer', 'gelu') not in _ACTIVATIONS.values():
            raise ValueError(f'The transformers format has no place for act_layer={shown(weights.args["act_layer"])}.')
        if weights.preprocessing['crop_mode'] == 'border':
            return ["transformers has no processor for crop_mode 'border', the one that is written resizes the shorter "
                    'side and crops']
        return []

    def required_size(self, weights: 'Weights') -> Optional[Tuple[int, int]]:
        """Return the image size of training if the position embeddings are for another size, otherwise None.

        The models of transformers accept only images of the size that their position embeddings are for.
        """
        trained = weights.preprocessing['input_size'][1:]
        patch_size = weights.info.patch_size
        stored = weights.info.grid_size
        return None if (trained[0] // patch_size, trained[1] // patch_size) == stored else trained

    def check_size(self, img_size: Tuple[int, int]) -> None:
        if img_size[0] != img_size[1]:
            raise ValueError(f'The transformers format holds square images only, got {img_size}: say --img-size N.')

    def write(self, folder: Path, weights: 'Weights', tensors: StateDict) -> None:
        """Write what `PvtForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained` read."""
        write_tensors(tensors, folder / 'model.safetensors')
        write_json(_config(weights), folder / 'config.json')
        write_json(_processor(weights.preprocessing), folder / 'preprocessor_config.json')

    def reference(self, weights: 'Weights') -> Reference:
        try:
            from transformers import PvtConfig, PvtForImageClassification, __version__
        except ImportError as e:
            raise NoReferenceError('--verify needs transformers here: pip install transformers.') from e
        if weights.info.grid_size[0] != weights.info.grid_size[1]:
            raise NoReferenceError('--verify: transformers has models for square images only.')
        try:
            self.check_parts(weights, drop=['head'] if weights.args.get('global_pool', 'token') != 'token' else [])
        except ValueError as e:
            raise NoReferenceError(f'--verify: transformers has no such model. {e}') from e
        config = {key: value for key, value in _config(weights).items() if 'dtype' not in key}
        model: Any = PvtForImageClassification(PvtConfig(**config))
        return Reference(
            name=f'transformers {__version__}',
            format=self.name,
            model=model,
            blocks=[blocks[-1] for blocks in model.pvt.encoder.block],
            # not the final norm, whose name is only 'layer_norm'
            norms=layer_norms(model.pvt.encoder, '.layer_norm'),
        )

    def how_to_load(self, weights: 'Weights') -> str:
        return "`PvtForImageClassification.from_pretrained('FOLDER')`."


FORMATS = [TransformersFormat()]


# ---- config.json -----------------------------------------------------------------------------------------------------

def _integers(config: Mapping[str, Any], name: str) -> Tuple[int, ...]:
    found = numbers(config[name], low=1, high=2 ** 16)
    if found is None or any(x != int(x) for x in found):
        raise ValueError(f'Expected whole numbers from 1 for {name}, config.json says {shown(config[name])}.')
    return tuple(int(x) for x in found)


def _number(config: Mapping[str, Any], name: str) -> float:
    found = number(config[name], low=0, high=1)
    if found is None:
        raise ValueError(f'Expected a number from 0 to 1 for {name}, config.json says {shown(config[name])}.')
    return found


def _patch_size(config: Mapping[str, Any]) -> int:
    """Return the patch size of the first stage. In other stages it has to be 2, and patches may not overlap."""
    sizes = _integers(config, 'patch_sizes')
    strides = _integers(config, 'strides') if config.get('strides') is not None else sizes
    if strides != sizes or any(size != 2 for size in sizes[1:]):
        raise ValueError(f'Expected patch_sizes [N, 2, 2, 2] and the same strides, config.json says {list(sizes)} and '
                         f'{list(strides)}.')
    return sizes[0]


def _config(weights: 'Weights') -> Dict[str, Any]:
    """Return the config.json for transformers' PvtForImageClassification."""
    info, args = weights.info, weights.args
    labels = weights.label_names or [f'LABEL_{i}' for i in range(info.num_classes)]
    dtype = str(info.dtype).removeprefix('torch.')
    # Two names of transformers may mean the same name of timm. The first of them is written.
    activations = {timm: theirs for theirs, timm in reversed(_ACTIVATIONS.items())}
    config = {
        'architectures': ['PvtForImageClassification'],
        'model_type': 'pvt',
        'image_size': info.img_size[0],
        'num_channels': info.in_chans,
        'patch_sizes': [info.patch_size, 2, 2, 2],
        'strides': [info.patch_size, 2, 2, 2],
        'depths': info.depths,
        'hidden_sizes': info.embed_dims,
        'num_attention_heads': weights.num_heads,
        'sequence_reduction_ratios': info.sr_ratios,
        'mlp_ratios': [int(ratio) if ratio == int(ratio) else ratio for ratio in info.mlp_ratios],
        'hidden_act': activations[args.get('act_layer', 'gelu')],
        'layer_norm_eps': args.get('norm_eps', 1e-6),
        'qkv_bias': info.qkv_bias,
        'num_labels': info.num_classes,
        'id2label': dict(enumerate(labels)),
        'label2id': {name: i for i, name in enumerate(labels)},
        'dtype': dtype,
        'torch_dtype': dtype,
    }
    for theirs, ours in _RATES.items():
        rates = {args.get(name, 0.) for name in ours}
        if rates != {0.}:
            config[theirs] = max(rates)
    if weights.problem_type:
        config['problem_type'] = weights.problem_type
    return config


# ---- preprocessor_config.json ----------------------------------------------------------------------------------------

def _read_size(said: Said, config: Mapping[str, Any]) -> None:
    """Read the image size, crop_pct and crop_mode from `size` and `crop_size`, and put them into `said`.

    If `size` gives the shorter side only and there is no crop, the image size stays unknown.
    """
    size = _sides(config['size'])
    crop = _sides(config.get('crop_size')) if config.get('do_center_crop') else None
    if size is None or config.get('do_center_crop') and crop is None or crop is None and len(size) == 1:
        said.notes.append('left out the size that preprocessor_config.json says: '
                          f'{shown(config["size"])} {shown(config.get("crop_size"))}')
        return
    if crop is None:
        said.img_size, said.crop_pct, said.crop_mode = (size[0], size[-1]), 1., 'squash'
        return
    said.img_size = (crop[0], crop[-1])
    crop_pct = _crop_pct(min(said.img_size), min(size))
    if crop_pct is None:
        said.notes.append('left out the crop of preprocessor_config.json, which is larger than the image')
        return
    said.crop_pct, said.crop_mode = crop_pct, 'center' if len(size) == 1 else 'squash'


def _sides(value: Any) -> Optional[Tuple[int, ...]]:
    """Return (shorter side,) or (height, width). A single number is the side of a square."""
    if isinstance(value, Mapping):
        names = ('shortest_edge',) if 'shortest_edge' in value else ('height', 'width')
        found = numbers([value.get(name) for name in names], low=1, high=2 ** 16)
    else:
        found = numbers([value, value], low=1, high=2 ** 16)
    return tuple(int(x) for x in found) if found else None


def _crop_pct(crop: int, resized: int) -> Optional[float]:
    """Return a short fraction for which floor(crop / fraction) is `resized`, the size before a crop in timm."""
    if crop > resized:
        return None
    short = [math.floor(crop / resized * 10 ** decimals) / 10 ** decimals for decimals in range(1, 8)]
    for fraction in (*_USUAL_CROP_PCTS, *short):
        if fraction > 0 and math.floor(crop / fraction) == resized:
            return fraction
    return crop / (resized + 0.5)


def _processor(preprocessing: Dict[str, Any]) -> Dict[str, Any]:
    """Return the preprocessor_config.json of a processor that resizes and crops as timm does."""
    height, width = preprocessing['input_size'][1:]
    crop_pct = preprocessing['crop_pct']
    resized_height, resized_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    squash = preprocessing['crop_mode'] == 'squash'
    content: Dict[str, Any] = {'image_processor_type': 'PvtImageProcessor', 'size': {'height': height, 'width': width}}
    if not squash:  # the shorter side is resized, the rest is cut away
        content['image_processor_type'] = 'BitImageProcessor'
        content['size'] = {'shortest_edge': min(resized_height, resized_width)}
    elif crop_pct < 1:
        content['image_processor_type'] = 'DeiTImageProcessor'
        content['size'] = {'height': resized_height, 'width': resized_width}
    if not squash or crop_pct < 1:
        content.update({'do_center_crop': True, 'crop_size': {'height': height, 'width': width}})
    resamples = {name: number for number, name in _RESAMPLES.items()}
    content.update({
        'do_resize': True,
        'do_rescale': True,
        'do_normalize': True,
        'resample': resamples[preprocessing['interpolation']],
        'image_mean': preprocessing['mean'],
        'image_std': preprocessing['std'],
    })
    return content
