"""Draw the feature pyramid of photo.jpg, as `pvt-timm features` draws it. The result is the picture of the README.

    python benchmarks/demos/photo_pyramid.py

Writes .github/pyramid_photo.png. The weights are those of `test_pvt.digits`, which come with the package, so nothing is
downloaded. They were trained on handwritten digits only, and the picture says so.
"""
import argparse
import tempfile
from pathlib import Path

from PIL import Image

from pvt_timm.cli.pictures import draw_pyramid
from pvt_timm.cli.predict import extract, load_model, open_image
from pvt_timm.files import save_atomically

HERE = Path(__file__).resolve().parent
PHOTO = HERE / 'photo.jpg'
SIZE = (832, 1248)  # height and width of the model's input: the shape of the photograph, in multiples of 32 pixels
WIDTH = 1100  # of the picture, in pixels
NOTE = ('Photograph: Rachel Michetti, CC0. The weights were trained on handwritten digits of 32 × 32 pixels, '
        'never on photographs.')


def draw(output: Path) -> None:
    """Write the picture as PNG."""
    backbone = load_model('test_pvt', dense=True)
    photo = open_image(PHOTO)
    features, size = extract(backbone, photo, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / 'pyramid.png'
        draw_pyramid(photo, features, size, full, f'Features of {backbone.name}', note=NOTE)
        with Image.open(full) as picture:
            height = round(picture.height * WIDTH / picture.width)
            small = picture.convert('RGB').resize((WIDTH, height), Image.Resampling.HAMMING)
    save_atomically(output, lambda f: small.save(f, format='png', optimize=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=HERE.parents[1] / '.github' / 'pyramid_photo.png')
    args = parser.parse_args()
    draw(args.output)
    print(args.output)


if __name__ == '__main__':
    main()
