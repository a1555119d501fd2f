"""Train RetinaNet or Mask R-CNN on PVT with generated shapes, and measure AP with pycocotools.

    python benchmarks/demos/shapes_detection.py
    python benchmarks/demos/shapes_detection.py --detector mask_rcnn --steps 800
"""
from pathlib import Path

import torch
from torchvision.ops import nms

from pvt_timm.detection import pvt_mask_rcnn, pvt_retinanet
from shapes import CLASSES, COLORS, coco_annotations, coco_results, coco_scores
from shapes_training import draw_curve, parser, save_figure, train, write

SIZE = 128


def build(detector: str, model: str, pretrained: bool):
    """The detector, with narrow pyramid and heads."""
    settings = dict(
        pretrained_backbone=pretrained, out_channels=64, model_args=dict(img_size=SIZE), min_size=SIZE,
        max_size=SIZE * 2)
    if detector == 'mask_rcnn':
        return pvt_mask_rcnn(
            model, len(CLASSES), box_channels=256, mask_channels=64,
            rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
            rpn_post_nms_top_n_test=50, rpn_batch_size_per_image=64, box_batch_size_per_image=32,
            box_detections_per_img=20, **settings)
    retinanet = pvt_retinanet(model, len(CLASSES), **settings)
    # torchvision's initialisation is for 256 channels, of 64 it would leave next to nothing after four layers
    for branch in (retinanet.head.classification_head, retinanet.head.regression_head):
        for layer in branch.conv.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
    return retinanet


def target_of(sample, first_label: int, masks: bool):
    target = dict(
        boxes=torch.from_numpy(sample.boxes), labels=torch.from_numpy(sample.labels) + first_label)
    if masks:
        target['masks'] = torch.from_numpy(sample.masks).byte()
    return target


@torch.no_grad()
def detect(model, samples, batch_size: int = 16):
    model.eval()
    out = []
    for i in range(0, len(samples), batch_size):
        out += model([s.tensor() for s in samples[i:i + batch_size]])
    return out


def scores_of(model, samples, first_label: int, kinds):
    """AP50 and AP per kind."""
    results = coco_results(
        detect(model, samples), list(range(1, len(samples) + 1)),
        {i + first_label: i + 1 for i in range(len(CLASSES))})
    scores = {}
    for kind, name in kinds.items():
        found = coco_scores(coco_annotations(samples), results, kind)
        scores.update({f'{name} AP50': found['AP50'], f'{name} AP': found['AP']})
    return scores


def best_of(found, min_score: float):
    """Detections to draw: detectors keep one per object and class, of which a picture shows the best."""
    keep = nms(found['boxes'], found['scores'], 0.5)
    keep = keep[found['scores'][keep] >= min_score]
    return {k: v[keep] for k, v in found.items()}


def draw_boxes(samples, found, first_label: int, path: Path, title: str, min_score: float = 0.4) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    fig, axes = plt.subplots(2, 4, figsize=(11, 6.1), constrained_layout=True)
    for ax, sample, got in zip(axes.flat, samples, found):
        image = sample.image.astype(float) / 255
        got = best_of(got, min_score)
        labels = [int(x) - first_label for x in got['labels']]
        if 'masks' in got:
            for mask, label in zip(got['masks'], labels):
                on = mask[0].numpy() > 0.5
                image[on] = 0.45 * image[on] + 0.55 * torch.tensor(to_rgb(COLORS[label])).numpy()
        ax.imshow(image, interpolation='nearest')
        for x1, y1, x2, y2 in sample.boxes:
            ax.add_patch(Rectangle((x1 - .5, y1 - .5), x2 - x1, y2 - y1, fill=False, ec='white', lw=1, ls=':'))
        for (x1, y1, x2, y2), score, label in zip(got['boxes'].tolist(), got['scores'].tolist(), labels):
            ax.add_patch(Rectangle((x1 - .5, y1 - .5), x2 - x1, y2 - y1, fill=False, ec=COLORS[label], lw=1.8))
            above = y1 > 8
            ax.text(x1, y1 - 1 if above else y1 + 1, f'{CLASSES[label]} {score:.2f}', fontsize=7, color='white',
                    va='bottom' if above else 'top',
                    bbox=dict(facecolor=COLORS[label], edgecolor='none', pad=1), clip_on=True)
        ax.set_axis_off()
    handles = [Line2D([], [], color=c, lw=2, label=f'{n}, detected') for n, c in zip(CLASSES, COLORS)]
    handles.append(Line2D([], [], color='#888888', lw=1, ls=':', label='annotated'))
    fig.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
    fig.suptitle(title, fontsize=11)
    save_figure(fig, path)


def main() -> None:
    options = parser(__doc__, steps=1200, batch_size=8, lr=2e-3, eval_every=150)
    options.add_argument('--detector', choices=('retinanet', 'mask_rcnn'), default='retinanet')
    args = options.parse_args()

    torch.manual_seed(args.seed)
    model = build(args.detector, args.model, args.pretrained)
    first_label = model.first_label
    masks = args.detector == 'mask_rcnn'
    kinds = {'bbox': 'box', 'segm': 'mask'} if masks else {'bbox': 'box'}

    def loss_of(samples, flip):
        images = [s.tensor() for s in samples]
        targets = [target_of(s, first_label, masks) for s in samples]
        if flip:
            images = [x.flip(2) for x in images]
            for x, t in zip(images, targets):
                x1, y1, x2, y2 = t['boxes'].unbind(1)
                t['boxes'] = torch.stack([x.shape[2] - x2, y1, x.shape[2] - x1, y2], dim=1)
                if masks:
                    t['masks'] = t['masks'].flip(2)
        return sum(model(images, targets).values())

    run = train(model, args, (112, 144), loss_of, lambda samples: scores_of(model, samples, first_label, kinds))
    name = f'shapes_{args.detector}'
    write(name, args, model, run)
    label = {'retinanet': 'RetinaNet', 'mask_rcnn': 'Mask R-CNN'}[args.detector]
    lines = {}
    for kind, style in zip(kinds.values(), (dict(marker='o'), dict(marker='s', mfc='white'))):
        lines[f'{kind} AP50'] = dict(color='#2f7fd3', **style)
        lines[f'{kind} AP'] = dict(color='#e6553a', **style)
    draw_curve(
        run['history'], lines, 0.7, 'held-out images', args.output / f'{name}_curve.png',
        f'{label} on {args.model}, {args.images} generated images, {run["cpu_seconds"] / 60:.1f} CPU minutes')
    some = run['held_out'][:8]
    draw_boxes(some, detect(model, some), first_label, args.output / f'{name}.png',
               f"{label} on {args.model}: held-out images, box AP50 {run['history']['held_out'][-1]['box AP50']:.2f}")


if __name__ == '__main__':
    main()
