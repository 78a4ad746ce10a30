"""What a benchmark found: of each contender, and of one against the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rwkv_edge.evaluation.bench_parity import Parity

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass
class Turn:
    """One measurement of one contender, taken in turns with the others.

    Attributes:
        prefill: seconds of the prompt, to the most likely next tokens.
        latencies: seconds of every step after it.
        bandwidth: GB/s that the machine read before it; None where it was not measured.
    """

    prefill: float
    latencies: list[float]
    bandwidth: float | None = None

    @property
    def decode(self) -> float:
        """Seconds of all steps."""
        return sum(self.latencies)


@dataclass
class Measured:
    """All about one contender.

    Attributes:
        name: folder or package.
        runs_on: backend, provider, threads.
        kind: 'artifact' or 'rwkv'.
        precision: of an artifact, with its quantization.
        model_hash: of an artifact.
        parity: what was checked.
        load: seconds from the start of opening to a session, in a process that has imported what it needs.
        first_prefill: seconds of the first prompt, which opens the graphs of chunks.
        peak_host_bytes: the most memory that its process had.
        host_bytes_before: what it had before it opened the model.
        peak_device_bytes: the most that the GPU's memory grew by.
        bytes_per_step: that one step of all streams must move; None where it is not known.
        joules_per_token: over steps that took as long as the meter needs; None where the board does not tell.
        turns: the measurements.
    """

    name: str
    runs_on: str
    kind: str
    precision: str
    model_hash: str | None
    parity: Parity
    load: float
    first_prefill: float
    peak_host_bytes: int | None = None
    host_bytes_before: int | None = None
    peak_device_bytes: int | None = None
    bytes_per_step: int | None = None
    joules_per_token: float | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def latencies(self) -> list[float]:
        """Of all turns."""
        return [seconds for turn in self.turns for seconds in turn.latencies]

    @property
    def prefill(self) -> float:
        """Median seconds of a prompt."""
        return statistics.median(turn.prefill for turn in self.turns)

    def decode_rate(self, batch: int) -> float:
        """Tokens per second of all streams, median over turns."""
        return statistics.median(batch * len(turn.latencies) / turn.decode for turn in self.turns)

    def share_of_bandwidth(self) -> float | None:
        """Of what the steps move over what the machine read in the same turn, median over turns."""
        if self.bytes_per_step is None:
            return None
        moved = self.bytes_per_step / 1e9
        shares = [moved * len(t.latencies) / t.decode / t.bandwidth for t in self.turns if t.bandwidth]
        return statistics.median(shares) if shares else None


@dataclass(frozen=True)
class BenchReport:
    """What was found, and where.

    Attributes:
        contenders: the artifact first.
        prompt: tokens of a prompt.
        tokens: steps of a turn.
        batch: streams.
        machine: facts of the machine.
        clocks: MHz before and after.
        energy_source: what the joules are of.
        date: of the run.
    """

    contenders: tuple[Measured, ...]
    prompt: int
    tokens: int
    batch: int
    machine: dict[str, Any]
    clocks: dict[str, dict[str, int]]
    energy_source: str | None
    date: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": "benchmark",
            "date": self.date,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "batch": self.batch,
            "turns": len(self.contenders[0].turns),
            "machine": self.machine,
            "clocks_mhz": self.clocks,
            "energy_source": self.energy_source,
            "contenders": [self._figures(found) for found in self.contenders],
            "ratios": self.ratios(),
        }

    def _figures(self, found: Measured) -> dict[str, Any]:
        latencies = found.latencies
        return {
            "name": found.name,
            "kind": found.kind,
            "runs_on": found.runs_on,
            "precision": found.precision,
            "model_hash": found.model_hash,
            "parity": found.parity.to_json(),
            "load_seconds": found.load,
            "first_token_after_start_seconds": found.load + found.first_prefill,
            "time_to_first_token_seconds": found.prefill,
            "prefill_tokens_per_second": self.batch * self.prompt / found.prefill,
            "decode_tokens_per_second": found.decode_rate(self.batch),
            "latency_ms": {f"p{p}": 1000 * percentile(latencies, p) for p in PERCENTILES},
            "bytes_per_step": found.bytes_per_step,
            "bandwidth_gb_s": _median([turn.bandwidth for turn in found.turns]),
            "share_of_bandwidth": found.share_of_bandwidth(),
            "joules_per_token": found.joules_per_token,
            "peak_host_bytes": found.peak_host_bytes,
            "host_bytes_before": found.host_bytes_before,
            "peak_device_bytes": found.peak_device_bytes,
            "turns": [asdict(turn) for turn in found.turns],
        }

    def ratios(self) -> dict[str, float] | None:
        """Speed of the first contender over the second: medians of the ratios, turn by turn; None without a second."""
        if len(self.contenders) < 2:
            return None
        pairs = list(zip(self.contenders[0].turns, self.contenders[1].turns, strict=True))
        return {
            "prefill": statistics.median(b.prefill / a.prefill for a, b in pairs),
            "decode": statistics.median(b.decode / a.decode for a, b in pairs),
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        lines = [self._where(), f"prompt of {self.prompt} tokens, {self.tokens} steps, batch {self.batch}, "
                 f"medians of {len(self.contenders[0].turns)} turns"]  # fmt: skip
        for found in self.contenders:
            lines += self._lines(found)
        ratios = self.ratios()
        if ratios:
            first, second = (found.name for found in self.contenders)
            lines.append(f"{first} over {second}: prefill {ratios['prefill']:.2f} x, decode {ratios['decode']:.2f} x")
        return "\n".join(lines)

    def _where(self) -> str:
        facts = self.machine
        names = [facts.get("board"), facts.get("gpu"), facts.get("cpu"), f"{facts['cores']} cores"]
        mode = [f"power mode {facts['power_mode']}"] if facts.get("power_mode") else []
        clocks = [f"{name} {mhz} MHz" for name, mhz in self.clocks["after"].items()]
        return ", ".join([str(name) for name in names if name] + mode + clocks)

    def _lines(self, found: Measured) -> list[str]:
        figures = self._figures(found)
        latency = ", ".join(f"{name} {value:.2f} ms" for name, value in figures["latency_ms"].items())
        share, joules = figures["share_of_bandwidth"], figures["joules_per_token"]
        lines = [
            f"{found.name}: {found.precision}, {found.runs_on}",
            f"  {found.parity.to_text()}",
            f"  prefill      {figures['prefill_tokens_per_second']:,.1f} tokens/s, "
            f"first token after {1000 * found.prefill:,.1f} ms",
            f"  decode       {figures['decode_tokens_per_second']:,.1f} tokens/s; {latency}",
            f"  load         {found.load:.2f} s, {figures['first_token_after_start_seconds']:.2f} s to the first token",
            f"  memory       {_memory(found)}",
        ]
        if share is not None:
            lines.append(
                f"  bandwidth    {100 * share:.0f} % of the {figures['bandwidth_gb_s']:.1f} GB/s that were measured"
            )
        if joules is not None:
            lines.append(f"  energy       {joules:.4g} J per token ({self.energy_source})")
        return lines


def _memory(found: Measured) -> str:
    parts = []
    if found.peak_host_bytes is not None:
        parts.append(f"host at most {found.peak_host_bytes / 1e6:,.0f} MB")
        if found.host_bytes_before is not None:
            parts[-1] += f" ({found.host_bytes_before / 1e6:,.0f} MB before opening)"
    if found.peak_device_bytes is not None:
        parts.append(f"device at most {found.peak_device_bytes / 1e6:,.0f} MB")
    return ", ".join(parts) or "unknown"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
