""" Compare the outputs of converted weights with those of the code that they came from, in float64. """
import contextlib
import math
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from torch import nn

from pvt_timm.files import read_checkpoint
from pvt_timm.formats import FORMATS
from pvt_timm.formats.format import NoReferenceError, Reference
from pvt_timm.formats.mapping import from_timm
from pvt_timm.formats.names import StateDict
from pvt_timm.weights import Weights

__all__ = ['NoReferenceError', 'TOLERANCE', 'VerificationError', 'verify']

TOLERANCE = 1e-10  # float64


class VerificationError(ValueError):
    """The outputs differ by more than the tolerance."""


def verify(weights: Weights, target: Weights, tensors: StateDict, folder: Path, to: str) -> Dict[str, Any]:
    """Compare the source with the timm model, and the file in `folder` with the `tensors` that it should hold.

    Args:
        weights: The source.
        target: The weights that were written.
        tensors: Their state dict under the names of the target format.
        folder: Folder with the written files.
        to: Name of the target format.

    Returns:
        A dict with 'reference' (name), 'tolerance', 'passed', and 'differences'. 'differences' has two figures for each
        output. A figure is the largest difference, divided by the largest value (or by 1 if that is smaller). The first
        one is measured with the eps that the norms of the reference have, the second one with the eps of our norms.
        Only the second one is compared with the tolerance.

    Raises:
        VerificationError: The outputs differ by more than `TOLERANCE`.
        NoReferenceError: No implementation to compare with is installed.
        ValueError: The written file does not hold `tensors`.
    """
    fmt = weights.converted.format
    _check_written(tensors, folder, to)
    reference = _reference(fmt, weights)
    if reference.format == fmt:
        name, raw = reference.name, weights.converted.raw
    else:  # the code of another format is used instead, so the weights get the names of that format
        name = f'{reference.name} (in place of the code of the {fmt} format)'
        raw = from_timm(weights.for_model(), reference.format)[0]
    differences = _compare(weights, reference, raw)
    if to not in ('timm', fmt):  # also run the code of the target format on the written weights, if it is installed
        with contextlib.suppress(NoReferenceError):
            written = _reference(to, target)
            found = _compare(target, written, tensors) if written.format == to else {}
            differences.update({f'{output}, written': values for output, values in found.items()})
    if not all(exact <= TOLERANCE for _, exact in differences.values()):
        text = ', '.join(f'{output} by {exact:.1e}' for output, (_, exact) in differences.items())
        raise VerificationError(f'Verification against {name} failed (tolerance {TOLERANCE:g}): {text}.')
    return {'reference': name, 'tolerance': TOLERANCE, 'passed': True, 'differences': differences}


def _reference(fmt: str, weights: Weights) -> Reference:
    """Return the implementation to compare with: the format's own if it is installed, otherwise another that fits."""
    info = weights.info
    if info.class_token != info.norm or info.num_classes and not info.norm:
        raise NoReferenceError(
            '--verify compares checkpoints with class token and norm, or with neither (and without head).')
    with contextlib.suppress(NoReferenceError):
        return FORMATS[fmt].reference(weights)
    return FORMATS['transformers' if info.norm else 'mmdet'].reference(weights)


@torch.inference_mode()
def _compare(weights: Weights, reference: Reference, raw: StateDict) -> Dict[str, List[float]]:
    """Run the timm model with `weights` and the reference with `raw` on noise and on a smooth ramp."""
    size = weights.info.img_size
    noise = torch.randn(
        1, weights.info.in_chans, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ramp = torch.outer(*(torch.linspace(-n, n, pixels, dtype=torch.float64) for n, pixels in zip((2, 1), size)))
    images = torch.cat([noise, ramp.expand_as(noise)])
    ours = weights.create_model(pretrained=False, dtype=torch.float64, global_pool=None)  # the usual pooling
    ours.load_state_dict(weights.for_model())
    expected = _outputs(ours, [stage.blocks[-1] for stage in ours.stages], images)
    theirs = reference.model.double()
    theirs.load_state_dict(raw)
    as_it_ships = _outputs(theirs, reference.blocks, images)
    for norm in reference.norms:
        norm.eps = weights.embed_norm_eps
    exact = _outputs(theirs, reference.blocks, images)
    return {k: [_difference(v, got[k]) for got in (as_it_ships, exact)] for k, v in expected.items() if k in exact}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).nan_to_num(math.inf).item()


def _outputs(model: nn.Module, blocks: List[nn.Module], images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the tokens after every stage, and the logits if there is a head."""
    out: Dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, __, x, name=f'stage {n}': out.update({name: x[0] if isinstance(x, tuple) else x}))
        for n, block in enumerate(blocks, 1)]
    result = model.eval()(images)
    for hook in hooks:
        hook.remove()
    result = getattr(result, 'logits', result)
    if isinstance(result, torch.Tensor) and result.ndim == 2:
        out['logits'] = result
    return out


def _check_written(tensors: StateDict, folder: Path, to: str) -> None:
    """Read the written file back and compare it, for timm also with the model that `create_model` loads from it."""
    _check_equal(read_checkpoint(folder), tensors)
    if to == 'timm':
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
        # the model has one type, the file may have several
        _check_equal(loaded, {k: v.to(loaded[k].dtype) if k in loaded else v for k, v in tensors.items()})


def _check_equal(found: StateDict, meant: StateDict) -> None:
    """Raise an error unless names, types and bits of all tensors are the same."""
    wrong = set(found) ^ set(meant)
    for key in set(found) & set(meant):
        a, b = (x.detach().contiguous().view(torch.uint8) for x in (found[key], meant[key]))  # equal also for NaN
        if found[key].dtype != meant[key].dtype or not torch.equal(a, b):
            wrong.add(key)
    if wrong:
        raise ValueError(f'The file was not written correctly: {min(wrong)} changed.')
