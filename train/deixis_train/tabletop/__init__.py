"""Training of the demo model: a PixelLLM of the `tabletop` preset on rendered table scenes, from nothing, on a CPU.

`python -m deixis_train.tabletop --data SCENES --out RUN --mobile-sam FILE` runs four stages, each of which resumes
where it was stopped (`--stage` runs one, by the names below):

1. `pictures`, `sam`: small pictures and owners of cells, and the features of MobileSAM's frozen TinyViT on the semantic
   grid, both kept on disk;
2. `warmup`: the semantic encoder learns a dense objective of its own grid (what lies in each cell, and its box),
   because pointing learned through attention alone hardly starts;
3. `train`: the prompt extractor learns the same objective on its image tokens; then extractor, text model and location
   head learn captions with traces, region captions and referring expressions, on frozen features;
4. `checkpoint`: it is written, ready for `deixis export`.

What differs from the paper's recipe is stated in the model card.
"""
