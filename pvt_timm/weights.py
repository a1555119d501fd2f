""" Find and read a checkpoint and the files beside it, and describe it.

`read_weights` returns one description, `Weights`. All other code uses this description.
"""
import contextlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import get_pretrained_cfg

from ._input import RECORDS_INPUT
from .files import MAX_BYTES, PathLike, read_checkpoint
from .formats import FORMATS
from .formats.architecture import Architecture, check_keys, describe, drop_parts
from .formats.format import Format, Said
from .formats.mapping import Converted, map_to_timm
from .formats.names import StateDict, some_names
from .formats.timm import CLASS_ROW, POS_EMBED
from .formats.values import image_size, number, numbers, shown, text, truth, whole_number, whole_numbers
from .formats.wrappers import training_settings
from .labels import LABELS_FILE, labels_beside, read_labels
from .pvt import TAG_ARGS, PyramidVisionTransformer
from .sources import Source, open_source
from .variants import VARIANTS, find_variant

__all__ = ['PARTS', 'Size', 'Weights', 'check_size', 'create_from_checkpoint', 'read_weights']

Size = Union[int, Sequence[int], None]

PARTS = ('class_token', 'norm', 'head')
MIN_SIZE, MAX_SIZE = 32, 2048
PREPROCESSING = ('img_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')

# Arguments of the model that a checkpoint or config may give: the expected value, in words, and the function that reads
# it. The arguments in this table can also be read from the shapes of the weights, and both have to agree.
_TOLD_BY_THE_WEIGHTS: Dict[str, Tuple[str, Callable[[Any], Any]]] = {
    'num_classes': ('a whole number', lambda x: whole_number(x, low=0)),
    'img_size': ('one or two numbers of pixels', image_size),
    'patch_size': ('a whole number', whole_number),
    'in_chans': ('a whole number', whole_number),
    'class_token': ('true or false', truth),
    'embed_dims': ('whole numbers', whole_numbers),
    'depths': ('whole numbers', whole_numbers),
    'sr_ratios': ('whole numbers', whole_numbers),
    'qkv_bias': ('true or false', truth),
}
_ONLY_SAID: Dict[str, Tuple[str, Callable[[Any], Any]]] = {
    'global_pool': ('a text', text),
    'output_fmt': ("'NLC' or 'NCHW'", lambda x: x if x in ('NLC', 'NCHW') else None),
    'num_heads': ('whole numbers', whole_numbers),
    'mlp_ratios': ('numbers', lambda x: numbers(x, low=0.1, high=64)),
    'act_layer': ('the name of an activation', text),
    'norm_layer': ('the name of a norm', text),
    'norm_eps': ('a number from 0 to 1', lambda x: number(x, low=0, high=1)),
    'embed_norm_eps': ('a number from 0 to 1', lambda x: number(x, low=0, high=1)),
    **dict.fromkeys(
        ('drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'),
        ('a number from 0 to 1', lambda x: number(x, low=0, high=1))),
}
_DROP_RATES = tuple(name for name in _ONLY_SAID if name.endswith('_rate'))
# Arguments of `timm.create_model` that are ignored: they have no effect on loaded weights, or follow from the names of
# the weights
_WITHOUT_EFFECT = ('weight_init', 'features_only', 'out_indices', 'feature_cls', 'final_norm')


