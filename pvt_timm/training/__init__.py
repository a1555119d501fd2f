""" Train detectors and segmenters on the user's data, and measure them as published. Needs the `train` extra.

    settings.py      the settings of a run: a YAML file or a recipe, and options that replace some of them
    coco.py          data sets with annotations in COCO's format
    label_maps.py    data sets with label maps (images that hold a class per pixel), as in ADE20K
    transforms.py    transforms of images in training
    data.py          batches of both kinds of data sets, which do not depend on the number of processes
    metrics.py       COCO's twelve figures, and the mean of IoU
    modules.py       losses, optimizer and schedule, for Lightning
    callbacks.py     checkpoints, history and curve
    checkpoints.py   load the model of any checkpoint, or start a model from another. Does not need the extra
    published.py     the published figures. Does not need the extra
    run.py           `fit` and `validate`
"""
from .checkpoints import load_trained

__all__ = ['load_trained']
