"""Writers of the layouts that `rwkv_edge.checkpoints.layouts` reads: official weights → what another tool stores.

They repeat what the tools' converters were observed to do (each was run against the readers once; see the sources that
the reader's module names).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

LINEARS = r"\.(att|ffn)\.(receptance|key|value|output|gate)\.weight$"


def transformers_names(weights: Mapping[str, torch.Tensor]) -> Weights:
    """RWKV-4 as transformers, RWKV-5 and RWKV-6 as the repositories of the organisation RWKV."""
    letters = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^emb\.", "embeddings.", name).replace("blocks.0.ln0", "blocks.0.pre_ln")
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        name = re.sub(r"\.time_mix_([kvrg])$", lambda m: f".time_mix_{letters[m[1]]}", name)
        renamed[name if name == "head.weight" else f"rwkv.{name}"] = tensor
    return renamed


_FLA_ENDS = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
_FLA_PARTS = {
    "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj", "att.gate": "attn.g_proj",
    "att.output": "attn.o_proj", "att.ln_x": "attn.g_norm", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm",
}  # fmt: skip


def _fla_name(name: str) -> str:
    """The name of a tensor that both of fla's versions store as it is."""
    if name in _FLA_ENDS:
        return _FLA_ENDS[name]
    name = re.sub(r"^ln_out\.", "model.norm.", name)
    found = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
    if found is None:
        return re.sub(r"^blocks\.(\d+)\.att\.", r"model.layers.\1.attn.", name).replace("blocks.", "model.layers.")
    part = _FLA_PARTS.get(found[2], found[2])
    return f"model.layers.{found[1]}.{part}.{found[3]}"


