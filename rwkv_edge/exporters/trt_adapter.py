"""One way to build an engine with the modules `tensorrt` (10.3 to 11.4) and `tensorrt_rtx`.

What differs, and where that was verified. "Run" means with tensorrt_rtx 1.7 on a machine without a GPU, "types" the
stubs of TensorRT 10.13, "noted" this project's notes on NVIDIA's documentation only; nothing was run with `tensorrt`:

- Networks are strongly typed, so the flags FP16, INT8, … of BuilderFlag, which TensorRT 11 (noted) and tensorrt_rtx
  (run) lack, are never used. STRONGLY_TYPED is always set; from TensorRT 11 on it says nothing (so its documentation in
  tensorrt_rtx 1.7), and a version without it would do. EXPLICIT_BATCH, ignored since 10.0 (noted) and absent in
  tensorrt_rtx (run), is never set.
- TF32 is on by default wherever BuilderFlag has it (types, run): always cleared.
- Targets are chosen with ``num_compute_capabilities`` in tensorrt_rtx (run); IBuilderConfig of `tensorrt` has no such
  thing (types) and builds for the GPU at hand.
- VERSION_COMPATIBLE wants a lean runtime that tensorrt_rtx does not ship (run), and its timing cache does nothing
  (run: a DeprecationWarning says so): both are refused there. REFIT needs a GPU there even to build (run).
- IProgressMonitor exists in 10.13 (types) and tensorrt_rtx (run); where it is missing, a build shows nothing and
  Ctrl-C ends it when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rwkv_edge.engines import ENGINE_BACKENDS, Backend, error_log, one_line, reason_of, version_numbers
from rwkv_edge.errors import ExportError, InputError, MissingDependencyError
from rwkv_edge.exporters.trt_candidates import add_candidates
from rwkv_edge.exporters.trt_progress import held_interrupts, monitor
from rwkv_edge.exporters.trt_targets import check_precision, parser_dispatch
from rwkv_edge.exporters.trt_types import (
    Builder,
    BuilderConfig,
    HostMemory,
    NetworkDefinition,
    OnnxParser,
    RtxBuilderConfig,
)

OLDEST = (10, 3)
"""The TensorRT of JetPack 6.2."""


@dataclass(frozen=True)
class LoadedBackend:
    """A backend that is installed: its module, and the version that this says."""

    backend: Backend
    trt: Any

    @property
    def version(self) -> str:
        """In full: '10.13.3.9'."""
        return str(self.trt.__version__)

    @property
    def targets(self) -> tuple[str, ...] | None:
        """The GPUs that it can build for without having them; None where it builds for the one it has."""
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", None)
        return tuple(sorted((x.lower() for x in members if x.startswith("SM")), key=_number)) if members else None


def load_backend(name: str) -> LoadedBackend:
    """Import a backend, or for 'auto' the first that is installed.

    Raises:
        MissingDependencyError: it is not installed.
        ExportError: it is installed but cannot be loaded.
        InputError: no such backend, or a TensorRT that is too old.
    """
    if name not in ("auto", *ENGINE_BACKENDS):
        raise InputError(f"backend must be one of auto, {', '.join(ENGINE_BACKENDS)}, not '{name}'")
    wanted = tuple(ENGINE_BACKENDS.values()) if name == "auto" else (ENGINE_BACKENDS[name],)
    for backend in wanted:
        module = _module(backend)
        if module is not None:
            found = LoadedBackend(backend, module)
            if backend.name == "tensorrt" and version_numbers(found.version) < OLDEST:
                least = ".".join(map(str, OLDEST))
                raise InputError(f"TensorRT {found.version} is installed, but engines need {least} or later; update it")
            return found
    missing = wanted[0] if name != "auto" else ENGINE_BACKENDS["tensorrt-rtx"]  # which can be installed everywhere
    raise MissingDependencyError(missing.module, missing.extra, "building engines")


def _module(backend: Backend) -> Any:
    """The module, or None; types without a library (`tensorrt-stubs`) leave a module that has no builder."""
    try:
        module = import_module(backend.module)
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        raise ExportError(
            f"{backend.words} is installed but cannot be loaded: {one_line(str(error))}; install it again"
        ) from error
    return module if hasattr(module, "Builder") else None


def _number(target: str) -> int:
    return int(target[2:])


@dataclass(frozen=True)
class EngineSettings:
    """What the builder is told.

    Attributes:
        targets: GPUs to build for; read with tensorrt_rtx only.
        batch: most streams, where the graph's batch axis is dynamic.
        plugins: calls of local functions that must become plugins.
        workspace: scratch memory of the engine at most, in bytes; None for all that is free.
        opt_level: 0 to 5, None for the builder's own.
        refit: let the weights be exchanged later.
        version_compatible: let later versions of the same major release run the engine.
        sample_k: candidates that the engine of a step finds itself, see `rwkv_edge.exporters.trt_candidates`; 0: none.
    """

    targets: Sequence[str]
    batch: int = 1
    plugins: int = 0
    workspace: int | None = None
    opt_level: int | None = None
    refit: bool = False
    version_compatible: bool = False
    sample_k: int = 0


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in the library's memory, and the timing cache after it was built (None where none was asked for)."""

    memory: HostMemory
    cache: bytes | None


