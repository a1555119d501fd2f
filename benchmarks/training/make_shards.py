""" Write an image folder as WebDataset shards, with the index that timm's reader looks for.

    python benchmarks/training/make_shards.py FOLDER SHARDS [--images 1000]

writes SHARDS/<split>-0000.tar ... and SHARDS/_info.json. Train with
`--dataset wds/NAME --data-dir SHARDS --train-split train --val-split validation --aug-repeats 0`
(pip install webdataset). Use at least as many training shards as there are loader workers in all processes together.
Each process must get the same number of validation shards, and these must have equal sizes: timm adds up the scores of
all processes batch by batch, and stops if one of them has fewer batches.
"""
import argparse
import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path
from typing import Any, Dict

from timm.data.readers.reader_image_folder import find_images_and_targets


def write_shards(source: Path, target: Path, images: int = 1000, seed: int = 0) -> Dict[str, Any]:
    """Write the shards.

    Args:
        source: Folder with one folder per split, which has one folder per class.
        target: Folder to write to.
        images: Images per shard.
        seed: Seed of the order of images, which is random so that every shard has all classes.

    Returns:
        The content of _info.json.
    """
    splits = {}
    target.mkdir(parents=True, exist_ok=True)
    folders = sorted(f for f in source.iterdir() if f.is_dir())
    if not folders:
        raise ValueError(f'Expected a folder per split in {source}, found none')
    for folder in folders:
        samples, classes = find_images_and_targets(str(folder))
        if not samples or '' in classes:
            raise ValueError(f'Expected one folder of images per class in {folder}')
        random.Random(seed).shuffle(samples)
        names, lengths = [], []
        for start in range(0, len(samples), images):
            part = samples[start:start + images]
            names.append(f'{folder.name}-{len(names):04d}.tar')
            lengths.append(len(part))
            temporary = target / f'.{names[-1]}'
            with tarfile.open(temporary, 'w') as tar:
                for i, (path, label) in enumerate(part):
                    for suffix, content in ((Path(path).suffix.lower(), Path(path).read_bytes()),
                                            ('.cls', str(label).encode())):
                        member = tarfile.TarInfo(f'{start + i:08d}{suffix}')
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            os.replace(temporary, target / names[-1])
        splits[folder.name] = dict(
            name=folder.name, num_samples=len(samples), filenames=names, shard_lengths=lengths)
    info = dict(splits=splits)
    temporary = target / '._info.json'
    temporary.write_text(json.dumps(info, indent=1) + '\n')
    os.replace(temporary, target / '_info.json')
    return info


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='FOLDER', type=Path)
    parser.add_argument('target', metavar='SHARDS', type=Path)
    parser.add_argument('--images', type=int, default=1000, metavar='N', help='images per shard (default 1000)')
    args = parser.parse_args()
    try:
        info = write_shards(args.source, args.target, args.images)
    except (OSError, ValueError) as e:
        print(f'make_shards.py: error: {e}', file=sys.stderr)
        return 2
    for name, split in info['splits'].items():
        print(f'{name}: {split["num_samples"]} images in {len(split["filenames"])} shards')
    return 0


if __name__ == '__main__':
    sys.exit(main())