def fla_7(weights: Mapping[str, torch.Tensor], stacked: bool = False) -> Weights:
    """RWKV-7 as fla; ``stacked`` as its first releases stored the token shifts, in one x_x [6, D]."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        low = re.match(r"blocks\.(\d+)\.att\.([wavg])([012])$", name)
        if low and low[1] == "0" and low[2] == "v":
            continue  # layer 0 has no value residual
        if low:
            place = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[low[3]]
            value = tensor.flatten() if low[3] == "0" else tensor.t()
            renamed[f"model.layers.{low[1]}.attn.{low[2]}_lora.lora.{place}"] = value.contiguous()
        elif name.endswith((".k_k", ".k_a", ".ffn.x_k")):
            renamed[_fla_name(name)] = tensor.flatten()
        else:
            renamed[_fla_name(name)] = tensor
    if stacked:
        for i in range(sum(name.endswith("attn.r_k") for name in renamed)):
            rows = [renamed.pop(f"model.layers.{i}.attn.x_{x}").flatten() for x in "rwkvag"]
            renamed[f"model.layers.{i}.attn.x_x"] = torch.stack(rows)
    return renamed


def fla_6(weights: Mapping[str, torch.Tensor]) -> Weights:
    """RWKV-6 as fla, which orders the five mixes r, w, k, v, g."""
    renamed: Weights = {}
    order = [3, 0, 1, 2, 4]  # of the official w, k, v, r, g
    plain = {"time_decay": "w_proj.linear.lora.2.bias", "time_faaaa": "bonus", "time_maa_x": "x_proj.0.mu"}
    low = {"time_decay_w1": "w_proj.linear.lora.0.weight", "time_decay_w2": "w_proj.linear.lora.2.weight"}
    for name, tensor in weights.items():
        att = re.match(r"blocks\.(\d+)\.att\.(time_\w+)$", name)
        stem = f"model.layers.{att[1]}.attn" if att else ""
        if att and att[2] in plain:
            renamed[f"{stem}.{plain[att[2]]}"] = tensor if att[2] == "time_faaaa" else tensor.flatten()
        elif att and att[2] in low:
            renamed[f"{stem}.{low[att[2]]}"] = tensor.t().contiguous()
        elif att and att[2] == "time_maa_w1":
            renamed[f"{stem}.x_proj.0.linear.weight"] = tensor.t().unflatten(0, (5, -1))[order].flatten(0, 1)
        elif att and att[2] == "time_maa_w2":
            renamed[f"{stem}.x_proj.2.weight"] = tensor[order].flatten(0, 1).t().contiguous()
        elif not att:
            renamed[_fla_6_name(name)] = tensor.flatten() if ".time_maa_" in name else tensor
    for i in range(sum(name.endswith("attn.bonus") for name in renamed)):
        rows = [weights[f"blocks.{i}.att.time_maa_{x}"].flatten() for x in "rwkvg"]
        renamed[f"model.layers.{i}.attn.x_bias"] = torch.stack(rows)
    return renamed


def _fla_6_name(name: str) -> str:
    name = _fla_name(name)
    name = re.sub(r"\.attn\.([rkvg])_proj\.weight$", r".attn.\1_proj.linear.weight", name)
    name = re.sub(r"\.ffn\.(key|receptance)\.weight$", r".ffn.\1.linear.weight", name)
    return name.replace(".ffn.time_maa_k", ".ffn.key.mu").replace(".ffn.time_maa_r", ".ffn.receptance.mu")


_WEB_TRANSPOSED = r"w1|w2|a1|a2|g1|g2|v1|v2|time_state|lora\.0"


def web_rwkv(weights: Mapping[str, torch.Tensor]) -> Weights:
    """What web-rwkv's converter writes, models, adapters and states alike: fp16, renamed, small matrices transposed."""
    gateless = not any("gate.weight" in name for name in weights)
    old_5 = not gateless and weights.get("blocks.0.att.time_decay", torch.empty(1, 1)).dim() == 1
    renamed = {}
    for name, tensor in weights.items():
        if old_5 and name.endswith(("time_decay", "time_faaaa")):
            size = weights["blocks.0.att.key.weight"].shape[0] // tensor.shape[0]
            tensor = tensor[:, None].repeat(1, size)
        for old, new in (
            ("time_faaaa", "time_first"), ("time_maa", "time_mix"), ("lora_A", "lora.0"), ("lora_B", "lora.1"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if re.search(_WEB_TRANSPOSED, name):
            tensor = tensor.transpose(-2, -1)
        renamed[name.lower()] = tensor.half().contiguous()
    return renamed


def behind_prefix(weights: Mapping[str, torch.Tensor], prefix: str = "_forward_module.model.") -> Weights:
    """As Lightning and DeepSpeed dump a wrapped module."""
    return {prefix + name: tensor for name, tensor in weights.items()}


def save_st(weights: Mapping[str, torch.Tensor], path: Path) -> Path:
    """One safetensors file; returns ``path``."""
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path)
    return path


def save_bin(weights: Mapping[str, torch.Tensor], path: Path) -> Path:
    """One file of ``torch.save``; returns ``path``."""
    torch.save({name: tensor.clone() for name, tensor in weights.items()}, path)
    return path


def save_sharded(weights: Mapping[str, torch.Tensor], folder: Path, stem: str = "model", shards: int = 3) -> Path:
    """A Hugging Face folder of shards: stem 'model' for safetensors, 'pytorch_model' for ``torch.save``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save: Callable[[Mapping[str, torch.Tensor], Path], Path]
    suffix, save = ("safetensors", save_st) if stem == "model" else ("bin", save_bin)
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: weights[name] for name in names[i::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def targets_of(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The linears that fine-tuners change, without '.weight'."""
    return [name.removesuffix(".weight") for name in weights if re.search(LINEARS, name)]


def random_lora(weights: Mapping[str, torch.Tensor], rank: int = 4, seed: int = 0) -> Weights:
    """A LoRA of all linears, in RWKV-PEFT's names and the weights' dtype."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for target in targets_of(weights):
        weight = weights[f"{target}.weight"]
        out, inner = weight.shape
        adapter[f"{target}.lora_A"] = (torch.randn(rank, inner, generator=generator) * 0.2).to(weight.dtype)
        adapter[f"{target}.lora_B"] = (torch.randn(out, rank, generator=generator) * 0.2).to(weight.dtype)
    return adapter
