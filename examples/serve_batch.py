"""Many texts in one batch: each line of standard input is a prompt, all of them are continued at the same time.

    rwkv-edge export MODEL.pth -o ARTIFACT --batch dynamic
    python examples/serve_batch.py ARTIFACT 4 30 < prompts.txt

Where our CUDA kernels run, an artifact of any batch serves: model.session is then a session of theirs.
A stream that has ended makes room for the next prompt; no stream notices who else is in the batch.
"""

import sys

from rwkv_edge import Sampler, SamplerConfig, StatePool, Stream, open_model
from rwkv_edge.tokenizers import TextStream


class Reply:
    """One prompt, its stream and what was drawn for it."""

    def __init__(self, number: int, prompt: str) -> None:
        self.number, self.prompt, self.text = number, prompt, ""
        self.sampler = Sampler(SamplerConfig(temperature=0.8, seed=number))


def main(artifact: str, capacity: str, length: str) -> None:
    """Continue all prompts, ``capacity`` of them at a time."""
    model = open_model(artifact)
    pool = StatePool(model.session, int(capacity))
    waiting = [Reply(i, line.rstrip("\n")) for i, line in enumerate(sys.stdin)]
    active: dict[Stream, tuple[Reply, TextStream, list[int]]] = {}
    steps = 0
    while waiting or active:
        while waiting and len(active) < pool.capacity:
            reply, stream = waiting.pop(0), pool.open()
            logits = pool.prefill(stream, model.prompt_tokens(reply.prompt))
            active[stream] = (reply, TextStream(model.tokenizer), [reply.sampler.sample(logits)])
        for stream, logits in pool.step({stream: drawn[-1] for stream, (_, _, drawn) in active.items()}).items():
            reply, text, drawn = active[stream]
            reply.text += text.push(drawn[-1])
            drawn.append(reply.sampler.sample(logits))
            if len(drawn) > int(length) or drawn[-1] in model.tokenizer.eos_ids:
                print(f"{reply.number}: {reply.prompt}{reply.text}")
                pool.close(stream)
                del active[stream]
        steps += 1
    print(f"{steps} steps", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4]) if len(sys.argv) == 4 else sys.exit(__doc__)
