"""A stream that never ends: bytes come in one by one, and the model says how much each surprises it.

    some-sensor | python examples/sensor_loop.py ARTIFACT sensor.state

A prediction costs the same after a million bytes as after ten. The state is kept every so often; a restart, even after
a loss of power, goes on from there with nothing read again. For a model of bytes, such as rwkv-edge's demo.
"""

import sys
from pathlib import Path

import numpy as np

from rwkv_edge import History, load_snapshot, open_session, save_snapshot

KEEP_EVERY = 64  # bytes
SURPRISE = 12.0  # bits


def main(artifact: str, snapshot: str) -> None:
    """Read standard input to its end."""
    session, path = open_session(artifact), Path(snapshot)
    if path.exists():
        kept = load_snapshot(path, session)  # refuses the state of another model, and a damaged file
        state, history = session.import_state(kept.arrays), kept.streams[0]
        logits = kept.extra["logits"]
    else:
        state, history = session.initial_state(), History()
        logits = np.zeros(session.spec.vocab_size, np.float32)
    print(f"going on after {history.tokens} bytes")

    while value := sys.stdin.buffer.read(1):
        token = value[0]
        peak = logits.max()
        bits = float(peak + np.log(np.exp(logits - peak).sum()) - logits[token]) / np.log(2)
        if bits > SURPRISE:
            print(f"byte {history.tokens}: {value!r} was not expected, {bits:.1f} bits")
        logits = session.step([token], state)[0]
        history = history.after([token])
        if history.tokens % KEEP_EVERY == 0:
            save_snapshot(path, session, state, [history], extra={"logits": logits})
    save_snapshot(path, session, state, [history], extra={"logits": logits})
    print(f"kept after {history.tokens} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
