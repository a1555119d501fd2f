""" Convert PVT v1 checkpoints to timm and back. """
