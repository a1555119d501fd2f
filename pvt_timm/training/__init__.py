""" Detectors and segmenters trained on one's own data, and measured as published. Needs the `train` extra.

    settings.py      what a run is: a YAML file or a recipe, and the options that replace parts of it
    coco.py          data sets with annotations as COCO has them
    label_maps.py    data sets with a class per pixel, as ADE20K has them
    transforms.py    what is done to an image in training
    data.py          batches of either, the same ones whatever the number of processes
    metrics.py       COCO's twelve figures, and the mean of IoU
    modules.py       losses, optimizer and schedule, for Lightning
    callbacks.py     checkpoints, history and curve
    checkpoints.py   the model in any checkpoint, and models as a start for others. Does not need the extra
    published.py     the published figures. Does not need the extra
    run.py           `fit` and `validate`
"""
from .checkpoints import load_trained

__all__ = ['load_trained']
