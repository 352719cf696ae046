"""Training of the demo model: a PixelLLM of the `tabletop` preset on rendered table scenes, from nothing, on a CPU.

`python -m deixis_train.tabletop --data SCENES --out RUN` runs four stages, each of which resumes where it was stopped:

1. `features`: MobileSAM's frozen TinyViT over every picture, kept on the semantic grid;
2. `warmup`: the semantic encoder learns a dense objective of its own grid (what lies in each cell, and its box),
   because pointing learned through attention alone hardly starts;
3. `train`: prompt extractor, text model and location head learn captions with traces, region captions and referring
   expressions, on frozen features;
4. the checkpoint is written, ready for `deixis export`.

What differs from the paper's recipe is stated in the model card.
"""
