""" Convert whole detectors and segmenters to the layout of mmdetection, mmsegmentation or the original code. """
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch

from pvt_timm.detection import detector_to_mmdet
from pvt_timm.detection.openmmlab import describe_heads, heads_of
from pvt_timm.detection.trained import describe_model, is_own
from pvt_timm.files import MAX_BYTES, PathLike, read_checkpoint
from pvt_timm.formats.mapping import map_to_timm
from pvt_timm.segmentation import SemanticFpn, segmenter_to_mmseg
from pvt_timm.sources import open_source
from pvt_timm.training.checkpoints import load_any, load_trained

from .output import check_output, new_files

__all__ = ['WHOLE_TARGETS', 'convert_whole']

WHOLE_TARGETS = ('mmdet', 'original')


def convert_whole(
        source: PathLike,
        output: PathLike,
        *,
        to: str = 'mmdet',
        prefix: Optional[str] = None,
        force: bool = False,
        max_bytes: int = MAX_BYTES,
) -> Dict[str, Any]:
    """Convert a detector or segmenter with its neck and heads.

    The written file holds the weights under 'state_dict'. Under 'meta' it holds the names and colours of the classes,
    which mmdetection and mmsegmentation read, and a config of a few lines with the size and normalisation of images,
    which this package reads. The file is read back and compared before it appears in the folder.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]': a checkpoint of `pvt-timm detector
            fit` or `segmenter fit`, the weights of a model of this package, or a file of OpenMMLab or the original.
        output: Folder to write.
        to: 'mmdet' (also for mmsegmentation) or 'original'. They differ in the names of the backbone.
        prefix: The part before the names of the model, or of its backbone. It is needed if there are several.
        force: Whether a file of the same name is replaced.
        max_bytes: Largest size of a file. Larger files are refused.

    Returns:
        A dict with 'kind', 'model' (name of the PVT), 'num_classes', 'categories', 'min_size', 'max_size', 'mean',
        'std', 'output' and 'files' (bytes by name).

    Raises:
        ValueError: The source is not such a checkpoint, or the model that is read from the written file differs.
    """
    if to not in WHOLE_TARGETS:
        raise ValueError(f'Expected one of {WHOLE_TARGETS} for a whole detector or segmenter, got {to!r}.')
    path = check_output(output, force)
    with open_source(source, max_bytes) as found:
        model, task = _load(read_checkpoint(found.file, max_bytes), prefix)
        said = describe_model(model)
        state_dict = segmenter_to_mmseg(model, to) if task == 'segmenter' else detector_to_mmdet(model, to)
        meta = _meta(said)
        with new_files(path, force, found.files) as folder:
            file = folder / f'{said["model"]}_{said["kind"]}.pth'
            torch.save({'meta': meta, 'state_dict': state_dict}, file)
            _check(file, model, task)
            files = {file.name: file.stat().st_size}
    names = ('kind', 'model', 'num_classes', 'categories', 'min_size', 'max_size', 'mean', 'std')
    return {**{name: said[name] for name in names}, 'output': str(path), 'files': files}


def _load(checkpoint: Dict[str, Any], prefix: Optional[str]) -> Tuple[Any, str]:
    """Return the model in a checkpoint, and 'detector' or 'segmenter'."""
    if is_own(checkpoint):
        model = load_trained(checkpoint, prefix=prefix)
    else:
        kind = describe_heads(heads_of(map_to_timm(checkpoint, prefix=prefix)))
        is_segmenter = kind is not None and kind[0] == 'Semantic FPN'
        model = load_any(checkpoint, 'segmenter' if is_segmenter else 'detector', prefix)
    return model, 'segmenter' if isinstance(model, SemanticFpn) else 'detector'


def _meta(said: Dict[str, Any]) -> Dict[str, Any]:
    """Return the entries under 'meta'.

    mmdetection and mmsegmentation read 'dataset_meta', their older versions 'CLASSES' and 'PALETTE'. This package also
    reads 'cfg'.
    """
    names = tuple(said['categories'])
    palette = [tuple(color) for color in said['palette']]
    shorter = said['min_size'][-1] if isinstance(said['min_size'], list) else said['min_size']
    mean, std = ([round(255 * x, 4) for x in said[name]] for name in ('mean', 'std'))
    meta: Dict[str, Any] = {'cfg': (
        f'model = dict(data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True))\n'
        f"test_pipeline = [dict(type='Resize', scale=({said['max_size']}, {shorter}), keep_ratio=True)]\n")}
    if names:
        meta['CLASSES'] = names
        meta['dataset_meta'] = {'classes': names}
    if palette:
        meta['PALETTE'] = palette
        meta.setdefault('dataset_meta', {})['palette'] = palette
    return meta


def _check(file: Path, model: Any, task: str) -> None:
    """Read the written file back, and raise an error if its weights or classes differ from those of the model."""
    again = load_any(file, task)
    meant = model.state_dict()
    wrong = [name for name, value in again.state_dict().items() if not torch.equal(value, meant[name])]
    if wrong or list(again.categories) != list(model.categories):
        raise ValueError(f'The file was not written correctly: {wrong[0] if wrong else "its classes"} changed.')
    args, read = (describe_model(m)['model_args'] for m in (model, again))
    lost = [name for name in args if args[name] != read.get(name) and name != 'embed_norm_eps']  # see formats/openmmlab
    if lost:
        raise ValueError(
            f'Expected a PVT with the published settings, got {lost[0]}={args[lost[0]]!r}, which the file cannot hold.')
