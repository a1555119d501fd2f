"""Train torchvision's RetinaNet or Mask R-CNN on PVT features with generated shapes, and measure AP with pycocotools.

    python benchmarks/shapes_detection.py
    python benchmarks/shapes_detection.py --detector mask_rcnn
"""
import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from pvt_timm.detection import check_detection_inputs, pvt_fpn_backbone, pvt_retinanet
from shapes import CLASSES, COLORS, coco_annotations, coco_results, coco_scores, make_samples

SIZE = 128


def build(detector: str, model: str):
    """The detector, and the label of the first class."""
    if detector == 'retinanet':
        retinanet = pvt_retinanet(
            model, len(CLASSES), out_channels=64, model_args=dict(img_size=SIZE), min_size=SIZE, max_size=SIZE * 2)
        # torchvision's initialisation is for 256 channels, of 64 it would leave next to nothing after four layers
        for branch in (retinanet.head.classification_head, retinanet.head.regression_head):
            for layer in branch.conv.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight)
        return retinanet, 0
    backbone = pvt_fpn_backbone(model, out_channels=64, img_size=SIZE)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,), (96,), (128,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
    # label 0 is the background in torchvision's two-stage detectors
    return MaskRCNN(
        backbone, len(CLASSES) + 1, min_size=SIZE, max_size=SIZE * 2, rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50, rpn_batch_size_per_image=64, box_batch_size_per_image=32,
        box_detections_per_img=20), 1


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
    found = detect(model, samples)
    results = coco_results(
        found, list(range(1, len(samples) + 1)), {i + first_label: i + 1 for i in range(len(CLASSES))})
    return {kind: coco_scores(coco_annotations(samples), results, kind) for kind in kinds}, found


def draw_curve(history, path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    losses = history['loss']
    left.plot(range(1, len(losses) + 1), losses, color='#bbbbbb', lw=0.8, label='per step')
    width = max(len(losses) // 40, 1)
    smooth = [sum(losses[max(0, i - width):i + 1]) / len(losses[max(0, i - width):i + 1]) for i in range(len(losses))]
    left.plot(range(1, len(losses) + 1), smooth, color='#333333', lw=1.6, label=f'mean of {width + 1}')
    left.set(xlabel='step', ylabel='training loss', ylim=(0, sorted(losses)[int(0.99 * len(losses))] * 1.05))
    left.legend(frameon=False)
    steps = [row['step'] for row in history['held_out']]
    for (kind, name), style in zip(history['lines'].items(), ('-o', '-s')):
        right.plot(steps, [row[kind]['AP50'] for row in history['held_out']], style, color='#2f7fd3', ms=4,
                   mfc='white' if kind == 'segm' else None, label=f'{name} AP50')
        right.plot(steps, [row[kind]['AP'] for row in history['held_out']], style, color='#e6553a', ms=4,
                   mfc='white' if kind == 'segm' else None, label=f'{name} AP')
    right.axhline(0.7, color='#999999', lw=0.8, ls='--')
    right.annotate('0.7', (steps[0], 0.7), textcoords='offset points', xytext=(2, 3), color='#777777', fontsize=8)
    right.set(xlabel='step', ylabel='held-out images', ylim=(0, 1))
    right.legend(frameon=False, loc='lower right')
    for ax in (left, right):
        ax.spines[['top', 'right']].set_visible(False)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)


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
        good = got['scores'] >= min_score
        labels = [int(x) - first_label for x in got['labels'][good]]
        if 'masks' in got:
            for mask, label in zip(got['masks'][good], labels):
                on = mask[0].numpy() > 0.5
                image[on] = 0.45 * image[on] + 0.55 * torch.tensor(to_rgb(COLORS[label])).numpy()
        ax.imshow(image, interpolation='nearest')
        for x1, y1, x2, y2 in sample.boxes:
            ax.add_patch(Rectangle((x1 - .5, y1 - .5), x2 - x1, y2 - y1, fill=False, ec='white', lw=1, ls=':'))
        for (x1, y1, x2, y2), score, label in zip(got['boxes'][good].tolist(), got['scores'][good].tolist(), labels):
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
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--detector', choices=('retinanet', 'mask_rcnn'), default='retinanet')
    parser.add_argument('--model', default='test_pvt', help='timm name of the backbone')
    parser.add_argument('--steps', type=int, default=1500)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--images', type=int, default=2000, help='training images')
    parser.add_argument('--held-out', type=int, default=120)
    parser.add_argument('--eval-every', type=int, default=150)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    train = make_samples(args.images, seed=args.seed + 1, low=112, high=144)
    held_out = make_samples(args.held_out, seed=args.seed + 2, low=112, high=144)
    model, first_label = build(args.detector, args.model)
    masks = args.detector == 'mask_rcnn'
    kinds = {'bbox': 'box', 'segm': 'mask'} if masks else {'bbox': 'box'}
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=decay), dict(params=rest, weight_decay=0.)], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

    start, start_cpu = time.perf_counter(), time.process_time()
    history = dict(loss=[], held_out=[], lines=kinds)
    for step in range(1, args.steps + 1):
        model.train()
        batch = random.sample(train, args.batch_size)
        images = [s.tensor() for s in batch]
        targets = [target_of(s, first_label, masks) for s in batch]
        if random.random() < 0.5:
            images = [x.flip(2) for x in images]
            for x, t in zip(images, targets):
                x1, y1, x2, y2 = t['boxes'].unbind(1)
                t['boxes'] = torch.stack([x.shape[2] - x2, y1, x.shape[2] - x1, y2], dim=1)
                if masks:
                    t['masks'] = t['masks'].flip(2)
        check_detection_inputs(images, targets, len(CLASSES) + first_label, first_label)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history['loss'].append(round(loss.item(), 4))
        if step % 25 == 0:
            print(f'step {step}  loss {sum(history["loss"][-25:]) / 25:.3f}', flush=True)
        if step % args.eval_every == 0 or step == args.steps:
            scores, found = scores_of(model, held_out, first_label, kinds)
            history['held_out'].append(dict(step=step, seconds=round(time.perf_counter() - start, 1), **scores))
            print(f'step {step}  held out:  ' + '  '.join(
                f"{kinds[k]} AP50 {v['AP50']:.3f} AP {v['AP']:.3f}" for k, v in scores.items())
                + f'  {time.perf_counter() - start:.0f} s, {time.process_time() - start_cpu:.0f} s of CPU', flush=True)

    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    args.output.mkdir(parents=True, exist_ok=True)
    name = f'shapes_{args.detector}'
    final = history['held_out'][-1]
    label = {'retinanet': 'RetinaNet', 'mask_rcnn': 'Mask R-CNN'}[args.detector]
    title = f'{label} on {args.model}, {args.images} generated images, {cpu_seconds / 60:.1f} CPU minutes'
    draw_curve(history, args.output / f'{name}_curve.png', title)
    draw_boxes(held_out[:8], found[:8], first_label, args.output / f'{name}.png',
               f"{label} on {args.model}: held-out images, box AP50 {final['bbox']['AP50']:.2f}")
    config = {k: v for k, v in vars(args).items() if k != 'output'}
    result = dict(
        config=config, seconds=round(seconds, 1), cpu_seconds=round(cpu_seconds, 1),
        threads=torch.get_num_threads(), load=os.getloadavg()[0],
        torch=torch.__version__, parameters=sum(p.numel() for p in model.parameters()), final=final, history=history)
    path = args.output / f'{name}.json'
    path.with_suffix('.tmp').write_text(json.dumps(result, indent=1))
    os.replace(path.with_suffix('.tmp'), path)


if __name__ == '__main__':
    main()
