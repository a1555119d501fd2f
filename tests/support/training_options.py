""" Options of `pvt-timm detector fit` and `segmenter fit` for runs that take only seconds. """

# What makes `test_pvt` and its heads small
SMALL = ('--model', 'test_pvt', '--model-args', 'img_size=64', '--out-channels', '16', '--workers', '0',
         '--accelerator', 'cpu', '--warmup-steps', '2')
DETECTOR = ('--config', 'finetune_detector', *SMALL, '--min-size', '64', '--max-size', '128', '--lr', '2e-3')
MASKS = ('--kind', 'mask_rcnn', '--head-args', 'box_channels=32', 'mask_channels=16', 'rpn_post_nms_top_n_test=20',
         'box_batch_size_per_image=16', 'box_detections_per_img=20', 'box_score_thresh=0.01')
SEGMENTER = ('--config', 'finetune_segmenter', *SMALL, '--min-size', '64', '--max-size', '128', '--crop', '64',
             '--scale', '128', '64', '--head-args', 'channels=16', '--lr', '2e-3',
             '--classes', 'background', 'disc', 'box', 'triangle',
             '--train-images', 'train', '--train-labels', 'train_labels',
             '--val-images', 'val', '--val-labels', 'val_labels')
