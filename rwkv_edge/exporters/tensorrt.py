"""From an artifact's graphs to TensorRT engines beside them: all of them and their manifest, or nothing.

Engines are built into a scratch folder inside the artifact's and moved when all are done. Where engines stood there
before, the manifest drops them first: whoever opens the artifact in between, or after the process was killed, finds
it whole, without engines at worst. Nothing here imports torch or onnx.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_edge.artifact import MANIFEST, WEIGHTS, Artifact, FileEntry, GraphEntry, Manifest, write_manifest
from rwkv_edge.engines import MOST_CANDIDATES, EngineEntry
from rwkv_edge.errors import ArtifactError, FileError, InputError
from rwkv_edge.exporters.folder import disk_errors, is_running
from rwkv_edge.exporters.trt_adapter import EngineSettings, LoadedBackend, build_engine, load_backend
from rwkv_edge.exporters.trt_targets import check_precision, chosen_targets, chosen_wkv, device_capability
from rwkv_edge.exporters.trt_types import HostMemory
from rwkv_edge.spec import ModelSpec

BLOCK = 1 << 26  # bytes written and hashed at a time
INDEX = "weights.json"
SCRATCH = ".build-"

Report = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""Called with the name of each engine; what it yields is told the part that is done, from 0 to 1."""


