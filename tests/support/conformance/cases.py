""" Which of timm's tests run on which of our models, and why the others do not. """
import fnmatch
import os

# Set where timm's tests are run on a timm that holds the family itself, without this package
MERGED = 'PVT_CONFORMANCE_MERGED'

# The models that timm's tests are run for
MODELS = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large', *(() if MERGED in os.environ else ('test_pvt',)))

# What is added to timm's lists of that name. The models with class token return tokens, not a feature map.
FILTERS = dict(
    NON_STD_FILTERS=[f'{name}*' for name in MODELS],
    FEAT_INTER_FILTERS=['pvt', 'digits'],  # the modules of pvt_tiny and its like, and of test_pvt
)

# Arguments of timm's tests that hold a model name
NAME_ARGUMENTS = ('model_name', 'name')

# The files of timm's tests with such arguments
FILES = ('test_models.py', 'test_model_input.py', 'test_optim.py', 'test_utils.py')


_NAMES = ['pvt_tiny', 'test_pvt']  # depths do not matter to these

# Tests with written-out names of other families that hold for any model of our kind, with our names and arguments.
# The last two leave non-standard models out, which holds for our token output but not for our feature maps.
EXTENDED = {
    'test_catavgmax_unsupported': _NAMES,
    'test_head_hidden_size': [(n, {}) for n in _NAMES],
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
    'test_model_forward_features': MODELS,
    'test_model_features_pretrained': MODELS,
}

_OTHER = 'for modules of another family'
_OTHER_ARGUMENT = 'model_name is no model of ours there, but text to parse or a class to build'
_SWIN = 'for window attention, which has a window size to resize'

# Tests that take a model name and are not run on ours: the reason
EXCLUDED = {
    'test_model_default_cfgs': 'for feature map output, with class token there is test_model_default_cfgs_non_std',
    'test_reset_classifier_keeps_pool': "pools with 'max', which PVT never had and refuses",
    'test_prune_class_token_avg_pool': 'for one patch embedding in model.patch_embed, ours is one per stage',
    'test_model_inference': 'compares with a picture and tensors on the hub that belong to one model of timm',
    'test_model_features_output_stride': 'PVT has output stride 32 only and refuses others',
    'test_model_features_space2depth_reduction': _OTHER + ' (efficientnet_x, efficientnet_h)',
    'test_pruned_efficientnet_in_chans': _OTHER + ' (pruned EfficientNet)',
    'test_pruned_feature_info_matches_forward': 'for models made from pruned channel lists',
    'test_prune_extra_blocks_stem_width': 'for the extra_blocks argument of EfficientNet',
    'test_resnetv2_stem_feature_odd_size': 'for a stem feature of stride 2, ours starts at stride 4',
    'test_mobile_model_fusion_features': 'for BatchNorm that fuses into convolutions',
    'test_efficientvim_branch_features': _OTHER + ' (EfficientViM)',
    'test_radio_checkpoint_filter': _OTHER + ' (RADIO)',
    'test_eval_refreshes_attention_bias_cache': 'for attention biases with a cache',
    'test_vit_classifier_*': _OTHER + ' (encoder in a classifier)',
    'test_param_groups_layer_decay_reg_token_stem': _OTHER_ARGUMENT,
    'test_parse_model_name*': _OTHER_ARGUMENT,
    'test_native_checkpoint_file_overrides_custom_load_source': 'for weights with a loader of their own (.npz)',
    'test_windowed_model_resize_roundtrip': _SWIN,
    'test_swin_family_*': _SWIN,
}


def is_ours(model_name: str, function: str = '') -> bool:
    """Return whether a test function is run on a model."""
    return model_name.partition('.')[0] in MODELS and function != 'test_model_inference'


def reason(function: str) -> str:
    """Return why a test function is not run on our models, '' if it is run."""
    return next((r for pattern, r in EXCLUDED.items() if fnmatch.fnmatchcase(function, pattern)), '')
