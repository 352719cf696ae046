"""transformers `generate`, greedy, with its own cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from deixis_bench.rivals.contract import Answer, Loaded, Spec, Stopwatch


def load(spec: Spec) -> Loaded:
    torch.set_num_threads(spec.threads)
    transformers.logging.set_verbosity_error()
    kind = transformers.T5ForConditionalGeneration if spec.part == "text" else transformers.LlamaForCausalLM
    model: Any = kind.from_pretrained(spec.folder, dtype=torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    return Loaded(
        transformers.__version__, lambda: generate(model.eval(), spec), f"torch {torch.__version__}, generate"
    )


class _FromFirst:
    """A streamer that starts the watch at the first id that is generated."""

    def __init__(self, watch: Stopwatch, skip: int) -> None:
        self._watch, self._skip = watch, skip

    def put(self, _ids: torch.Tensor) -> None:
        if self._skip:  # the prompt, or the decoder's start id
            self._skip -= 1
        elif not self._watch.running:
            self._watch.start()

    def end(self) -> None:
        self._watch.stop()


@torch.no_grad()
def generate(model: Any, spec: Spec) -> Answer:
    """Run a model that has `generate`. Its end id is not looked for, so that nothing but greedy search is timed."""
    prompt, watch = torch.tensor([spec.prompt]), Stopwatch()
    config = transformers.GenerationConfig(
        max_new_tokens=spec.new_tokens + 1,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=_FromFirst(watch, 1)
    )
    return Answer(watch, ids[0, -(spec.new_tokens + 1) :].tolist())