@dataclass(frozen=True)
class BuildOptions:
    """What a build may choose.

    Attributes:
        backend: 'tensorrt', 'tensorrt-rtx', or 'auto' for the one that is installed.
        targets: GPUs to build for, such as 'sm86'; none for this machine's.
        wkv: 'plugin', 'fused', 'function' or 'inline'; None for what the step's graph has.
        timing_cache: a file that is read if it exists, and written afterwards.
        workspace: scratch memory of an engine at most, in MB.
        opt_level: the builder's effort, from 0 to 5.
        refit: let the weights be exchanged later.
        version_compatible: let later versions of the backend's major release run the engines.
        max_batch: most streams of an artifact whose batch size is dynamic.
        keep_graphs: keep the graphs and weights; without them the artifact runs on its engines only.
        sample_k: how many of the largest logits the step's engine finds itself, so that only these travel to the host
            where they decide the next token; 0: none.
    """

    backend: str = "auto"
    targets: tuple[str, ...] = ()
    wkv: str | None = None
    timing_cache: Path | None = None
    workspace: int | None = None
    opt_level: int | None = None
    refit: bool = False
    version_compatible: bool = False
    max_batch: int = 8
    keep_graphs: bool = True
    sample_k: int = 0

    def __post_init__(self) -> None:
        if self.workspace is not None and not 1 <= self.workspace <= 1 << 30:
            raise InputError(f"the workspace must have at least 1 MB, not {self.workspace}")
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise InputError(f"the optimization level must be from 0 to 5, not {self.opt_level}")
        if self.max_batch < 1:
            raise InputError(f"the largest batch must be at least 1, not {self.max_batch}")
        if not 0 <= self.sample_k <= MOST_CANDIDATES:
            raise InputError(f"--sample-k must be from 0 (none) to {MOST_CANDIDATES}, not {self.sample_k}")


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do, once nothing speaks against it."""

    loaded: LoadedBackend
    targets: tuple[str, ...]
    wkv: str


def plan_build(options: BuildOptions, precision: str, wkv: str) -> BuildPlan:
    """Find the backend and the targets; everything that can be refused without a graph is refused here.

    Args:
        options: what was asked for.
        precision: 'fp32', 'fp16' or 'bf16', the artifact's.
        wkv: 'inline', 'function' or 'fused', the form of its step graph.

    Raises:
        InputError: something that the backend, the GPU or the graph has not.
        MissingDependencyError: the backend is not installed.
    """
    loaded = load_backend(options.backend)
    name, words = loaded.backend.name, loaded.backend.words
    if name == "tensorrt-rtx" and options.timing_cache:
        raise InputError(f"{words} has no timing cache (it compiles for the GPU at run time); leave --timing-cache out")
    if name == "tensorrt-rtx" and options.version_compatible:
        raise InputError(f"{words} builds no version-compatible engines; leave --version-compatible out")
    capability = device_capability()
    if name == "tensorrt-rtx" and options.refit and capability is None:
        raise InputError(f"{words} builds refittable engines only where a GPU is, but none was found here")
    targets = chosen_targets(options.targets, name, loaded.targets, capability)
    check_precision([precision.upper()], targets, "the artifact")
    return BuildPlan(loaded, targets, chosen_wkv(options.wkv, wkv, name, loaded.version))


def build_engines(path: str | Path, options: BuildOptions | None = None, progress: Report | None = None) -> Manifest:
    """Build the engines of an artifact: one for each of its graphs that are for GPUs.

    Args:
        path: the artifact's folder; former engines in it are replaced.
        options: backend, targets and form.
        progress: see `Report`.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: no artifact, a damaged one, or a folder that cannot be written.
        InputError: something that the backend, the GPU or the graph has not.
        ExportError: TensorRT cannot build a graph.
        MissingDependencyError: the backend is not installed.
    """
    options = options or BuildOptions()
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    _check_quantization(artifact)
    if options.sample_k > manifest.spec.vocab_size:
        raise InputError(f"--sample-k {options.sample_k} is more than the vocabulary of {manifest.spec.vocab_size}")
    step = artifact.graph("step", "gpu")
    plan = plan_build(options, manifest.spec.precision, step.wkv)
    if (plan.wkv, step.wkv) == ("plugin", "fused"):
        _check_fused_plugins(manifest.spec)
    graphs = [graph for graph in manifest.graphs if graph.target in ("gpu", "any")]
    cache = _read_cache(options.timing_cache)
    with _scratch(artifact.path, manifest.files[WEIGHTS].nbytes * len(graphs)) as scratch:
        artifact.check_content(WEIGHTS, *(graph.file for graph in graphs))
        if plan.wkv == "plugin":
            _register_plugins(plan.loaded, plan.targets)
        files: dict[str, FileEntry] = {}
        engines = []
        for graph in graphs:
            entry, file, cache = _build(artifact, graph, plan, options, scratch, cache, progress)
            engines.append(entry)
            files[entry.file] = file
        if options.timing_cache is not None and cache is not None:
            _write_cache(options.timing_cache, cache)
        return _commit(artifact, scratch, engines, files, options.keep_graphs)


def _check_quantization(artifact: Artifact) -> None:
    """Refuse quantized forms that TensorRT has no operators for.

    Raises:
        InputError: the form for CPUs, or integer rows of an embedding.
    """
    facts = artifact.manifest.quantization or {}
    if facts.get("target") == "cpu":
        raise InputError(
            f"{artifact.path} is quantized for CPUs (--target cpu); quantize the float artifact without it"
        )
    if facts.get("embedding") == "int8":
        raise InputError(
            f"{artifact.path} has an int8 embedding, whose rows TensorRT cannot gather; quantize the float artifact "
            "with --embedding float"
        )


def _check_fused_plugins(spec: ModelSpec) -> None:
    """Refuse a model that the kernels of fused nodes do not take: what they raise during a build, TensorRT loses.

    Raises:
        InputError: too many streams, a dynamic number of them, or a dimension that they do not have.
    """
    from rwkv_edge.plugins.fused_nodes import fused_layers, sizes_of

    if spec.batch is None:
        raise InputError(
            "--wkv plugin compiles fused nodes for a fixed number of streams, but this artifact has --batch dynamic; "
            "export it with --batch 1, or build with --wkv fused"
        )
    for node in fused_layers(spec.version).nodes.values():
        try:
            node.kernel(sizes_of(node, spec), spec.act_dtype)
        except InputError as error:
            raise InputError(f"{error}; build with --wkv fused") from error


def _plugins(graph: GraphEntry, spec: ModelSpec) -> int:
    """Calls of local functions in a graph that are to become plugins."""
    from rwkv_edge.plugins.fused_nodes import fused_layers

    layers = range(spec.n_layer)
    return sum(len(fused_layers(spec.version).of(i)) for i in layers) if graph.wkv == "fused" else len(layers)


def _build(
    artifact: Artifact,
    graph: GraphEntry,
    plan: BuildPlan,
    options: BuildOptions,
    scratch: Path,
    cache: bytes | None,
    progress: Report | None,
) -> tuple[EngineEntry, FileEntry, bytes | None]:
    """Build one engine into ``scratch``; its entries, and the timing cache after it."""
    wkv = graph.wkv if graph.wkv == "inline" else plan.wkv
    batch = artifact.manifest.spec.batch or options.max_batch
    sample_k = options.sample_k if graph.kind == "step" else 0
    plugins = _plugins(graph, artifact.manifest.spec) if wkv == "plugin" else 0
    settings = EngineSettings(
        plan.targets, batch, plugins, options.workspace and options.workspace << 20, options.opt_level,
        options.refit, options.version_compatible, sample_k,
    )  # fmt: skip
    name, start = f"{Path(graph.file).stem}.engine", time.perf_counter()
    with progress(name) if progress else contextlib.nullcontext(lambda _: None) as report:
        built = build_engine(plan.loaded, artifact.path / graph.file, settings, cache, report)
    seconds = round(time.perf_counter() - start, 3)
    entry = EngineEntry(
        name, graph.file, graph.kind, graph.tokens, batch, plan.loaded.backend.name, plan.loaded.version, plan.targets,
        wkv, artifact.manifest.model_hash, seconds, options.refit, options.version_compatible, sample_k,
    )  # fmt: skip
    with disk_errors(artifact.path):
        return entry, write_engine(built.memory, scratch / name), built.cache


def write_engine(memory: HostMemory, path: Path) -> FileEntry:
    """Write an engine as it lies in the library's memory, block by block: engines of many GB need no second copy.

    Raises:
        OSError: it cannot be written.
    """
    digest, view = hashlib.sha256(), memoryview(memory).cast("B")
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            digest.update(block)
            while block:
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    return FileEntry(len(view), digest.hexdigest())


@contextlib.contextmanager
def _scratch(folder: Path, nbytes: int) -> Iterator[Path]:
    """A folder inside the artifact's that is gone at the end; those of builds that were killed go too."""
    scratch = folder / f"{SCRATCH}{os.getpid()}"
    with disk_errors(folder):
        for leftover in folder.glob(f"{SCRATCH}*"):
            pid = leftover.name.removeprefix(SCRATCH)
            if pid.isdecimal() and (int(pid) == os.getpid() or not is_running(int(pid))):
                shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir()
    try:
        with disk_errors(folder):
            free = shutil.disk_usage(folder).free
        if free < nbytes:
            needed = f"some {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free there"
            raise ArtifactError(f"{folder} cannot be written: the engines need {needed}")
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _commit(
    artifact: Artifact, scratch: Path, engines: list[EngineEntry], files: dict[str, FileEntry], keep_graphs: bool
) -> Manifest:
    """Move the engines into place, the manifest last; on failure everything is put back.

    Raises:
        ArtifactError: the folder cannot be written, or another program replaced the artifact meanwhile.
    """
    folder = artifact.path
    former = Artifact.open(folder).manifest
    if former.model_hash != artifact.manifest.model_hash or former.graphs != artifact.manifest.graphs:
        raise ArtifactError(f"{folder} was exported again meanwhile; run 'rwkv-edge build' again")
    bare = _without_engines(former)
    graphs = () if not keep_graphs else bare.graphs
    dropped = set() if keep_graphs else {WEIGHTS, INDEX, *(graph.file for graph in bare.graphs)}
    kept = {name: entry for name, entry in bare.files.items() if name not in dropped}
    final = replace(bare, graphs=graphs, files={**kept, **files}, engines=tuple(engines))
    old = [engine.file for engine in former.engines if (folder / engine.file).is_file()]
    with disk_errors(folder), _restored_on_failure(folder, scratch, old, list(files)):
        if former.engines:
            _put_manifest(folder, scratch, bare)
        for name in old:
            (folder / name).replace(scratch / "former" / name)
        for name in files:
            (scratch / name).replace(folder / name)
        _put_manifest(folder, scratch, final)
    for name in dropped:
        with contextlib.suppress(OSError):  # an unlisted file that stays is no harm
            (folder / name).unlink()
    return final