def build_engine(
    loaded: LoadedBackend,
    graph: Path,
    settings: EngineSettings,
    cache: bytes | None = None,
    report: Callable[[float], None] = lambda _: None,
) -> BuiltEngine:
    """Build the engine of an ONNX graph, whose weights lie beside it.

    Args:
        loaded: the backend.
        graph: the .onnx file.
        settings: see there.
        cache: content of a timing cache, b"" for a new one, None for none.
        report: told the part that is done, from 0 to 1.

    Raises:
        ExportError: the parser or the builder fails; names the node where there is one.
        InputError: the graph computes in a type that a target has not, or the cache is of another GPU or version.
        KeyboardInterrupt: Ctrl-C, after the builder has stopped.
    """
    log = error_log(loaded.trt)
    log.errors.clear()
    with held_interrupts() as interrupted:
        builder = _builder(loaded, log)
        network, parser = _parsed(loaded, builder, graph, settings, log)
        config = _configured(loaded, builder, network, settings)
        if cache is not None:
            _use_cache(config, cache)
        watched = monitor(loaded.trt, report, interrupted)
        if watched is not None:
            config.progress_monitor = watched
        memory = builder.build_serialized_network(network, config)
        del parser  # it owns the weights, so it had to live until here
        if watched is not None and watched.error is not None:
            raise watched.error
        if memory is None:  # after Ctrl-C too, which then takes the place of this error
            words = f"{loaded.backend.words} {loaded.version} cannot build {graph.name}"
            raise ExportError(f"{words} for {', '.join(settings.targets)}: {reason_of(log)}")
    report(1.0)
    timings = config.get_timing_cache() if cache is not None else None
    return BuiltEngine(memory, bytes(memoryview(timings.serialize())) if timings else None)


def _builder(loaded: LoadedBackend, log: Any) -> Builder:
    try:
        builder: Builder = loaded.trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # pybind11's factory returned nothing: no driver, no GPU
        reason = reason_of(log, error)
        raise ExportError(f"{loaded.backend.words} cannot start: {reason}; check the GPU's driver") from error
    return builder


def _network_flags(trt: Any, plugin: bool) -> int:
    """Strongly typed; with a plugin, its code goes into the engine where it could also be called in Python."""
    names = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS") if plugin else ("STRONGLY_TYPED",)
    members = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return sum(1 << int(member) for member in members if member is not None)


def _parsed(
    loaded: LoadedBackend, builder: Builder, graph: Path, settings: EngineSettings, log: Any
) -> tuple[NetworkDefinition, OnnxParser]:
    network = builder.create_network(_network_flags(loaded.trt, settings.plugins > 0))
    parser: OnnxParser = loaded.trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise _parser_error(loaded, parser, graph, log)
    _check_network(network, settings, graph, loaded)
    if settings.sample_k:
        add_candidates(loaded.trt, network, settings.sample_k)
    return network, parser


def _parser_error(loaded: LoadedBackend, parser: OnnxParser, graph: Path, log: Any) -> ExportError:
    """The parser's first error, with the node it stands at."""
    words = f"{loaded.backend.words} {loaded.version} cannot read {graph.name}"
    if not parser.num_errors:
        return ExportError(f"{words}: {reason_of(log)}")
    error = parser.get_error(0)
    inside = f" in function {' in '.join(reversed(stack))}" if (stack := error.local_function_stack()) else ""
    node = f"node '{error.node_name()}' ({error.node_operator()}){inside}: " if error.node_operator() else ""
    return ExportError(f"{words}: {node}{one_line(error.desc())}")


def _check_network(network: NetworkDefinition, settings: EngineSettings, graph: Path, loaded: LoadedBackend) -> None:
    """What can be seen once the graph is parsed: its data types, and whether the parser took the plugins."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    dtypes = {layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs)}
    check_precision(dtypes, settings.targets, graph.name)
    taken = sum(layer.type.name == "PLUGIN_V3" for layer in layers)
    if taken < settings.plugins:
        order = ", ".join(parser_dispatch(loaded.version).order)
        raise ExportError(
            f"TensorRT {loaded.version} took {taken or 'no'} plugins for {settings.plugins} functions of {graph.name} "
            f"(its parser looks for {order}); build without --wkv plugin"
        )


def _configured(
    loaded: LoadedBackend, builder: Builder, network: NetworkDefinition, settings: EngineSettings
) -> BuilderConfig:
    trt, config = loaded.trt, builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.opt_level is not None:
        config.builder_optimization_level = settings.opt_level
    if loaded.targets is not None:
        _set_targets(trt, cast("RtxBuilderConfig", config), settings.targets)
    _add_profile(builder, config, network, settings.batch)
    return config


def _set_targets(trt: Any, config: RtxBuilderConfig, targets: Sequence[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
            raise ExportError(f"TensorRT for RTX {trt.__version__} does not take the targets {', '.join(targets)}")


def _add_profile(builder: Builder, config: BuilderConfig, network: NetworkDefinition, batch: int) -> None:
    """Batches from 1 to ``batch``, tuned for 1, where the axis is dynamic: the first axis of every input."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if tensor.shape[0] == -1]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *rest), (1, *rest), (batch, *rest))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT does not take batches from 1 to {batch}; choose another --max-batch")


def _use_cache(config: BuilderConfig, cache: bytes) -> None:
    found = config.create_timing_cache(cache)
    if found is None or not config.set_timing_cache(found, False):
        raise InputError("the timing cache is damaged, or of another GPU or TensorRT; name another --timing-cache")