@dataclass
class Weights:
    """A checkpoint under timm's names, and all that is known about it."""
    source: Source
    converted: Converted  # how its names were mapped
    state_dict: StateDict  # with the class row in the last position embedding, if the source has one
    info: Architecture
    variant: str  # name of the timm model
    args: Dict[str, Any]  # arguments of the model that are not in the weights, but in a config or training settings
    preprocessing: Dict[str, Any]  # input_size, mean, std, crop_pct, crop_mode and interpolation, in timm's words
    label_names: List[str] = field(default_factory=list)  # of the classes, empty if not known
    problem_type: Optional[str] = None  # transformers': 'multi_label_classification' and so on
    origin: Dict[str, str] = field(default_factory=dict)  # license and origin_url, as far as they are known
    notes: List[str] = field(default_factory=list)  # what is unusual about it

    @property
    def parts(self) -> List[str]:
        """The members of `PARTS` that these weights have."""
        has = (self.info.class_token, self.info.norm, self.info.num_classes)
        return [part for part, there in zip(PARTS, has) if there]

    @property
    def has_bare_row(self) -> bool:
        """Whether there is a class row but no class token, as in the original's dense checkpoints.

        The class row is the row of the last position embedding that belongs to the class token.
        """
        return self.info.class_row and not self.info.class_token

    @property
    def num_heads(self) -> Tuple[int, ...]:
        return self.args.get('num_heads', VARIANTS[self.variant]['num_heads'])

    @property
    def embed_norm_eps(self) -> float:
        return self.args.get('embed_norm_eps', 1e-5)

    @property
    def multi_label(self) -> bool:
        """Whether each class has an independent probability (sigmoid instead of softmax)."""
        return self.problem_type == 'multi_label_classification' or self.info.num_classes == 1

    @property
    def model_args(self) -> Dict[str, Any]:
        """Arguments for `timm.create_model` that differ from the defaults of the variant, except num_classes."""
        info = self.info
        height, width = info.img_size
        args: Dict[str, Any] = {
            'img_size': height if height == width else [height, width],
            'patch_size': info.patch_size,
            'in_chans': info.in_chans,
            'class_token': info.class_token,
            'final_norm': info.norm,
            'output_fmt': 'NLC' if info.norm else 'NCHW',
            'sr_ratios': info.sr_ratios,
            'mlp_ratios': info.mlp_ratios,
            'qkv_bias': info.qkv_bias,
            **self.args,
        }
        defaults = {
            **_MODEL_DEFAULTS,
            # what None stands for
            'final_norm': info.class_token,
            'output_fmt': 'NLC' if info.class_token else 'NCHW',
            'global_pool': 'token' if info.class_token and args['output_fmt'] == 'NLC' else 'avg',
            **VARIANTS[self.variant],
        }
        if info.class_token != info.norm:
            del defaults['output_fmt']  # always given: without it, this class takes it from the norm
        return {name: value for name, value in args.items() if value != defaults.get(name)}

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        """The fields of timm's `pretrained_cfg` that these weights determine."""
        return {
            **self.preprocessing,
            **self.origin,
            'num_classes': self.info.num_classes,
            **({'label_names': tuple(self.label_names)} if self.label_names else {}),
        }

    def dtype_name(self) -> str:
        return ', '.join(dict.fromkeys(str(v.dtype).removeprefix('torch.') for v in self.state_dict.values()))

    def for_model(self) -> StateDict:
        """Return the state dict without a class row that has no class token. No timm model can load such a row."""
        return drop_parts(self.state_dict, ['class_token'] if self.has_bare_row else [])

    def create_model(self, pretrained: bool = True, **kwargs: Any) -> Any:
        """Return the timm model with these weights.

        Args:
            pretrained: Whether the weights are loaded. If not, the model has random weights.
            kwargs: More arguments for `timm.create_model`, such as `features_only=True`, another `num_classes` or
                `in_chans`, or `drop_path_rate`. They replace `model_args`.
        """
        args: Dict[str, Any] = {**self.model_args, 'num_classes': self.info.num_classes}
        without_token = kwargs.get('class_token') is False and self.info.class_token
        if kwargs.get('features_only') or without_token:
            args['num_classes'] = 0  # the head was trained on the class token. Without the token it is left out.
            for name in ('global_pool', 'final_norm', 'output_fmt'):
                args.pop(name, None)
        # The other fields are those of the variant's default tag, except those that are true only of that tag's weights
        overlay = {**dict.fromkeys(_CLAIMS), **self.pretrained_cfg}
        default: Any = get_pretrained_cfg(self.variant)
        if self.info.num_classes != default.num_classes:
            overlay.setdefault('label_names', None)
        if kwargs.get('num_classes', self.info.num_classes) != self.info.num_classes:
            overlay['label_names'] = None  # the model gets other classes than the weights
        if not pretrained:
            return timm.create_model(self.variant, pretrained_cfg_overlay=overlay, **{**args, **kwargs})
        if RECORDS_INPUT:  # older versions of timm have no such argument
            kwargs['pretrained_model_args'] = {'img_size': self.info.img_size}
        model = timm.create_model(
            self.variant,
            pretrained=True,
            pretrained_cfg_overlay={**overlay, 'state_dict': self.state_dict},
            **{**args, **kwargs},
        )
        for module in model.modules():  # timm would keep the weights a second time
            getattr(module, 'pretrained_cfg', {}).pop('state_dict', None)
        return model

    def refuse_args(self, fmt: str, but: Sequence[str]) -> None:
        """Refuse arguments that change what the model computes, if a format cannot store them.

        Args:
            fmt: Name of the format, for the message.
            but: Names of arguments that this format stores, or that can be read from its weights.
        """
        fine = (*but, *_DROP_RATES, 'class_token', 'final_norm', 'output_fmt', 'in_chans')
        wrong = [f'{name}={shown(value)}' for name, value in self.model_args.items() if name not in fine]
        if wrong:
            raise ValueError(
                f'The {fmt} format has no place for {", ".join(wrong)}, its code would compute something else.')


