"""The golden vectors through exported graphs and the runtime's search."""

from __future__ import annotations

import golden_copies

from deixis_export.parity.__main__ import compare

GOLDEN = golden_copies.GOLDEN / "pixelllm"

# What the graphs and the runtime emit: at least so many arrays of each file.
LEAST = {
    "sam.npz": 1,
    "features.npz": 1,
    "t5.npz": 5,
    "bert_text.npz": 4,
    "decode_table.npz": 10,
    "e2e_caption_beam3.npz": 9,
    "e2e_caption_beam3_ctx.npz": 9,
    "e2e_caption_beam4_pnb2.npz": 9,
    "e2e_caption_greedy.npz": 9,
    "e2e_caption_greedy_ctx.npz": 9,
    "e2e_pointprompt_greedy.npz": 9,
    "e2e_loca_greedy.npz": 5,
    "e2e_referring.npz": 5,
    "e2e_trace_teacher_forced.npz": 3,
    "box_decoder.npz": 27,
    "e2e_densecap_greedy.npz": 11,
    "e2e_densecap_greedy_mult.npz": 11,
    "e2e_densecap_beam_mult.npz": 8,
}


def test_golden_vectors_through_the_graphs() -> None:
    lines: list[str] = []
    report = compare(GOLDEN, "onnx", emit=lines.append)
    assert not report.failed, "\n".join(map(str, report.failed))
    found = {name: sum(line.file == name for line in report.compared) for name in LEAST}
    assert all(found[name] >= least for name, least in LEAST.items()), found
    assert not [line for line in report.lines if line.status == "absent"]
    assert max(line.error or 0.0 for line in report.compared) < 1e-4
    inside = {(line.file, line.name) for line in report.lines if line.status == "torch-only"}
    assert ("eva02.npz", "after_block0") in inside and ("t5.npz", "logits") in inside
