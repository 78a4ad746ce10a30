"""State tuning: a trained initial state, a few hundred kB, gives a model a task without touching its weights.

    python examples/tuned_state.py MODEL.pth STATE.pth ARTIFACT "The sea is"

STATE.pth holds blocks.N.att.time_state, as RWKV-PEFT writes it. Exported with it, the artifact begins every stream
there: no prompt is read for it. The same text is then continued from zeros too, to see what the state does.
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
)


def main(checkpoint: str, tuned: str, artifact: str, prompt: str) -> None:
    """Export with the state, and continue a text from it and from zeros."""
    export_checkpoint(open_checkpoint(checkpoint), artifact, ExportOptions(state=Path(tuned)))
    model = open_model(artifact)
    print(f"every stream begins with the state {model.session.initial_hash[:12]}")

    begin = model.session.export_state(model.session.initial_state())
    zeros = {name: array * 0 for name, array in begin.items()}  # of RWKV-5 to 7
    for name, arrays in (("tuned", begin), ("zeros", zeros)):
        state = model.session.import_state(arrays)
        greedy = Sampler(SamplerConfig(temperature=0))
        pieces = generate_text(model.session, model.tokenizer, prompt, sampler=greedy, state=state, max_tokens=40)
        print(f"{name}: {prompt}{''.join(pieces)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:5]) if len(sys.argv) == 5 else sys.exit(__doc__)