_MODEL_DEFAULTS = {
    **{name: parameter.default for name, parameter in inspect.signature(PyramidVisionTransformer).parameters.items()},
    'act_layer': 'gelu',  # what None stands for there
    'norm_eps': 1e-6,
}
# Fields of timm's `PretrainedCfg` that are true of the published weights of a tag only
_CLAIMS = (
    'url', 'file', 'hf_hub_id', 'tag', 'license', 'origin_url', 'paper_ids', 'paper_name')


def create_from_checkpoint(
        source: PathLike,
        *,
        model: Optional[str] = None,
        prefix: Optional[str] = None,
        use_ema: bool = True,
        source_size: Size = None,
        **kwargs: Any,
) -> Any:
    """Return a timm model with the weights of any PVT v1 checkpoint, built as its training settings and config say.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]', in any supported format.
        model: Name of a timm model, such as 'pvt_small'. Weights of another model are refused.
        prefix: The part before the names of the weights, such as 'encoder.model.', if the file holds several PVTs.
        use_ema: Whether averaged weights are used if the file holds averaged and plain weights, as in timm.
        source_size: Image size (or height and width) that the position embeddings are for, if it is not known
            otherwise.
        kwargs: More arguments for `timm.create_model`, such as `features_only=True` or `num_classes=5` (a new head).

    Raises:
        ValueError: The source is no PVT v1 checkpoint, is damaged or refused, or does not fit the arguments.
        OSError: A file cannot be read.
    """
    with read_weights(source, model=model, prefix=prefix, use_ema=use_ema, source_size=source_size) as weights:
        return weights.create_model(**kwargs)


