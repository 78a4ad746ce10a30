"""Steps, prompts, batches and draws of small models on the backend cuda, for compute-sanitizer.

Every buffer is an allocation of its own, so that an overrun is seen. All versions in fp16, RWKV-7 in int8 and int4 too.

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/plugins/sanitize_sessions.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/plugins/sanitize_sessions.py 7 7a w8
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig

SHAPE7 = Shape7(2, 192, 320, 32, 4, (16, 8, 8, 48))
MODELS: Mapping[str, Callable[[], dict[str, torch.Tensor]]] = {
    "4": lambda: random_v4(Shape(2, 128)),
    "5.0": lambda: random_v5(Shape(2, 128, head_size=32), "5.0"),
    "5.2": lambda: random_v5(Shape(2, 128, n_att=192), "5.2"),
    "6": lambda: random_v6(Shape(2, 72, head_size=8, ffn_mult=3, n_att=136, ranks=(8, 24))),
    "7": lambda: random_v7(SHAPE7),
    "7a": lambda: random_v7(Shape7(2, 72, head_size=8, ffn_mult=3, ranks=(8, 8, 8, 8)), deep_embed=24),
}
SCHEMES = {"w8": SchemeOptions("w8", embedding="int8"), "w4": SchemeOptions("w4", head="int4")}
SAMPLING = SamplerConfig(temperature=0.8, top_k=20, top_p=0.9, presence_penalty=0.4, frequency_penalty=0.4, seed=0)
BATCHES = (1, 3, 9)
PROMPT, DRAWS = 37, 3


def exercise(artifact: Path) -> None:
    """A prompt, steps and draws of several batches."""
    session = CudaSession(Artifact.open(artifact))
    draw = np.random.default_rng(0)
    for batch in BATCHES:
        state = session.initial_state(batch)
        tokens = draw.integers(0, session.spec.vocab_size, (batch, PROMPT))
        found = [session.prefill(tokens, state), session.score(tokens[:, :3], state)]
        found += [session.step(tokens[:, 0], state) for _ in range(2)]
        if not all(np.isfinite(one).all() for one in found):
            raise SystemExit(f"{artifact.name}: logits hold NaN or infinity")
        session.sample(tokens[:, 0], state, [Sampler(SAMPLING) for _ in range(batch)], DRAWS)
    session.close()


def artifact_of(name: str, folder: Path) -> Path:
    """A model in fp16, or RWKV-7 in a scheme; made once."""
    artifact = folder / name
    if artifact.exists():
        return artifact
    if name in SCHEMES:
        quantize_artifact(artifact_of("7", folder), artifact, QuantizeOptions(SCHEMES[name]))
    else:
        checkpoint = save_pth(MODELS[name](), folder / f"{name}.pth")
        options = ExportOptions(precision="fp16", chunks=(), batch=None, tokenizer="none")
        export_checkpoint(open_checkpoint(checkpoint), artifact, options)
    return artifact


def main() -> None:
    """The models named, or all, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or (*MODELS, *SCHEMES):
            exercise(artifact_of(name, Path(folder)))
            print(f"{name} done", flush=True)


if __name__ == "__main__":
    main()
