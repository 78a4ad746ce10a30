"""Every graph parses and builds with NVIDIA's parser and builder, strongly typed, for a GPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from makers import MAKERS

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def built_bytes(trt: Any, path: Path) -> int:
    """Size of the engine for sm86; fails with the parser's or builder's words."""
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, errors
    return int(engine.nbytes)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7", "7a"])
def test_step_and_chunks_build(version: str, precision: str, trt: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_pth(MAKERS[version](), tmp_path / "model.pth"))
    for wkv in ("inline", "function"):
        options = ExportOptions(precision=precision, wkv=wkv, tokenizer="none")
        manifest = export_checkpoint(checkpoint, tmp_path / wkv, options)
        for graph in manifest.graphs:
            if graph.target != "cpu" and (wkv == "inline" or graph.kind == "step"):
                assert built_bytes(trt, tmp_path / wkv / graph.file) > 0