@contextlib.contextmanager
def read_weights(
        spec: PathLike,
        *,
        model: Optional[str] = None,
        use_ema: bool = True,
        prefix: Optional[str] = None,
        source_size: Size = None,
        img_size: Optional[Tuple[int, int]] = None,
        labels: Optional[PathLike] = None,
        sha256: Optional[str] = None,
        max_bytes: int = MAX_BYTES,
) -> Iterator[Weights]:
    """Read a checkpoint in any supported format, its training settings, and the files beside it.

    Args:
        spec: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        model: Name of a timm model. Weights of another model are refused.
        use_ema: Whether averaged weights are used if the file holds averaged and plain weights, as in timm.
        prefix: The part before the names of the weights, if the file holds several PVTs.
        source_size: Image size that the position embeddings are for, if it is not known otherwise.
        img_size: A height and width to try for the position embeddings, if no config gives them.
        labels: File with the names of the classes, instead of those that come with the checkpoint.
        sha256: Hash (or its first 8 or more digits) that the file must have.
        max_bytes: Largest size of a file. Larger files are refused.

    Raises:
        ValueError: The source is not a PVT v1 checkpoint, is damaged or refused, or two places contradict each other.
        OSError: A file cannot be read.
        Exception: Errors of the hub's client, if a download fails.
    """
    told_size = check_size(source_size, 'source_size')
    if model is not None and model not in VARIANTS:
        raise ValueError(f'Expected a model in {tuple(VARIANTS)}, got {model!r}.')
    with open_source(spec, max_bytes) as source:
        if sha256 is not None and len(sha256) < 8:
            raise ValueError(f'Expected 8 digits or more as sha256, got {ascii(sha256)}.')
        if sha256 is not None and not source.sha256.startswith(sha256.lower()):
            raise ValueError(
                f'Expected a file with sha256 {ascii(sha256)}, got {source.sha256}: another one, or damaged.')
        checkpoint = read_checkpoint(source.file, max_bytes)
        converted = map_to_timm(checkpoint, use_ema, prefix)
        said = _what_is_said(source, checkpoint, FORMATS[converted.format])
        del checkpoint

        notes = [*_odd(converted), *(note for place in said for note in place.notes)]
        if source.config_beside:
            notes.append('the config.json beside the file was not read: give the folder, if they belong together')
        state_dict, info = _describe(source, converted, told_size, img_size, said)
        variant = _find_variant(info, source, model, said)
        account = _merge([*said, _from_weights(info, FORMATS[converted.format].model_args)])
        if account.model_args.get('global_pool') == 'token' and not info.class_token:
            raise ValueError("Expected weights with a class token, as global_pool 'token' is said to go with them.")
        weights = Weights(
            source=source,
            converted=converted,
            state_dict=state_dict,
            info=info,
            variant=variant,
            args={name: value for name, value in account.model_args.items() if name in _ONLY_SAID},
            preprocessing=_preprocessing(account, info, variant, notes),
            label_names=_labels(source, account, labels, info.num_classes, notes),
            problem_type=account.problem_type,
            origin={name: getattr(account, name)[:200] for name in ('license', 'origin_url') if getattr(account, name)},
            notes=notes,
        )
        try:
            reference = weights.create_model(pretrained=False, device='meta').state_dict()
        except Exception as e:  # timm and the model raise many kinds of errors for an argument
            raise ValueError(f'What is said about the model does not fit together: {e or type(e).__name__}') from e
        check_keys(weights.for_model(), reference)
        yield weights


def check_size(size: Size, name: str = 'img_size') -> Optional[Tuple[int, int]]:
    """Return height and width for a size of one or two numbers."""
    if size is None:
        return None
    pair = (size,) if isinstance(size, int) else tuple(size)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or not all(isinstance(n, int) and MIN_SIZE <= n <= MAX_SIZE for n in pair):
        raise ValueError(
            f'Expected {name} to be one or two numbers from {MIN_SIZE} to {MAX_SIZE}, got {" ".join(map(str, pair))}.')
    return pair


# ---- what is said about the weights ----------------------------------------------------------------------------------

