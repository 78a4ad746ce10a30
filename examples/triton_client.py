"""Continue a text on a Triton Inference Server, which keeps the state; ARTIFACT is only read for its tokenizer.

rwkv-edge triton ARTIFACT -o models --name rwkv     # models: the server's --model-repository
python examples/triton_client.py localhost:8001 rwkv ARTIFACT "The sea is" 50     # needs tritonclient[grpc]
"""

import queue
import random
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from rwkv_edge import Sampler, SamplerConfig
from rwkv_edge.artifact import Artifact
from rwkv_edge.tokenizers import TextStream, load_tokenizer


class RemoteSequence:
    """One stream of tokens on the server."""

    def __init__(self, client: triton.InferenceServerClient, model: str) -> None:
        self._client, self._model = client, model
        self._shape = [1, 1] if client.get_model_config(model).config.max_batch_size else [1]
        self._id, self._started = random.randrange(1, 1 << 63), False
        self._answers: queue.Queue = queue.Queue()
        client.start_stream(lambda result, error: self._answers.put((result, error)))

    def feed(self, token: int, end: bool = False) -> np.ndarray:
        """Logits [V] after one more token; the server forgets the sequence after its end."""
        tokens = triton.InferInput("token", self._shape, "INT64")
        tokens.set_data_from_numpy(np.full(self._shape, token, np.int64))
        flags = {"sequence_id": self._id, "sequence_start": not self._started, "sequence_end": end}
        self._started = True
        self._client.async_stream_infer(self._model, [tokens], **flags)
        result, error = self._answers.get()
        if error is not None:
            raise error
        return np.asarray(result.as_numpy("logits")[0])


def main(url: str, model: str, artifact: str, prompt: str, count: str) -> None:
    """Print the continuation as it comes; the prompt too goes there token by token."""
    tokenizer = load_tokenizer(Path(artifact), Artifact.open(artifact).manifest.tokenizer or {})
    sampler, text = Sampler(SamplerConfig(temperature=0)), TextStream(tokenizer)
    with triton.InferenceServerClient(url) as client:
        sequence = RemoteSequence(client, model)
        for token in tokenizer.encode(prompt):
            logits = sequence.feed(token)
        for left in range(int(count), 0, -1):
            token = sampler.sample(logits)
            print(text.push(token), end="", flush=True)
            logits = sequence.feed(token, end=left == 1)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:6]) if len(sys.argv) == 6 else sys.exit(__doc__)
