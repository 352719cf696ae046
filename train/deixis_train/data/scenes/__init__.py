"""Rendered table scenes with ground truth: pictures, masks, captions with a box per word, referring expressions and
region captions, all from one seed. ``python -m deixis_train.data.scenes --help`` makes a data set."""
