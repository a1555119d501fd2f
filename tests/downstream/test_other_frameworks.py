""" The examples for other libraries. They are not test requirements: each runs if its library is installed. """
import importlib
import re
from pathlib import Path

import pytest
import torch

import pvt_timm  # noqa: F401


def test_effdet():
    pytest.importorskip('effdet')
    from effdet import DetBenchTrain, EfficientDet, get_efficientdet_config
    config = get_efficientdet_config('efficientdet_d0')
    config.update(
        backbone_name='test_pvt', backbone_args=dict(img_size=128), backbone_indices=(1, 2, 3), image_size=[128, 128],
        num_classes=3, fpn_cell_repeats=1)
    model = DetBenchTrain(EfficientDet(config, pretrained_backbone=False), config)
    boxes = [torch.tensor([[10., 10, 60, 60]]), torch.tensor([[20., 20, 90, 70]])]
    loss = model(torch.rand(2, 3, 128, 128), dict(bbox=boxes, cls=[torch.tensor([1.]), torch.tensor([2.])]))['loss']
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.model.backbone.parameters())


def test_anomalib():
    pytest.importorskip('anomalib')
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    features = TimmFeatureExtractor('test_pvt', layers=[1, 2], pre_trained=False)(torch.rand(2, 3, 96, 64))
    assert [tuple(f.shape) for f in features.values()] == [(2, 32, 12, 8), (2, 40, 6, 4)]
    model = PatchcoreModel(backbone='test_pvt', layers=['stages.1', 'stages.2'], pre_trained=False, num_neighbors=1)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.train()
    model(images)
    model.subsample_embedding(0.25)
    model.eval()
    out = model(images[:1])
    assert out.anomaly_map.shape[-2:] == (64, 64) and torch.isfinite(out.pred_score).all()
    changed = images[:1].clone()
    changed[:, :, 16:48, 16:48] = 3
    assert model(changed).pred_score > out.pred_score


def openmmlab_model(tmp_path, package):
    """Build a model from the config in recipes/README.md, for mmdetection with the changes named there."""
    pytest.importorskip('mmcv')
    pytest.importorskip('mmengine')
    from tests.support.mmdet_reference import do_without_compiled_parts
    do_without_compiled_parts()
    pytest.importorskip('mmpretrain')
    # its multimodal models, imported where their packages are there, fail with transformers 5
    importlib.import_module('mmpretrain.utils.dependency').WITH_MULTIMODAL = False
    root = Path(pytest.importorskip(package).__file__).parent / '.mim' / 'configs'
    readme = (Path(__file__).resolve().parents[2] / 'pvt_timm' / 'recipes' / 'README.md').read_text(encoding='utf-8')
    text = re.search(r"^```python\n(_base_ = .*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    if package == 'mmdet':
        text = re.search(r"^    backbone=.*\n^    neck=.*\]\)", text, re.MULTILINE)[0]
        text = text.replace("type='TIMMBackbone'", "type='mmpretrain.TIMMBackbone'")
        text = f"_base_ = ['../_base_/models/retinanet_r50_fpn.py']\nmodel = dict(\n{text})\n"
        text += re.search(r'`(custom_imports = .*mmpretrain.*?)`', readme)[1]
    text = text.replace('../_base_', str(root / '_base_')).replace('pvt_small', 'test_pvt')
    text = text.replace('pretrained=True', 'pretrained=False').replace('[64, 128, 320, 512]', '[16, 32, 40, 64]')
    (tmp_path / 'config.py').write_text(text)
    from mmengine.config import Config
    importlib.import_module(f'{package}.utils').register_all_modules(init_default_scope=True)
    config = Config.fromfile(tmp_path / 'config.py')
    return importlib.import_module(f'{package}.registry').MODELS.build(config.model)


def test_mmsegmentation(tmp_path):
    model = openmmlab_model(tmp_path, 'mmseg')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_shape=(96, 128)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 96, 128)))
    loss = model.loss(torch.randn(1, 3, 96, 128), [sample])['decode.loss_ce']
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.backbone.parameters())


def test_mmdetection(tmp_path):
    model = openmmlab_model(tmp_path, 'mmdet')
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    x = torch.randn(1, 3, 128, 160)
    assert [tuple(f.shape[2:]) for f in model.extract_feat(x)] == [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    shape = (128, 160)
    sample = DetDataSample(metainfo=dict(
        img_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1, 1)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[10., 10, 60, 60]]), labels=torch.tensor([3]))
    loss = sum(sum(v) if isinstance(v, list) else v for v in model.loss(x, [sample]).values())
    loss.backward()
    assert torch.isfinite(loss) and all(
        p.grad is not None for n, p in model.backbone.named_parameters() if 'stages_0' not in n)
