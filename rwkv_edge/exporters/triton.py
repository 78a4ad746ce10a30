"""An artifact as a model of NVIDIA's Triton Inference Server, which keeps the state of every sequence itself.

Sources: docs/user_guide/implicit_state_management.md and model_configuration.md of triton-inference-server/server, and
its core's sequence_batch_scheduler.cc. The server gives a sequence its initial state when a request says
``sequence_start``, feeds the state outputs of one request to the next, and batches sequences, one request of each.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_edge.artifact import WEIGHTS, Artifact
from rwkv_edge.errors import ArtifactError, InputError
from rwkv_edge.exporters.folder import artifact_folder, disk_errors
from rwkv_edge.spec import ModelSpec, StateTensor, stored_from_float32

BACKENDS = ("onnxruntime", "tensorrt")
DEVICES = ("gpu", "cpu")
_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HEADROOM = 1 << 24


@dataclass(frozen=True)
class TritonOptions:
    """How the server runs the model.

    Attributes:
        name: of the model; the artifact's folder where None.
        backend: 'onnxruntime' for the step graph, 'tensorrt' for the step engine.
        device: 'gpu' or 'cpu'.
        max_batch: most sequences in one step; an artifact of batch 1 has one.
        max_sequences: most sequences that are open at a time; more of them wait.
        idle_seconds: after so long without a request, the server forgets a sequence and its state.
    """

    name: str | None = None
    backend: str = "onnxruntime"
    device: str = "gpu"
    max_batch: int = 8
    max_sequences: int = 64
    idle_seconds: float = 3600

    def __post_init__(self) -> None:
        for name, choices in (("backend", BACKENDS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise InputError("an engine of TensorRT runs on a GPU; leave --device cpu out")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputError(f"a model's name has letters, digits, '_', '.' and '-', and is not '{self.name}'")
        for name in ("max_batch", "max_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1e-3 <= self.idle_seconds <= 1e9:
            raise InputError(f"the idle limit must be from 0.001 to 1e9 seconds, not {self.idle_seconds}")


def write_repository(
    artifact: Artifact, repository: Path, initial: Mapping[str, np.ndarray], options: TritonOptions | None = None
) -> Path:
    """Add an artifact to a model repository: its config, one version with the step, files of initial states.

    Args:
        artifact: with a dynamic batch, or of batch 1.
        repository: the folder; made where it does not exist.
        initial: tuned state tensors by name, float32 without a batch axis; the others begin with their fill value.
        options: how the server runs it.

    Returns:
        The model's folder, which appears when it is complete.

    Raises:
        InputError: a batch that is fixed to several streams.
        ArtifactError: it lacks the graph or engine, or the repository cannot be written or holds the name already.
    """
    options = options or TritonOptions()
    name = options.name or _name(artifact.path)
    target = repository / name
    files = _step_files(artifact, options)
    artifact.check_content(*files.values())
    nbytes = sum(artifact.manifest.files[source].nbytes for source in files.values())
    with disk_errors(target):
        taken, is_folder = target.exists(), repository.is_dir() or not repository.exists()
    if not is_folder:
        raise ArtifactError(f"{repository} is a file; a model repository is a folder")
    if taken:
        raise ArtifactError(f"{target} exists already; remove it, or choose another name with --name")
    states = _initial_states(artifact.manifest.spec, initial)
    with artifact_folder(target, nbytes + _HEADROOM) as folder:
        for place, source in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(artifact.path / source, folder / place)
        if states:
            (folder / "initial_state").mkdir()
        for tensor, array in states.items():
            (folder / "initial_state" / tensor).write_bytes(array.tobytes())
        (folder / "config.pbtxt").write_text(config_text(artifact, name, states, options), encoding="utf-8")
    return target


def _name(path: Path) -> str:
    """A model's name like that of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", path.resolve().name).lstrip(".-") or "rwkv"