def _what_is_said(source: Source, checkpoint: Mapping[str, Any], of_weights: Format) -> List[Said]:
    """Return what each place says about the weights. If two places say something, the earlier one in this order wins:

    1. The options of the user. They are not in the returned list: the code that reads an option applies it.
    2. What is published about a public file, which is recognised by its hash. This is used only if a
       preprocessor_config.json lies beside the file. Otherwise the defaults of the variant have the same values.
    3. The training settings inside of the checkpoint.
    4. The configs beside the checkpoint: config.json, then preprocessor_config.json.
    5. The weights, see `_from_weights`. They are not in the returned list either.
    6. The defaults of the variant, for all that is left.

    It is an error if two of the places 3 to 5 disagree about what the model computes, see `_merge`.
    """
    places: List[Optional[Said]] = []
    # The processor on the hub says less about the public files than their authors, for example nothing about a crop.
    known = source.known if source.processor else None
    if known:
        cfg: Any = get_pretrained_cfg(known)
        published = {name: getattr(cfg, name) for name in ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')}
        places.append(Said(
            f'what is published with {known}', overrides=True, img_size=tuple(cfg.input_size[1:]), **published))
    places.append(training_settings(checkpoint))
    places += [fmt.read_meta(checkpoint) for fmt in FORMATS.values()]
    places.append(_names_beside(source))
    if source.config:
        places.append(_read_config(source.config, of_weights))
    if source.processor and not known:
        places += [fmt.read_processor(source.processor) for fmt in FORMATS.values()]
    said = [place for place in places if place is not None]
    for place in said:
        eps = TAG_ARGS.get(place.tag, {}).get('embed_norm_eps')
        if eps is not None:  # timm builds the models of this tag with this eps, but does not write it into the config
            place.model_args.setdefault('embed_norm_eps', eps)
        place.model_args = {
            name: _as_argument(name, value, place.where)
            for name, value in place.model_args.items() if name not in _WITHOUT_EFFECT}
    return said


def _names_beside(source: Source) -> Said:
    said = Said(f'{LABELS_FILE} beside the checkpoint')
    try:
        said.label_names = labels_beside(source.file)
    except ValueError as e:
        said.notes.append(f'left out the label names beside the checkpoint: {e}')
    return said


def _read_config(config: Mapping[str, Any], of_weights: Format) -> Said:
    """Return what config.json says. The format of the weights reads it, or another format if it is of that format."""
    for fmt in (of_weights, *FORMATS.values()):
        said = fmt.read_config(config)
        if said is not None:
            return said
    names = ', '.join(shown(name) for name in list(config)[:3])
    return Said('config.json', notes=[f'config.json is of no known format, nothing was taken from it ({names})'])


def _as_argument(name: str, value: Any, where: str) -> Any:
    """Return an argument of the model in its usual type. An unknown argument is refused: it may change outputs."""
    if name not in _TOLD_BY_THE_WEIGHTS and name not in _ONLY_SAID:
        raise ValueError(f'{where} says {shown(name)[1:-1]}={shown(value)} of the model, which is not supported.')
    expected, read = {**_TOLD_BY_THE_WEIGHTS, **_ONLY_SAID}[name]
    found = read(value)
    if found is None:
        raise ValueError(f'Expected {expected} for {name}, {where} says {shown(value)}.')
    return found


def _from_weights(info: Architecture, args_of_format: Mapping[str, Any]) -> Said:
    """Return what the weights themselves say: by their shapes, and as all models of their format."""
    return Said('the weights', model_args={
        'num_classes': info.num_classes,
        'img_size': info.img_size,
        'patch_size': info.patch_size,
        'in_chans': info.in_chans,
        'class_token': info.class_token,
        'embed_dims': info.embed_dims,
        'depths': info.depths,
        'sr_ratios': info.sr_ratios,
        'qkv_bias': info.qkv_bias,
        **args_of_format,
    })


def _merge(places: Sequence[Said]) -> Said:
    """Merge what several places say. Each value is taken from the first place that has it. The others have to agree.

    Raises:
        ValueError: Two places disagree about a value that changes outputs. The message names both.
    """
    account = Said('')
    names = [name for name in vars(account) if name not in ('where', 'overrides', 'tag', 'model_args', 'notes')]
    for name in names:
        saying = [(place, getattr(place, name)) for place in places if getattr(place, name) not in (None, [])]
        if saying:
            setattr(account, name, saying[0][1])
        if name in PREPROCESSING or name == 'problem_type':
            _check_agreement(name, saying)
    for name in dict.fromkeys(name for place in places for name in place.model_args):
        saying = [(place, place.model_args[name]) for place in places if name in place.model_args]
        _check_agreement(name, saying)
        account.model_args[name] = saying[0][1]
    return account


def _check_agreement(name: str, saying: Sequence[Tuple[Said, Any]]) -> None:
    for place, value in saying[1:]:
        first, meant = saying[0]
        if not first.overrides and not _same(meant, value):
            raise ValueError(
                f'{first.where} says {name} {shown(meant)}, but {place.where} says {shown(value)}: correct one of '
                f'them.')


def _same(a: Any, b: Any) -> bool:
    """Return whether two values or lists are the same. A single value is compared with every value of a list."""
    ones = list(a) if isinstance(a, (list, tuple)) else [a]
    others = list(b) if isinstance(b, (list, tuple)) else [b]
    ones = ones * len(others) if len(ones) == 1 else ones
    others = others * len(ones) if len(others) == 1 else others
    return len(ones) == len(others) and all(map(_same_value, ones, others))


def _same_value(x: Any, y: Any) -> bool:
    """Return whether two values are equal. Numbers may differ by 1e-6, unless both are below 1e-3, such as an eps."""
    if isinstance(x, (int, float)) and isinstance(y, (int, float)) and max(abs(x), abs(y)) > 1e-3:
        return abs(x - y) < 1e-6
    return x == y


def _describe(
        source: Source, converted: Converted, told_size: Optional[Tuple[int, int]],
        other_size: Optional[Tuple[int, int]], said: Sequence[Said],
) -> Tuple[StateDict, Architecture]:
    """Return the state dict and its architecture.

    If the row of the class token is in a separate file (`Source.class_row`), it is put back into the state dict.
    """
    stored = told_size or next((place.model_args['img_size'] for place in said if 'img_size' in place.model_args), None)
    trained = next((place.img_size for place in said if place.img_size), None)
    state_dict = converted.state_dict
    info = describe(
        state_dict,
        img_size=stored,
        other_sizes=(trained, other_size),
        prefer_square=FORMATS[converted.format].prefers_square,
    )
    if not info.class_token and not info.class_row and source.class_row is not None:
        row = _read_class_row(source.class_row, state_dict[POS_EMBED])
        state_dict = {**state_dict, POS_EMBED: torch.cat([row, state_dict[POS_EMBED]], 1)}
        info = describe(state_dict, info.img_size)
    return state_dict, info


def _read_class_row(file: Path, like: torch.Tensor) -> torch.Tensor:
    row = read_checkpoint(file, 2 ** 20).get(CLASS_ROW)
    if not isinstance(row, torch.Tensor) or row.shape != (1, 1, like.shape[2]) or row.dtype != like.dtype:
        raise ValueError(f'Expected {CLASS_ROW} of type {like.dtype} and width {like.shape[2]} in {file.name}: remove '
                         f'or replace that file.')
    return row


def _find_variant(info: Architecture, source: Source, model: Optional[str], said: Sequence[Said]) -> str:
    """Return the name of the timm model with these depths and channels. `model` and the configs have to agree."""
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(
            f'Expected the depths and channels of one of {", ".join(VARIANTS)}, got {info.depths} and '
            f'{info.embed_dims}.')
    wanted = [model, *(place.architecture for place in said)]
    for name in filter(None, wanted):
        if name.partition('.')[0] != variant:
            raise ValueError(f'Expected a checkpoint of {shown(name)[1:-1]}, but {source.file.name} holds {variant}.')
    return variant


def _odd(converted: Converted) -> List[str]:
    """Return notes on values that are not finite."""
    broken = [key for key, value in converted.state_dict.items() if not value.isfinite().all()]
    return [f'values that are not finite, kept as they are: {some_names(broken, 3)}'] if broken else []


def _preprocessing(account: Said, info: Architecture, variant: str, notes: List[str]) -> Dict[str, Any]:
    """Return how images are prepared: as the checkpoint and its configs say, otherwise as usual for the variant."""
    default: Any = get_pretrained_cfg(variant)
    cfg: Dict[str, Any] = {}
    for name in ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation'):
        value = getattr(account, name)
        cfg[name] = getattr(default, name) if value is None else value
    if any(len(cfg[name]) not in (1, info.in_chans) for name in ('mean', 'std')):
        notes.append(f'mean and std of {info.in_chans} channels are not known: took the average of the usual ones')
    for name in ('mean', 'std'):
        values = tuple(cfg[name])
        average = round(sum(values) / len(values), 6)
        cfg[name] = values if len(values) == info.in_chans else (average,) * info.in_chans
    size = account.img_size or info.img_size
    if not all(MIN_SIZE <= n <= MAX_SIZE for n in size):
        size = info.img_size
    cfg['input_size'] = (info.in_chans, *size)
    return cfg


def _labels(
        source: Source, account: Said, file: Optional[PathLike], count: int, notes: List[str]) -> List[str]:
    """Return the names of the classes from `file`, otherwise from the checkpoint, a file beside it, or its config."""
    if file is not None:
        return read_labels(file, count)
    names = account.label_names or []
    if names and count and len(names) != count:
        notes.append(f'left out {len(names)} label names, the head has {count} classes')
    return names if len(names) == count else []
