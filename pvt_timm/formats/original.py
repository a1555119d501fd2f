""" The format of the original code, https://github.com/whai362/PVT.

A checkpoint is a bare state dict of classification/pvt.py, or of the dense models in detection/ and segmentation/
(dense: they give feature maps, for detectors and segmenters). The dense models have no class token, but still keep the
row of `pos_embed4` that belongs to it, and cut that row away when they run.
"""
import os
import re
import runpy
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Sequence, Tuple
from unittest import mock

import torch

from .architecture import drop_parts
from .format import Format, NoReferenceError, Reference, layer_norms
from .names import Row, StateDict
from .writing import write_tensors

if TYPE_CHECKING:
    from ..weights import Weights

__all__ = ['CHECKOUT', 'FORMATS', 'import_original']

CHECKOUT = 'PVT_CHECKOUT'  # environment variable with the path of a checkout of whai362/PVT

POS_EMBED, CLASS_TOKEN = 'stages.3.pos_embed', 'stages.3.cls_token'


class OriginalFormat(Format):
    name = 'original'
    table = (
        #   timm                                   original
        Row('stages.{i}.pos_embed',                'pos_embed{s}'),
        Row('stages.3.cls_token',                  'cls_token'),
        Row('stages.{i}.patch_embed.proj.{p}',     'patch_embed{s}.proj.{p}'),
        Row('stages.{i}.patch_embed.norm.{p}',     'patch_embed{s}.norm.{p}'),
        Row('stages.{i}.blocks.{j}.{layer}.{p}',   'block{s}.{j}.{layer}.{p}'),
        Row('norm.{p}',                            'norm.{p}'),
        Row('head.{p}',                            'head.{p}'),
    )
    first_weight = ('patch_embed1.proj.weight',)
    start = re.compile(
        r'(?:pos_embed\d|cls_token|patch_embed\d|block\d|norm\d*|head\.(?:weight|bias))\b')
    prefers_square = True  # its `img_size` is one number
    is_target = True

    def check_parts(self, weights: 'Weights', drop: Sequence[str]) -> List[str]:
        keep = [part for part in weights.parts if part not in drop]
        together = ('class_token' in keep) == ('norm' in keep)
        if not together or 'head' in keep and 'class_token' not in keep:
            raise ValueError(
                f'The original format holds class token and norm together or neither, and a head only with them, this '
                f'would be {", ".join(keep)}: leave them out with --drop {" ".join(weights.parts)}.')
        weights.refuse_args(self.name, but=('img_size', 'global_pool', 'embed_norm_eps'))
        pool = weights.args.get('global_pool', 'token')
        if 'head' in keep and pool != 'token':
            raise ValueError(
                f'The head takes global_pool={pool!r}, the original code always the class token: --drop head.')
        return self.check_eps(weights, 1e-5) + self.notes_on_images(weights)

    def take_parts(self, weights: 'Weights', drop: Sequence[str]) -> Tuple[StateDict, List[str]]:
        state_dict = drop_parts(weights.state_dict, [part for part in drop if part != 'class_token'])
        if not weights.info.class_row:
            pos_embed = state_dict[POS_EMBED]
            state_dict[POS_EMBED] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
            return state_dict, [
                'pos_embed4 has a row of zeros at the place of the class token: the original format wants the row, '
                'this checkpoint has none, and the dense models of the original cut it away unread']
        if 'class_token' in drop:  # its row of pos_embed4 stays, as in the original's dense checkpoints
            state_dict.pop(CLASS_TOKEN, None)
        return state_dict, []

    def write(self, folder: Path, weights: 'Weights', tensors: StateDict) -> None:
        """Write a bare state dict, as whai362/PVT publishes, with the names of the classes beside it."""
        from ..labels import write_labels

        write_tensors(tensors, folder / f'{weights.variant}.pth')
        write_labels(folder, weights.label_names)

    def reference(self, weights: 'Weights') -> Reference:
        checkout = os.environ.get(CHECKOUT)
        if not checkout:
            raise NoReferenceError(f'--verify needs a checkout of https://github.com/whai362/PVT in {CHECKOUT}.')
        info = weights.info
        if not info.norm:
            raise NoReferenceError('--verify has no dense model of the original code.')
        build = getattr(import_original(Path(checkout)), weights.variant, None)
        if build is None or info.img_size[0] != info.img_size[1]:
            raise NoReferenceError(
                f'--verify: the original code has no {weights.variant} for {info.img_size[0]}x{info.img_size[1]}.')
        model = build(img_size=info.img_size[0], in_chans=info.in_chans, num_classes=info.num_classes)
        blocks = [getattr(model, f'block{i}')[-1] for i in range(1, 5)]
        norms = [norm for i in range(1, 5) for norm in layer_norms(model, f'patch_embed{i}.norm')]
        norms += layer_norms(model, '.attn.norm')
        return Reference(f'whai362/PVT in {Path(checkout).name}', self.name, model, blocks, norms)

    def how_to_load(self, weights: 'Weights') -> str:
        return (
            '`load_state_dict` of classification/pvt.py, or `pretrained=` in a config of detection/ and segmentation/, '
            'of https://github.com/whai362/PVT.')


FORMATS = [OriginalFormat()]


def import_original(checkout: Path) -> Any:
    """Run classification/pvt.py of a checkout of whai362/PVT and return what it defines.

    Its models are not added to timm's registry.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it imports from timm's old places
        with mock.patch('timm.models.registry.register_model', lambda fn: fn):
            return types.SimpleNamespace(**runpy.run_path(str(checkout / 'classification' / 'pvt.py')))
