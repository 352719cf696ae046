"""Time and memory of a training step: `python -m deixis_train.training.step_cost --preset small`.

Random weights and made-up rows; what learns is what learns in the recipe `trace`. Prints one line of Markdown.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from deixis_train.losses.point import point_loss
from deixis_train.losses.text import text_loss
from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.point_head import to_pixels
from deixis_train.models.prompt_encoder import pixelllm_prompt
from deixis_train.training.optim import choose_trained

PARTS = ("semantic_encoder", "prompt_adapter", "visual_projection", "point_predictor")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deixis_train.training.step_cost", description=__doc__)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--pictures", type=int, default=2, help="pictures of a step, a row each")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one that is not")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PRESETS[options.preset]
    with device:
        model = PixelLLM(config)
    text = "lora" if config.bert is None and config.t5.enc_rank else "text"
    trained = choose_trained(model, [*PARTS, text])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    size, rows = config.image_size, options.pictures
    images = torch.rand(rows, size, size, 3, device=device) * 255
    valid_hw = torch.full((rows, 2), float(size), device=device)
    begin_id, end_id = config.begin_token_id, config.end_token_id
    first = max(begin_id, end_id) + 1  # of the words
    ids = torch.randint(first, config.text.vocab, (rows, options.length), device=device)
    ids = F.pad(ids, (1, 1), value=end_id)
    ids[:, 0] = begin_id
    words = ids >= first
    context = ids[:, 1:9]
    whole = F.pad(valid_hw, (2, 0))
    index = torch.arange(rows, device=device)
    points = torch.rand(rows, ids.shape[1], 2, 2, device=device) * size

    def step() -> tuple[float, float]:
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            with torch.no_grad():
                sam, _ = model.encode_sam(images, valid_hw)
            features = torch.cat([model.encode_semantic(images, valid_hw), sam], dim=-1)
            visual = model.extract_prompt(features, index, *pixelllm_prompt(whole))
            logits, states = model.text.decode(ids, *model.text.encode(visual, context))
            located = to_pixels(model.locate(states.float()), valid_hw)
        assert logits is not None
        loss = text_loss(logits, ids, end_id=end_id) + 0.1 * point_loss(located, points, words, words)
        loss.item()
        between = time.perf_counter()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return between - begun, time.perf_counter() - between

    step()
    times = [step() for _ in range(options.steps)]
    forward, backward = (min(values) for values in zip(*times, strict=True))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learning = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in model.parameters())
    precision = "bf16" if options.bf16 else "fp32"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"| {options.preset} | {total / 1e6:.0f} M | {learning / 1e6:.0f} M | {rows} x {options.length} | "
        f"{precision} | {forward:.2f} s | {backward:.2f} s | {peak / 2**30:.1f} GiB | {where} |"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
