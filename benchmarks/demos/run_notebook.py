"""Run the code cells of a notebook from top to bottom, without Jupyter, and keep its pictures.

    python benchmarks/demos/run_notebook.py

Runs pvt_timm.ipynb and writes its pictures into it. Printed text is shown here and is not kept in the notebook, as it
differs a little from machine to machine.
"""
import argparse
import base64
import io
import json
import os
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

import matplotlib
from PIL import Image

from pvt_timm.files import save_atomically

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

NOTEBOOK = Path(__file__).resolve().parent / 'pvt_timm.ipynb'
DPI = 80  # of the pictures


def code_cells(notebook: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the code cells of a notebook that was read from JSON, in their order."""
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def run_cells(notebook: Dict[str, Any]) -> Dict[str, Any]:
    """Run the code cells in the current folder, and put the figures that a cell shows into its outputs.

    Returns:
        The names that the cells have defined.
    """
    names: Dict[str, Any] = {'__name__': '__main__'}
    for number, cell in enumerate(code_cells(notebook), start=1):
        pictures = _run(''.join(cell['source']), f'code cell {number}', names)
        cell['outputs'] = [_output(picture) for picture in pictures]
    return names


def _run(source: str, title: str, names: Dict[str, Any]) -> List[bytes]:
    """Run one cell and return the pictures that it shows. Tracebacks name the cell `title`."""
    pictures: List[bytes] = []
    with mock.patch.object(plt, 'show', lambda: pictures.extend(_take_figures())):
        exec(compile(source, title, 'exec'), names)
    return pictures


def _take_figures() -> List[bytes]:
    """Return the open figures as PNG with 256 colours, and close them."""
    pictures = []
    for number in plt.get_fignums():
        full, reduced = io.BytesIO(), io.BytesIO()
        plt.figure(number).savefig(full, dpi=DPI, format='png')
        with Image.open(full) as image:
            image.convert('RGB').quantize(256).save(reduced, format='png', optimize=True)
        pictures.append(reduced.getvalue())
        plt.close(number)
    return pictures


def _output(picture: bytes) -> Dict[str, Any]:
    """Return a picture as an output of a cell, in the notebook's format."""
    data = {'image/png': base64.b64encode(picture).decode()}
    return {'data': data, 'metadata': {}, 'output_type': 'display_data'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    os.chdir(NOTEBOOK.parent)
    run_cells(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'
    save_atomically(NOTEBOOK, lambda f: f.write(text.encode()))


if __name__ == '__main__':
    main()
