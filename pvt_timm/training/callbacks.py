""" Callbacks for Lightning that write the checkpoints, the history and the curve of a run. """
import json
import math
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ..cli.pictures import new_figure
from ..files import read_checkpoint, save_atomically

__all__ = ['BEST', 'LAST', 'Checkpoints', 'CompleteFiles', 'History', 'draw_curve']

LAST, BEST = 'last.ckpt', 'best.ckpt'
CHECK_EVERY = 50  # steps


class CompleteFiles(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, and reads them without executing anything in them."""

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        save_atomically(path, lambda f: torch.save(checkpoint, f))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        return read_checkpoint(path)


class History(Callback):
    """Keeps the loss of every step and the figures of every evaluation. They are saved in checkpoints.

    Training ends with an error if the loss is NaN or infinity.

    Attributes:
        title: Title of the curve.
        losses: One loss per optimizer step. Files have the losses of the first process.
        evaluations: Figures from 0 to 1 of every evaluation, with its 'step' and 'epoch'.
    """

    def __init__(self, folder: Path):
        self.folder, self.title = folder, ''
        self.losses: List[float] = []
        self.evaluations: List[Dict[str, float]] = []
        self._waiting: List[torch.Tensor] = []  # on the device. Reading one in each step would slow a GPU down
        self._of_step: List[torch.Tensor] = []

    def state_dict(self) -> Dict[str, Any]:
        return dict(losses=self.losses, evaluations=self.evaluations)

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.losses, self.evaluations = list(state_dict['losses']), list(state_dict['evaluations'])

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs['loss'] * trainer.accumulate_grad_batches  # Lightning divides it
        self._of_step.append(loss.detach())
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._waiting.append(torch.stack(self._of_step).mean())
            self._of_step = []
            if len(self._waiting) >= CHECK_EVERY or trainer.global_step <= 1:
                self._read()

    def _print(self, trainer: pl.Trainer, pl_module: Any) -> None:
        recent = self.losses[-50:]
        line = f'epoch {trainer.current_epoch + 1} of {trainer.max_epochs}  step {trainer.global_step}  '
        line += f'loss {sum(recent) / len(recent):.4f}'
        if self.evaluations and self.evaluations[-1]['step'] == trainer.global_step:
            line += f'  {pl_module.score} {self.evaluations[-1][pl_module.score]:.4f}'
        print(line, flush=True)

    def _read(self) -> None:
        if not self._waiting:
            return
        losses = torch.stack(self._waiting).float().tolist()
        self._waiting = []
        for loss in losses:
            self.losses.append(round(loss, 6))
            if not math.isfinite(loss):
                raise ValueError(
                    f'The loss of step {len(self.losses)} is {loss}: try a smaller --lr, more --warmup-steps or '
                    f'--clip-grad 1 (--precision 32-true if it is 16-mixed)')

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._read()
        if pl_module.figures and pl_module.evaluated_step == trainer.global_step:
            self.evaluations.append(
                dict(step=trainer.global_step, epoch=trainer.current_epoch + 1, **pl_module.figures))
        if not trainer.is_global_zero:
            return
        if trainer.progress_bar_callback is None:
            self._print(trainer, pl_module)
        text = json.dumps(dict(losses=self.losses, evaluations=self.evaluations))
        save_atomically(self.folder / 'history.json', lambda f: f.write(text.encode()))
        if self.evaluations:
            try:
                draw_curve(self.losses, self.evaluations, self.folder / 'curve.png', self.title)
            except ImportError as e:
                warnings.warn(f'No curve is drawn: {e}', stacklevel=2)


class Checkpoints(Checkpoint):
    """Writes last.ckpt after every epoch, to continue training from, and best.ckpt, which has only weights.

    Attributes:
        best: The best score so far, None before the first one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best: Optional[float] = None

    def state_dict(self) -> Dict[str, Any]:
        return dict(best=self.best)

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.best = state_dict['best']

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.figures and pl_module.evaluated_step == trainer.global_step:
            score = pl_module.figures[pl_module.score]
            if self.best is None or score > self.best:
                self.best = score
                trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)


def draw_curve(
        losses: List[float], evaluations: List[Dict[str, float]], path: Union[str, Path], title: str) -> None:
    """Draw the loss of every step beside the figures of every evaluation.

    Args:
        losses: Losses, one per step.
        evaluations: The 'step' and the figures (from 0 to 1) of each. The figures of single classes are not drawn.
        path: PNG to write.
        title: Line above the drawings.
    """
    figure = new_figure(figsize=(10, 3.8), layout='constrained')
    left, right = figure.subplots(1, 2)
    width = max(len(losses) // 40, 1)
    smooth = []
    for i in range(len(losses)):
        some = losses[max(i - width + 1, 0):i + 1]
        smooth.append(sum(some) / len(some))
    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color='#bbbbbb', linewidth=0.8, label='each step')
    left.plot(steps, smooth, color='#333333', linewidth=1.6, label=f'mean of {width}')
    highest = sorted(losses)[int(0.99 * (len(losses) - 1))]
    left.set(xlabel='step', ylabel='training loss', ylim=(0, highest * 1.05 or 1))
    left.legend(frameon=False)
    shown = [name for name in evaluations[-1] if name in _CURVES]
    for name in shown:
        points = [(row['step'], row[name]) for row in evaluations if row.get(name, -1) >= 0]
        right.plot(*zip(*points) if points else ([], []), label=name.replace('/', ' '), **_CURVES[name])
    right.set(xlabel='step', ylabel='score on the images for evaluation', ylim=(0, 1))
    right.legend(frameon=False, loc='best')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_atomically(path, lambda f: figure.savefig(f, format='png'))


_CURVES: Dict[str, Dict[str, Any]] = {
    'box/AP': dict(color='#2f7fd3', marker='o', markersize=4),
    'box/AP50': dict(color='#2f7fd3', marker='o', markersize=4, markerfacecolor='white', linestyle='--'),
    'mask/AP': dict(color='#e6553a', marker='s', markersize=4),
    'mask/AP50': dict(color='#e6553a', marker='s', markersize=4, markerfacecolor='white', linestyle='--'),
    'mIoU': dict(color='#2f7fd3', marker='o', markersize=4),
    'accuracy': dict(color='#888888', marker='s', markersize=4, markerfacecolor='white', linestyle='--'),
}
