"""The cache of prompts: the same bits as without it, within its size, whatever happens to its files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE, refusal, write_artifact

from rwkv_edge.cli import run
from rwkv_edge.errors import InputError, StateError
from rwkv_edge.runtime.cache import PromptCache, cache_entries, clear_cache
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import chunk_plan, open_session
from rwkv_edge.runtime.snapshot import read_snapshot

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 256, 700)]


def opened(folder: Path) -> OrtSession:
    session = open_session(folder, threads=1)
    assert isinstance(session, OrtSession)
    return session


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'one' and 'other' with chunks of 16 and 64, 'short' with chunks of 16, 'half' in fp16, 'tuned'."""
    folder = tmp_path_factory.mktemp("artifacts")
    chunks = ("--chunk", "16", "--chunk", "64")
    write_artifact(folder / "one", 0, *chunks)
    write_artifact(folder / "other", 1, *chunks)
    write_artifact(folder / "short", 0, "--chunk", "16")
    write_artifact(folder / "half", 0, *chunks, "--precision", "fp16")
    heads = SHAPE.n_embd // SHAPE.head_size
    tuned = {f"blocks.{i}.att.time_state": torch.ones(heads, SHAPE.head_size, SHAPE.head_size) for i in range(2)}
    torch.save(tuned, folder / "time_state.pth")
    write_artifact(folder / "tuned", 0, *chunks, "--state", str(folder / "time_state.pth"))
    return folder


@pytest.fixture(scope="module")
def session(artifacts: Path) -> OrtSession:
    return opened(artifacts / "one")


def silent(folder: Path, limit: int = 10**9) -> PromptCache:
    """A cache that must not complain."""

    def complain(line: str) -> None:
        raise AssertionError(line)

    return PromptCache(folder, limit, complain)


def check(session: OrtSession, cache: PromptCache, tokens: list[int]) -> int:
    """The cache gives the bits that reading the prompt gives; returns how many tokens it reused."""
    state = session.initial_state()
    logits = session.prefill([tokens], state)[0]
    found = cache.prefill(session, tokens)
    assert np.array_equal(found.logits, logits)
    expected = session.export_state(state)
    assert all(np.array_equal(array, expected[name]) for name, array in session.export_state(found.state).items())
    assert np.array_equal(session.step([1], found.state), session.step([1], state))
    return found.reused


# The same bits


@pytest.mark.parametrize(("name", "count"), [("one", 25), ("short", 25), ("half", 8), ("tuned", 25)])
def test_prompts_with_a_common_beginning(name: str, count: int, artifacts: Path, tmp_path: Path) -> None:
    session, cache = opened(artifacts / name), silent(tmp_path)
    rng = np.random.default_rng(1)
    reused = []
    for _ in range(count):
        kept, added = int(rng.integers(0, 300)), int(rng.integers(1, 40))
        reused.append(check(session, cache, TEXT[:kept] + [int(t) for t in rng.integers(0, 256, added)]))
    assert sum(number > 0 for number in reused) > 0.4 * count
    for length in (1, 15, 16, 17, 64, 65, 80, 128):
        check(session, cache, TEXT[:length])
        assert check(session, cache, TEXT[:length]) == length


def test_what_is_reused(session: OrtSession, tmp_path: Path) -> None:
    assert chunks_of(150, session) == [64, 64, 16, 1, 1, 1, 1, 1, 1]
    cache = silent(tmp_path)
    assert check(session, cache, TEXT[:150]) == 0
    assert check(session, cache, TEXT[:150]) == 150  # nothing has to be read
    assert check(session, cache, TEXT[:155]) == 150  # on the way of the longer prompt
    assert check(session, cache, TEXT[:170]) == 128  # 150 is not: its way is 64, 64, 16, 16, …
    assert check(session, cache, [*TEXT[:100], 7, *TEXT[101:150]]) == 64
    assert check(session, cache, [*TEXT[:10], 7, *TEXT[11:150]]) == 0


def chunks_of(length: int, session: OrtSession) -> list[int]:
    return list(chunk_plan(length, session.chunks))


def test_long_prompts_keep_few_states(session: OrtSession, tmp_path: Path) -> None:
    cache, text = silent(tmp_path), (TEXT * 5)[:3300]
    check(session, cache, text)
    assert len(cache_entries(tmp_path)) <= 18
    assert check(session, cache, [*text[:2500], *TEXT[:700]]) == 2304  # the multiple of 256 before 2500


def test_models_and_threads_do_not_share(artifacts: Path, tmp_path: Path) -> None:
    cache = silent(tmp_path)
    for name in ("one", "other", "short", "half", "tuned"):
        assert check(opened(artifacts / name), cache, TEXT[:100]) == 0
    two_threads = open_session(artifacts / "one", threads=2)
    assert cache.prefill(two_threads, TEXT[:100]).reused == 0
    assert check(opened(artifacts / "one"), cache, TEXT[:100]) == 100


