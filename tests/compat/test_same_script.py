"""One program for the `rwkv` package, run under it and, with other imports, under rwkv-edge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v7, save_pth

VOCABULARY = 65536
MODELS = {
    "4": lambda: random_v4(Shape(2, 64, VOCABULARY)),
    "7": lambda: random_v7(Shape7(2, 64, VOCABULARY)),
}
OLD = "from rwkv.model import RWKV\nfrom rwkv.utils import PIPELINE, PIPELINE_ARGS\n"
NEW = "from rwkv_edge.compat import RWKV, PIPELINE, PIPELINE_ARGS\n"
PROGRAM = """
import copy, json, sys
import numpy as np
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
pipeline = PIPELINE(model, "rwkv_vocab_v20230424")
found = {"encoded": pipeline.encode("Grüße, 世界 12"), "refined": pipeline.refine_context("  a \\n\\n b　\\n")}
found["decoded"] = [pipeline.decode(x) for x in ([33, 34], [0], [33, 0], pipeline.encode("世界"), [228])]

pieces = []
args = PIPELINE_ARGS(temperature=0, top_p=0.5, top_k=100, alpha_frequency=0.5, alpha_presence=0.5, alpha_decay=0.99,
                     token_ban=[11, 12], token_stop=[0], chunk_len=3)
found["text"] = pipeline.generate("The sea is wide,", token_count=40, args=args, callback=pieces.append)
found["pieces"] = pieces
np.random.seed(5)
found["drawn"] = pipeline.generate("The sea", token_count=40, args=PIPELINE_ARGS(temperature=1.3, top_p=0.7, top_k=50))

out, state = model.forward([187, 510, 1563, 310, 247], None)
found["whole"] = out.detach().cpu().numpy().tolist()
out, state = model.forward([187, 510], None)
out, state = model.forward([1563], state)
fork = copy.deepcopy(state)
out, state = model.forward([310, 247], state)
found["pieces of it"] = out.detach().cpu().numpy().tolist()
out, fork = model.forward([310, 247], fork)
found["fork"] = out.detach().cpu().numpy().tolist()
found["tokens"] = [pipeline.sample_logits(out, temperature=0)]
for _ in range(20):
    out, state = model.forward([found["tokens"][-1]], state)
    found["tokens"].append(pipeline.sample_logits(out, temperature=1.0, top_p=0.0))
out, _ = model.forward([5, 6, 7], None, full_output=True)
found["all"] = out.float().numpy().tolist()
found["state"] = [x.float().numpy().tolist() for x in state]
json.dump(found, open(sys.argv[2], "w"))
"""


def ran(imports: str, version: str, folder: Path, name: str) -> Any:
    switches = {"RWKV_V7_ON": str(int(version == "7")), "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    environment = {**os.environ, **switches, "RWKV_EDGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", imports + PROGRAM, str(folder / "model"), str(folder / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name).read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("version", MODELS)
def test_the_same_program_gives_the_same(version: str, tmp_path: Path) -> None:
    pytest.importorskip("rwkv", reason="the rwkv package is not installed")
    weights = MODELS[version]()
    weights["head.weight"] = weights["head.weight"].clone()
    # Tokens of whole characters only, so that there is a text to compare.
    weights["head.weight"][128:300] = 0
    save_pth(weights, tmp_path / "model.pth")
    expected, found = ran(OLD, version, tmp_path, "old"), ran(NEW, version, tmp_path, "new")
    assert found.keys() == expected.keys()
    for name in ("whole", "pieces of it", "fork", "all"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
        del found[name], expected[name]
    for a, b in zip(found.pop("state"), expected.pop("state"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert len(expected["text"]) > 20
    assert len(expected["drawn"]) > 20
    assert found == expected
