"""From a checkpoint to text: export it, compare it with eager torch, and generate.

    python examples/export_and_run.py RWKV-x070-World-0.1B.pth ARTIFACT "The sea is"

The artifact is a folder; on a device, only the last third of this program runs, without torch.
"""

import sys
from pathlib import Path

from rwkv_edge import (
    ExportOptions,
    Sampler,
    SamplerConfig,
    export_checkpoint,
    generate_text,
    open_checkpoint,
    open_model,
    verify_artifact,
)


def main(checkpoint: str, artifact: str, prompt: str) -> None:
    """Export, verify, generate."""
    manifest = export_checkpoint(open_checkpoint(checkpoint), artifact, ExportOptions(precision="fp32"))
    print(f"RWKV-{manifest.spec.version}, {manifest.spec.n_layer} layers x {manifest.spec.n_embd}")

    report = verify_artifact(Path(artifact), Path(checkpoint), length=32)
    print(report.to_text())
    if not report.passed:
        sys.exit(1)

    model = open_model(artifact)
    sampler = Sampler(SamplerConfig(temperature=0.8, top_p=0.9, seed=1))
    pieces = generate_text(model.session, model.tokenizer, prompt, sampler=sampler, max_tokens=50)
    print(prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print(f"\n{pieces.tokens_per_second:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:4]) if len(sys.argv) == 4 else sys.exit(__doc__)