def test_generated_text_is_the_same(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals." * 2
    command = ["generate", str(artifacts / "one"), prompt, "-n", "60", "--temperature", "0", "--threads", "1"]
    assert run(command) == 0
    expected = capsys.readouterr().out
    for reused in (0, len(prompt)):
        assert run([*command, "--cache", str(tmp_path / "cache")]) == 0
        printed = capsys.readouterr()
        assert printed.out == expected
        assert (f"{reused} of them from the cache" in printed.err) == (reused > 0)
    seeded = [*command, "--temperature", "1", "--seed", "5"]
    assert run(seeded) == 0
    expected = capsys.readouterr().out
    assert run([*seeded, "--cache", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == expected


def test_a_cached_prompt_leaves_the_same_snapshot(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        command = ["generate", str(artifacts / "one"), "abc" * 30, "-n", "5", "--temperature", "0", "--threads", "1"]
        assert run([*command, "--cache", str(tmp_path / "cache"), "--state-out", str(tmp_path / name)]) == 0
    assert "90 of them from the cache" in capsys.readouterr().err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Size


def test_the_size_is_kept_and_the_oldest_go_first(session: OrtSession, tmp_path: Path) -> None:
    first = silent(tmp_path)
    check(session, first, TEXT[:10])
    (entry,) = cache_entries(tmp_path)
    cache = silent(tmp_path, int(entry.nbytes * 3.5))
    for length in (11, 12):
        check(session, cache, TEXT[:length])
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns, reverse=True)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert check(session, cache, TEXT[:10]) == 10  # used now: 11 is the oldest
    check(session, cache, TEXT[100:110])
    assert sum(e.nbytes for e in cache_entries(tmp_path)) <= cache.limit
    assert len(cache_entries(tmp_path)) == 3
    assert cache.prefill(session, TEXT[:10]).reused == 10
    assert cache.prefill(session, TEXT[:12]).reused == 12
    assert cache.prefill(session, TEXT[100:110]).reused == 10


def test_a_state_larger_than_the_cache_is_not_kept(session: OrtSession, tmp_path: Path) -> None:
    cache = silent(tmp_path, 100)
    assert check(session, cache, TEXT[:10]) == 0
    assert cache_entries(tmp_path) == []


# Damage


def test_a_damaged_entry_is_ignored_and_removed(
    artifacts: Path, session: OrtSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "x" * 70
    command = ["generate", str(artifacts / "one"), prompt, "-n", "20", "--temperature", "0", "--threads", "1"]
    command += ["--cache", str(tmp_path)]
    assert run(command) == 0
    expected = capsys.readouterr().out
    for damage in ("cut", "flipped", "emptied", "swapped"):
        paths = sorted(entry.path for entry in cache_entries(tmp_path))
        assert len(paths) == 2  # at 64 and at 70
        contents = [path.read_bytes() for path in paths]
        damaged = {
            "cut": [content[:-9] for content in contents],
            "flipped": [content[:-9] + bytes([content[-9] ^ 1]) + content[-8:] for content in contents],
            "emptied": [b"", b""],
            "swapped": contents[::-1],
        }[damage]
        for path, content in zip(paths, damaged, strict=True):
            path.write_bytes(content)
        assert run(command) == 0
        printed = capsys.readouterr()
        assert printed.out == expected
        warnings = [line for line in printed.err.splitlines() if line.startswith("Warning: ")]
        assert len(warnings) == 2
        assert all("a damaged entry of the cache is ignored and removed" in line for line in warnings)
        assert len(printed.err.splitlines()) == 3  # and the speed
        assert [path.read_bytes() for path in paths] == contents  # written anew
    assert check(session, silent(tmp_path), list(prompt.encode())) == 70


def test_a_cache_that_cannot_be_written_only_warns(
    session: OrtSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    cache = PromptCache(tmp_path / "cache", warn=lines.append)
    (tmp_path / "cache").rmdir()
    assert check(session, cache, TEXT[:10]) == 0
    assert len(lines) == 1
    assert re.fullmatch(r"the cache keeps nothing of this prompt: .* there is no folder .*", lines[0])


def test_library_users_get_a_python_warning(session: OrtSession, tmp_path: Path) -> None:
    check(session, silent(tmp_path), TEXT[:10])
    cache_entries(tmp_path)[0].path.write_bytes(b"junk")
    with pytest.warns(UserWarning, match="ignored and removed"):
        PromptCache(tmp_path).prefill(session, TEXT[:10])


# Refusals


def test_refusals(artifacts: Path, session: OrtSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    one = artifacts / "one"
    assert "cannot be a folder" in refusal(capsys, "generate", one, "a", "--cache", tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "absent"):
        assert "is not the folder of a cache" in refusal(capsys, "cache", "info", folder)
        assert "is not the folder of a cache" in refusal(capsys, "cache", "clear", folder)
    for text in ("x", "-1", "1PB", "", "1e9", "9" * 99):
        assert "is no size" in refusal(capsys, "generate", one, "a", "--cache", tmp_path, "--cache-size", text)
    both = ("--cache", tmp_path / "cache", "--state-in", tmp_path / "state")
    assert "cannot be used together" in refusal(capsys, "generate", one, "a", *both)
    with pytest.raises(InputError, match="at least 0"):
        PromptCache(tmp_path, -1)
    with pytest.raises(InputError, match="outside the vocabulary"):
        PromptCache(tmp_path).prefill(session, [1, 256])
    with pytest.raises(InputError):
        PromptCache(tmp_path).prefill(session, [])
    with pytest.raises(StateError, match="bare graph"):
        PromptCache(tmp_path).prefill(open_session(one / "step.onnx", threads=1), [1])


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("17", 17), ("2kB", 2000), ("1.5MB", 1_500_000), ("3 GB", 3 * 10**9), ("1T", 10**12)]
)
def test_sizes(text: str, nbytes: int) -> None:
    from rwkv_edge.cli.common import ByteSize

    assert ByteSize().convert(text, None, None) == nbytes


def test_info_and_clear(session: OrtSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(session, silent(tmp_path), TEXT[:70])
    (tmp_path / "mine.txt").write_text("keep this")
    (tmp_path / f".{'0' * 64}.state.partial-{'0' * 16}").write_text("left by a process that was killed")
    nbytes = sum(entry.nbytes for entry in cache_entries(tmp_path))
    assert run(["cache", "info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path), "entries": 2, "bytes": nbytes}
    assert run(["cache", "info", str(tmp_path)]) == 0
    assert "2 states, " in capsys.readouterr().out
    assert run(["cache", "clear", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(" kB removed\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert clear_cache(tmp_path) == 0


# Several processes

FAKE = """
import json, os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from rwkv_edge.runtime.cache import PromptCache, cache_entries
from rwkv_edge.runtime.snapshot import read_snapshot
from rwkv_edge.spec import ModelSpec, StateTensor

N = 100_000
class Session:  # its state is the sum of the tokens, everywhere
    spec = ModelSpec("7", 1, 8, 8, 8, 1, 8, 256, "fp32", None, (StateTensor("wkv.0", (N,), "float32"),))
    model_hash, initial_hash, chunks, numerics = "0" * 64, None, (4,), "fake"
    def initial_state(self, batch):
        return np.zeros((1, N), np.float32)
    def prefill(self, tokens, state, watch):
        for at in range(tokens.shape[1]):
            state += tokens[0, at]
            watch(at + 1, np.full((1, 256), state[0, 0], np.float32))
        return np.full((1, 256), state[0, 0], np.float32)
    def export_state(self, state):
        return {"wkv.0": state.copy()}
    def import_state(self, arrays):
        return arrays["wkv.0"].copy()

def complain(line):
    raise AssertionError(line)

def work(folder, seed, turns):
    rng = random.Random(seed)
    cache = PromptCache(folder, 30 * N, complain)
    for _ in range(turns):
        tokens = [1] * rng.randrange(20) + [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        found = cache.prefill(Session(), tokens)
        assert (found.state == sum(tokens)).all()
        assert found.logits[0] == sum(tokens)
"""

KILLER = """
folder = Path(sys.argv[1])
random.seed(0)
torn = 0
for turn in range(50):
    child = os.fork()
    if child == 0:
        work(folder, turn, 1000)
    time.sleep(random.uniform(0.005, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for entry in cache_entries(folder) if folder.exists() else []:
        read_snapshot(entry.path)
    left = sum(path.name.startswith(".") for path in folder.iterdir()) if folder.exists() else 0
    assert left <= 1, left
    torn += left
work(folder, 99, 30)
assert not [path for path in folder.iterdir() if path.name.startswith(".")]
print(json.dumps({"torn": torn, "entries": len(cache_entries(folder))}))
"""

TOGETHER = """
folder = Path(sys.argv[1])
children = []
for seed in range(4):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(folder, seed, 60)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
assert codes == [0] * 4, codes
PromptCache(folder).shrink(30 * N)
assert sum(entry.nbytes for entry in cache_entries(folder)) <= 30 * N
assert not [path for path in folder.iterdir() if path.name.startswith(".")]
print(json.dumps({"entries": len(cache_entries(folder))}))
"""


def counted(script: str, folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FAKE + script, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_while_it_is_written(tmp_path: Path) -> None:
    counts = counted(KILLER, tmp_path / "cache")
    assert counts["torn"] > 5  # kills that met an entry half written
    assert counts["entries"] > 2
    for entry in cache_entries(tmp_path / "cache"):
        assert read_snapshot(entry.path).streams[0].tokens > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    assert counted(TOGETHER, tmp_path / "cache")["entries"] > 2
