"""The whole of `rwkv-edge verify`: open both sides, choose the tokens, compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints.adapters import open_merged
from rwkv_edge.evaluation.parity import SAMPLE_TEXT, ParityReport, compare_with_reference, tokens_for_streams
from rwkv_edge.models.torch_ops import TorchModel
from rwkv_edge.models.versions import model_from_checkpoint
from rwkv_edge.runtime.session import open_session
from rwkv_edge.tokenizers import load_tokenizer

DYNAMIC_STREAMS = 2  # how many streams a graph with a dynamic batch is compared with
TOKEN_SEED = 7


def verify_artifact(
    artifact_path: Path,
    checkpoint_path: Path,
    length: int = 64,
    text: str | None = None,
    tolerance: float | None = None,
    providers: Sequence[str] | None = None,
    threads: int = 0,
    lora: Path | None = None,
    lora_alpha: float | None = None,
    backend: str = "auto",
) -> ParityReport:
    """Compare an artifact with the checkpoint that it came from.

    Args:
        artifact_path: the folder.
        checkpoint_path: the weights, run by eager torch in float32.
        length: tokens per stream.
        text: what to feed, repeated to ``length``; a sample where None, random tokens where there is no tokenizer.
        tolerance: relative bound; where None by precision, and of a quantized artifact by the mean KL divergence.
        providers: of ONNX Runtime.
        threads: of ONNX Runtime.
        lora: the adapter that was merged at export.
        lora_alpha: its alpha.
        backend: that runs the artifact.

    Raises:
        RwkvEdgeError: either side cannot be opened, or they are different models.
    """
    artifact = Artifact.open(artifact_path)
    reference = TorchModel(model_from_checkpoint(open_merged(checkpoint_path, lora, lora_alpha)))
    session = open_session(artifact_path, backend, providers=providers, threads=threads)
    try:
        spec = artifact.manifest.spec
        if artifact.manifest.tokenizer is None:
            ids = [int(t) for t in np.random.default_rng(TOKEN_SEED).integers(0, spec.vocab_size, length)]
        else:
            ids = load_tokenizer(artifact_path, artifact.manifest.tokenizer).encode(
                text if text is not None else SAMPLE_TEXT
            )
        tokens = tokens_for_streams(ids, spec.batch or DYNAMIC_STREAMS, length, spec.vocab_size)
        quantized = artifact.manifest.quantization is not None
        return compare_with_reference(session, reference, tokens, tolerance, quantized)
    finally:
        session.close()