def _step_files(artifact: Artifact, options: TritonOptions) -> dict[str, str]:
    """Place in the model's folder → file of the artifact."""
    if options.backend == "onnxruntime":
        # A model of several files is a folder, which the server calls as it would call the file.
        graph = artifact.graph("step", options.device).file
        folder = f"1/{_FILES[options.backend]}"
        return {f"{folder}/{_FILES[options.backend]}": graph, f"{folder}/{WEIGHTS}": WEIGHTS}
    engines = [e for e in artifact.manifest.engines if e.kind == "step" and e.backend == "tensorrt"]
    if not engines:
        raise ArtifactError(
            f"{artifact.path} holds no engine of a step for TensorRT; run 'rwkv-edge build {artifact.path} "
            "--backend tensorrt' on the machine that serves it"
        )
    if engines[0].wkv == "plugin":
        raise ArtifactError(
            f"{artifact.path / engines[0].file} needs a plugin that Triton does not load; build it with --wkv inline"
        )
    if artifact.manifest.spec.batch is None and options.max_batch > engines[0].batch:
        raise InputError(
            f"{artifact.path / engines[0].file} takes {engines[0].batch} streams, not {options.max_batch}; "
            f"give --max-batch {engines[0].batch}, or build it for more"
        )
    return {f"1/{_FILES[options.backend]}": engines[0].file}


def _initial_states(spec: ModelSpec, initial: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state tensors that do not begin as zeros, in the dtype of the graph."""
    found = {}
    for t in spec.state:
        value = initial.get(t.name, np.full(t.shape, t.fill, np.float32))
        if value.any():
            found[t.name] = np.ascontiguousarray(stored_from_float32(value, t.dtype))
    return found


def _link_or_copy(source: Path, place: Path) -> None:
    """The same file under another name where the file system can; artifacts are replaced, never changed."""
    with contextlib.suppress(OSError):
        os.link(source, place)
        return
    shutil.copyfile(source, place)


def config_text(artifact: Artifact, name: str, initial: Mapping[str, np.ndarray], options: TritonOptions) -> str:
    """The model's config.pbtxt.

    Args:
        artifact: what it describes.
        name: of the model.
        initial: state tensors that have a file in ``initial_state``; the others begin as zeros.
        options: how the server runs it.

    Raises:
        InputError: the artifact's batch is fixed to several streams.
    """
    spec = artifact.manifest.spec
    if spec.batch not in (None, 1):
        raise InputError(
            f"{artifact.path} has batch {spec.batch}, but the server adds the batch itself; export it with "
            "--batch dynamic, or --batch 1"
        )
    batched = spec.batch is None
    # Without batching the server passes shapes as they are; with it, it puts the batch before them, and the graph's
    # token has no other axis.
    axis = () if batched else (1,)
    scalar = ["reshape: { shape: [ ] }"] if batched else []
    lines = [
        f'name: "{name}"',
        f'backend: "{options.backend}"',
        f'default_model_filename: "{_FILES[options.backend]}"',
        f"max_batch_size: {options.max_batch if batched else 0}",
        *_block("input", ['name: "token"', "data_type: TYPE_INT64", "dims: [ 1 ]", *scalar]),
        *_block("output", ['name: "logits"', "data_type: TYPE_FP32", _dims((*axis, spec.vocab_size))]),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {round(options.idle_seconds * 1e6)}",
        f"  oldest {{ max_candidate_sequences: {options.max_sequences} }}",
        *_indented(_states(spec.state, axis, initial)),
        "}",
        f"instance_group [ {{ count: 1 kind: KIND_{options.device.upper()} }} ]",
        *_parameters({"rwkv_edge_model_hash": artifact.manifest.model_hash, "rwkv_version": spec.version}),
    ]
    return "\n".join(lines) + "\n"


def _states(tensors: Sequence[StateTensor], axis: tuple[int, ...], initial: Mapping[str, np.ndarray]) -> Iterator[str]:
    for t in tensors:
        shape = [f"data_type: {_TYPES[t.dtype]}", _dims((*axis, *t.shape))]
        data = f'data_file: "{t.name}"' if t.name in initial else "zero_data: true"
        start = _block("initial_state", [f'name: "{t.name}.initial"', *shape, data])
        yield from _block("state", [f'input_name: "{t.name}"', f'output_name: "{t.name}.out"', *shape, *start])


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *_indented(lines), "}"]


def _indented(lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _dims(shape: Sequence[int]) -> str:
    return f"dims: [ {', '.join(map(str, shape))} ]"


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in values.items()]
