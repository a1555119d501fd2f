""" transformers' TimmWrapper and TimmBackbone on PVT, from a folder that timm saved. """
import copy
import json

import pytest
import timm
import torch
from timm.models import save_for_hf

import pvt_timm  # noqa: F401

transformers = pytest.importorskip('transformers', minversion='4.48', reason='needs the TimmWrapper of transformers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('hub') / 'model'
    model = timm.create_model('test_pvt', num_classes=5, img_size=64).eval()
    names = ['ant', 'bee', 'cat', 'dog', 'emu']
    save_for_hf(model, path, model_config=dict(label_names=names), model_args=dict(img_size=64))
    # timm 1.0.31 writes num_classes for all of its models, and transformers 5.23 then gets it twice
    config = json.loads((path / 'config.json').read_text())
    config['model_args'].pop('num_classes', None)
    (path / 'config.json').write_text(json.dumps(config))
    return path, model


def pixels(size=(64, 64)):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_classification(folder):
    path, plain = folder
    model = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    assert model.config.id2label[1] == 'bee'
    for size in ((64, 64), (96, 70)):
        with torch.no_grad():
            out = model(pixels(size), output_hidden_states=True, labels=torch.tensor([0, 4]))
            torch.testing.assert_close(out.logits, plain(pixels(size)))
            _, features = plain.forward_intermediates(pixels(size))
        assert out.loss.isfinite()
        torch.testing.assert_close(list(out.hidden_states), features)


def test_base_model_and_new_head(folder):
    path, plain = folder
    base = transformers.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        out = base(pixels())
        tokens = plain.forward_features(pixels())
    torch.testing.assert_close(out.last_hidden_state, tokens)
    torch.testing.assert_close(out.pooler_output, tokens[:, 0])

    model = transformers.AutoModelForImageClassification.from_pretrained(
        path, num_labels=2, ignore_mismatched_sizes=True).eval()
    assert model(pixels()).logits.shape == (2, 2)
    model.gradient_checkpointing_enable()
    model.train()(pixels(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backbone_equals_features_only():
    torch.manual_seed(0)
    config = transformers.TimmBackboneConfig(backbone='test_pvt', out_indices=[0, 1, 2, 3])
    model = transformers.AutoBackbone.from_config(config).eval()
    assert model.channels == [16, 32, 40, 64]
    plain = timm.create_model('test_pvt', features_only=True).eval()
    plain.load_state_dict(model._backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(list(model(pixels((70, 96))).feature_maps), plain(pixels((70, 96))))


def test_trainer_step(folder, tmp_path):
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    path, _ = folder
    model = transformers.AutoModelForImageClassification.from_pretrained(path)
    data = [dict(pixel_values=x, labels=i % 5) for i, x in enumerate(torch.rand(8, 3, 64, 64))]
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
        use_cpu=True, save_strategy='steps', save_steps=2, logging_steps=1, disable_tqdm=True)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()['eval_loss'] > 0
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v.cpu(), before[k])]
    assert len(changed) > 0.9 * len(before)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'checkpoint-2').eval()
    torch.testing.assert_close(again(pixels()).logits, model.eval()(pixels()).logits)
