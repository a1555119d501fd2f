""" Which of timm's tests run on which of our models, and why the others do not. """
import fnmatch

# The models that timm's tests are run for
MODELS = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large', 'test_pvt')

# What is appended to timm's lists of that name. The models with class token return tokens, not a feature map.
FILTERS = dict(
    NON_STD_FILTERS=[f'{name}*' for name in MODELS],
    FEAT_INTER_FILTERS=['pvt'],
)

# Arguments of timm's tests that hold a model name
NAME_ARGUMENTS = ('model_name', 'name')

# The files of timm's tests with such arguments
FILES = ('test_models.py', 'test_model_input.py', 'test_optim.py', 'test_utils.py')


def is_ours(model_name: str) -> bool:
    return model_name.partition('.')[0] in MODELS


_NAMES = list(MODELS)
_SMALL = dict(embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), sr_ratios=(4, 2, 1, 1))

# Tests with written-out names of other families that hold for any model of our kind, with our names and arguments.
# The last two leave non-standard models out, which holds for our token output but not for our feature maps.
EXTENDED = {
    'test_features_only_grad_checkpointing_backward': _NAMES,
    'test_pruned_features_torchscript': _NAMES,
    'test_feature_getter_stage_ends_torchscript': _NAMES,
    'test_prune_intermediate_layers_params_used': _NAMES,
    'test_features_only_feature_cls_class': _NAMES,
    'test_forward_after_prune_intermediate_layers': _NAMES,
    'test_prune_to_stem_feature': _NAMES,
    'test_model_forward_torchscript_with_features_fx': _NAMES,
    'test_headless_checkpoint_reload': [(n, {}) for n in _NAMES],
    'test_forward_intermediates_stop_early_final_norm': [(n, {}) for n in _NAMES],
    'test_resnetv2_stem_feature_odd_size': [],
    'test_model_init_weights_after_to_empty': [(n, {}) for n in _NAMES],
    'test_prune_intermediate_layers_last_feature': [(n, True) for n in _NAMES],
    'test_relpos_family_set_input_size': [(n, {}, 64, 96) for n in _NAMES],
    'test_relpos_non_square_checkpoint_reload': [(n, {}) for n in _NAMES],
    'test_relpos_non_square_set_input_size': [(n, {}) for n in _NAMES],
    'test_default_resize_hub_roundtrip': [(n, {}, 64, 96) for n in _NAMES],
    'test_export_tracks_reset_pool_in_head': [
        (n, num_classes, pool) for n in _NAMES for num_classes, pool in ((3, 'avg'), (0, ''))],
    'test_export_tracks_reset_classifier_structure': [
        (n, {}, pool, None) for n in _NAMES for pool in ('avg', '', None)],
    'test_freeze_unfreeze_root_parameters': _NAMES,
    'test_param_groups_layer_decay_trunk_layer': [
        (n, f'stages.{i}.pos_embed', f'stages.{i}.patch_embed.proj.weight') for n in _NAMES for i in range(4)],
    'test_model_forward_features': _NAMES,
    'test_model_features_pretrained': _NAMES,
}

# Tests that take a model name and are not run on ours: the reason
EXCLUDED = {
}

# Single models that a test is not run on: the reason
EXCLUDED_MODELS = {
}


def excluded(function: str, model: str) -> str:
    """The reason why a test is not run on a model, '' where it is."""
    for pattern, reason in EXCLUDED_MODELS.get(function, {}).items():
        if fnmatch.fnmatch(model, pattern):
            return reason
    return ''
