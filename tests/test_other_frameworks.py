""" The examples for other libraries, none of which is among the test requirements; each runs where it is installed. """
import pytest
import timm
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


def test_lightning():
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('test_pvt', num_classes=5)

        def training_step(self, batch, index):
            images, labels = batch
            loss = torch.nn.functional.cross_entropy(self.model(images), labels)
            self.log('loss', loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 5)
    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert torch.isfinite(trainer.callback_metrics['loss'])
    assert any(not torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize('layers', [['stages.1', 'stages.2'], [1, 2]])
def test_anomalib(layers):
    pytest.importorskip('anomalib')
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    if isinstance(layers[0], int):
        features = TimmFeatureExtractor('test_pvt', layers=layers, pre_trained=False)(torch.rand(2, 3, 96, 64))
        assert [tuple(f.shape) for f in features.values()] == [(2, 32, 12, 8), (2, 40, 6, 4)]
        return
    model = PatchcoreModel(backbone='test_pvt', layers=layers, pre_trained=False, num_neighbors=1)
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
