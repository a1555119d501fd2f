""" Open the dicts that training code puts around weights, and read the training settings beside the weights. """
import argparse
from typing import Any, Dict, List, Mapping, Tuple

from .format import Said
from .values import class_names, image_size, problem_type, read_preprocessing, shown

__all__ = ['training_settings', 'unwrap']

# Keys of averaged weights and of plain ones, in timm's order
_AVERAGED = ('state_dict_ema', 'model_ema')
_PLAIN = ('state_dict', 'model')
_MAX_WRAPPERS = 4
# Arguments of a model that change its outputs and cannot be read from a state dict
_MODEL_ARGS = ('act_layer', 'norm_layer', 'norm_eps', 'embed_norm_eps', 'num_heads', 'mlp_ratios')


def unwrap(
        checkpoint: Mapping[str, Any], use_ema: bool = True,
) -> Tuple[Mapping[str, Any], Tuple[str, ...], Dict[str, str]]:
    """Return the state dict inside of a training checkpoint. With `use_ema`, averaged weights are preferred.

    Returns:
        The state dict, the opened keys (outermost first), and for each key that was left out the reason. A dict inside
        of the state dict is flattened: its entries get the names '{name}.{key}'.

    Raises:
        ValueError: There is no state dict, or a key occurs twice.
    """
    wrappers: List[str] = []
    left: Dict[str, str] = {}
    order = _AVERAGED + _PLAIN if use_ema else _PLAIN + _AVERAGED
    while True:
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f'Expected a state dict, got {type(checkpoint).__name__}.')
        filled = [key for key in order if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]]
        if not filled or len(wrappers) == _MAX_WRAPPERS:
            break
        for key in checkpoint:
            if key != filled[0]:
                left['.'.join((*wrappers, str(key)))] = f'beside {filled[0]!r}'
        wrappers.append(filled[0])
        checkpoint = checkpoint[filled[0]]
    flat: Dict[str, Any] = {}
    for key, value in checkpoint.items():
        inside = isinstance(value, Mapping) and value
        for name, x in ({f'{key}.{inner}': x for inner, x in value.items()} if inside else {key: value}).items():
            if name in flat:
                raise ValueError(f'Expected every weight once, got {shown(name)} twice.')
            flat[name] = x
    return flat, tuple(wrappers), left


def training_settings(checkpoint: Mapping[str, Any]) -> Said:
    """Return what a checkpoint of train.py ('args') or of Lightning ('hyper_parameters') says about its training.

    Settings may be in groups: dicts or `argparse.Namespace` objects inside of 'args' or 'hyper_parameters'. A setting
    outside of a group wins over one of the same name inside of a group.
    """
    said = Said("the training settings in the checkpoint ('args' or 'hyper_parameters')")
    settings: Dict[Any, Any] = {}
    for key in ('args', 'hyper_parameters'):
        outer = _as_dict(checkpoint.get(key))
        for source in (outer, *(_as_dict(value) for value in outer.values())):
            for name, value in source.items():
                if value is not None:
                    settings.setdefault(name, value)
    read_preprocessing(said, settings)
    for name in ('input_size', 'img_size', 'image_size'):
        if said.img_size is None and name in settings:
            said.img_size = image_size(settings[name])
            if said.img_size is None:
                said.notes.append(f'left out the {name} that {said.where} says')
    for name in ('label_names', 'class_names', 'classes'):
        said.label_names = said.label_names or class_names(settings.get(name))
        if said.label_names is None and isinstance(settings.get(name), (list, tuple)) and settings[name]:
            said.notes.append(f'left out the {name} that {said.where} says: these are no names')
    for name in ('global_pool', 'gp'):  # its names as an argument of a model, and as an option of train.py
        if isinstance(settings.get(name), str):
            said.model_args.setdefault('global_pool', settings[name])
    said.problem_type = problem_type(settings.get('problem_type'))
    if isinstance(settings.get('model'), str):
        said.tag = settings['model'].partition('.')[2] or None
    for name in _MODEL_ARGS:  # settings of Lightning's modules, in a group or not
        if settings.get(name) is not None:
            said.model_args[name] = settings[name]
    # train.py builds the model with the arguments in its --model-kwargs
    for name, value in _as_dict(_as_dict(checkpoint.get('args')).get('model_kwargs')).items():
        said.model_args[name] = value
    return said


def _as_dict(value: Any) -> Mapping[Any, Any]:
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return value if isinstance(value, Mapping) else {}
