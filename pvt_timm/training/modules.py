""" Losses, optimizer and schedule of detectors and segmenters, for Lightning. """
import dataclasses
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.functional import normalize

from ..detection.trained import KEY, describe_model
from .label_maps import IGNORED
from .metrics import CocoEvaluation, coco_rows, iou_figures
from .settings import DetectorSettings, SegmenterSettings, Settings

__all__ = ['DetectorModule', 'SegmenterModule', 'learning_rate_factor']


def learning_rate_factor(settings: Settings, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """Return a function that returns the factor of the learning rate in a step. Steps count from 0."""
    unit = steps_per_epoch if settings.epochs is not None else 1
    drops = [drop * unit for drop in settings.lr_drops]

    def factor(step: int) -> float:
        done = min(step / total_steps, 1)
        if settings.schedule == 'step':
            value = 0.1 ** sum(1 for drop in drops if step >= drop)
        elif settings.schedule == 'poly':
            value = (1 - done) ** settings.poly_power
        else:
            value = 0.5 * (1 + math.cos(math.pi * done))
        if step < settings.warmup_steps:
            value *= settings.warmup_start + (1 - settings.warmup_start) * step / settings.warmup_steps
        return value

    return factor


class TrainingModule(pl.LightningModule):
    """The parts of training that detectors and segmenters share.

    Attributes:
        model: The detector or segmenter.
        figures: Figures of the last evaluation, from 0 to 1.
        evaluated_step: Number of optimizer steps before the last evaluation.
    """
    score: str  # the figure that says which checkpoint is the best

    model: Any

    def __init__(self, model: Any, settings: Settings, steps_per_epoch: int = 1, total_steps: int = 1):
        super().__init__()
        self.model = model
        self.settings = settings
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.figures: Dict[str, float] = {}
        self.evaluated_step = -1
        self.frozen: List[Any] = []
        if settings.frozen_stages:
            self.frozen = list(model.backbone.body.children())[:settings.frozen_stages]
        for stage in self.frozen:
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for stage in getattr(self, 'frozen', ()):
            stage.eval()  # no stochastic depth
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Random numbers of the model (for proposals and stochastic depth) depend only on the step and the process, so
        # that they are the same after an interruption. The hook for the start of an epoch cannot be used for this,
        # because Lightning does not call it when it continues in the middle of an epoch.
        place = 1_000_003 * self.global_step + 9973 * batch_idx + self.global_rank
        torch.manual_seed(self.settings.seed + place)

    def configure_optimizers(self) -> Dict[str, Any]:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        factor = learning_rate_factor(self.settings, self.steps_per_epoch, self.total_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval='step'))

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        settings = dataclasses.asdict(self.settings)
        described = describe_model(self.model, self.settings.head_args)
        checkpoint[KEY] = {**described, 'settings': settings, 'figures': dict(self.figures)}

    def _set_figures(self, figures: Dict[str, float]) -> None:
        self.figures, self.evaluated_step = figures, self.global_step
        self.log(self.score, figures[self.score], prog_bar=True, rank_zero_only=True)


class DetectorModule(TrainingModule):
    """Trains a detector on lists of images, uint8 (C, H, W), and lists of targets."""

    def __init__(
            self, model: nn.Module, settings: DetectorSettings, truth: Optional[Mapping[str, Any]] = None,
            category_ids: Optional[Mapping[int, int]] = None, **kwargs: Any):
        """
        Args:
            model: A detector of this package.
            settings: Settings of the run.
            truth: Content of the annotation file to evaluate against.
            category_ids: The category id, in this file, of each label.
            kwargs: `steps_per_epoch` and `total_steps`.
        """
        super().__init__(model, settings, **kwargs)
        masks = hasattr(model, 'roi_heads') and self.model.roi_heads.has_mask()
        self.score = 'mask/AP' if masks else 'box/AP'
        self.category_ids = dict(category_ids or {})
        self.evaluation = CocoEvaluation(dict(truth or {}), masks)

    def training_step(self, batch: Tuple[List[torch.Tensor], List[Dict[str, Any]]], index: int) -> torch.Tensor:
        images, targets = batch
        plain = [
            {name: x.as_subclass(torch.Tensor) for name, x in target.items() if isinstance(x, torch.Tensor)}
            for target in targets]
        losses = self.model([_from_0_to_1(image) for image in images], plain)
        return sum(losses.values())

    def on_validation_epoch_start(self) -> None:
        self.evaluation.reset()

    def validation_step(self, batch: Tuple[List[Any], List[Any], List[bool]], index: int) -> None:
        images, targets, counted = batch
        found = self.model([_from_0_to_1(image) for image in images])
        for detections, target, counts in zip(found, targets, counted):
            if counts:
                rows = coco_rows(detections, target['image_id'], self.category_ids)
                self.evaluation.update(target['image_id'], rows)

    def on_validation_epoch_end(self) -> None:
        self.evaluation.gather()
        self._set_figures(self.evaluation.figures())


class SegmenterModule(TrainingModule):
    """Trains a segmenter on images, uint8 (B, C, H, W), and their classes, int64 (B, H, W)."""
    score = 'mIoU'

    def __init__(self, model: nn.Module, settings: SegmenterSettings, **kwargs: Any):
        super().__init__(model, settings, **kwargs)
        self.confusion = MulticlassConfusionMatrix(self.model.num_classes, ignore_index=IGNORED)

    def training_step(self, batch: Tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, classes = batch
        logits = self.model(normalize(_from_0_to_1(images), self.model.mean, self.model.std)).float()
        classes = classes.as_subclass(torch.Tensor)
        total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction='sum')
        return total / classes.numel()  # as published: the mean over all pixels, those without a class with loss 0

    def on_validation_epoch_start(self) -> None:
        self.confusion.reset()

    def validation_step(self, batch: Tuple[List[Any], List[Any], List[bool]], index: int) -> None:
        images, classes, counted = batch
        for image, truth, counts in zip(images, classes, counted):
            found = self.model.segment(_from_0_to_1(image))
            if counts:
                self.confusion.update(found[None], truth.as_subclass(torch.Tensor)[None])

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute()
        if not confusion.sum():
            raise ValueError('No pixel of the images to evaluate on has a class')
        self._set_figures(iou_figures(confusion, self.model.categories or _numbered(self.model.num_classes)))


def _from_0_to_1(image: torch.Tensor) -> torch.Tensor:
    return image.as_subclass(torch.Tensor).float() / 255


def _numbered(count: int) -> Sequence[str]:
    return [f'class {i}' for i in range(count)]
