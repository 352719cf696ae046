"""The field's metrics (section 15) and the runs that collect what they are computed from.

boxes, masks, trace, captions, dense_captions, things: metrics on arrays and texts. tasks: one class per task, which
asks a predictor and judges its answers. torch_predictor: answers of the PyTorch model; only it imports torch.
"""