@contextlib.contextmanager
def _restored_on_failure(folder: Path, scratch: Path, old: list[str], new: list[str]) -> Iterator[None]:
    """Put the former engines and manifest back where the block fails; Ctrl-C too."""
    manifest = (folder / MANIFEST).read_bytes()
    (scratch / "former").mkdir()
    try:
        yield
    except BaseException:
        for name in new:
            if name not in old:
                (folder / name).unlink(missing_ok=True)
        for name in old:
            if (scratch / "former" / name).exists():
                (scratch / "former" / name).replace(folder / name)
        (scratch / MANIFEST).write_bytes(manifest)
        (scratch / MANIFEST).replace(folder / MANIFEST)
        raise


def _without_engines(manifest: Manifest) -> Manifest:
    engines = {engine.file for engine in manifest.engines}
    return replace(
        manifest, engines=(), files={name: entry for name, entry in manifest.files.items() if name not in engines}
    )


def _put_manifest(folder: Path, scratch: Path, manifest: Manifest) -> None:
    write_manifest(scratch, manifest)
    (scratch / MANIFEST).replace(folder / MANIFEST)


def _register_plugins(loaded: LoadedBackend, targets: Sequence[str]) -> None:
    """Register the kernels of `rwkv_edge.plugins` with TensorRT, for the one GPU that it builds for.

    Raises:
        ExportError: it has no plugins that are compiled ahead of time.
    """
    from rwkv_edge.plugins.tensorrt import register_plugins

    register_plugins(loaded.trt, int(targets[0].removeprefix("sm")))


def _read_cache(path: Path | None) -> bytes | None:
    """The content of a timing cache; b"" where there is none yet, None where none is wanted."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise FileError(f"the timing cache {path} cannot be written: there is no such folder") from None
        return b""
    except OSError as error:
        raise FileError(f"the timing cache {path} cannot be read: {error.strerror}") from error


def _write_cache(path: Path, data: bytes) -> None:
    place = Path(os.path.realpath(path))
    scratch = place.with_name(f".{place.name}.partial-{os.getpid()}")
    with disk_errors(path):
        try:
            scratch.write_bytes(data)
            scratch.replace(place)
        finally:
            scratch.unlink(missing_ok=True)
