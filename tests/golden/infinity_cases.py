"""Golden cases of the official Infinity code and of StageVAR as released on it."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.accelerators.stagevar import StageVAR
from stagevar.models.base import Around, LoadedModel, Sampling, Site
from stagevar.models.infinity.bits import BitResidual
from stagevar.models.infinity.blocks import AttentivePool, CrossAttention
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.layers import linear
from stagevar.sampling.generation import Generation
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, ScaleStep, StageSchedule, Steps, exact
from stagevar.schedule.grids import infinity_grids
from tests.golden.checks import Check, RecipeNoise, difference, load_arrays, load_recipe, mismatches


class _CodesOnly:
    """A tokenizer without pixels: the residual loop alone."""

    def __init__(self, residual: BitResidual):
        self.residual, self.latent_dim = residual, residual.latent_dim

    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        return code_sum_BdHW


class _NoText:
    def encode(self, prompts: Any) -> Any:
        raise AssertionError("golden cases bring their own text features")


def build(case: dict[str, Any]) -> tuple[LoadedModel, list[Check]]:
    """The model of a case on recipe weights, and whether its state dict has the reference's names."""
    c = case["config"]
    grids, rope_grid = infinity_grids(c["pn"], c.get("hdw", 1.0))
    residual = BitResidual(grids, c["d"], bool(c.get("patchify", 0)))
    config = InfinityConfig(
        depth=c["depth"],
        width=c["embed_dim"],
        heads=c["num_heads"],
        chunks=c["block_chunks"],
        token_bits=residual.token_bits,
        text_dim=c["Ct5"],
        text_maxlen=c["text_maxlen"],
        level_embedding_every_chunk=not c.get("lvl_first", 1),
    )
    model = Infinity(config)
    checks = load_recipe(model, case["shapes"])
    model.set_grids(grids, rope_grid)
    insertion = c.get("ins", [0])
    sampling = Sampling(
        guidance=tuple(c["cfg"]),
        temperature=tuple(c["tau"]),
        top_k=1 if case.get("mode") == "argmax" else 0,
        logits_guidance=0 in insertion,
        inner_guidance_layers=tuple(c["depth"] + n for n in insertion if n < 0),
    )
    pixels = (16 * grids[-1][0], 16 * grids[-1][1])
    loaded = LoadedModel(
        "golden", model, _CodesOnly(residual), _NoText(), sampling, grids, pixels, torch.device("cpu"), torch.float32
    )
    return loaded, checks


def text_rows(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Ragged features of the prompts and, where the case has them, of the negative prompts."""
    prompts = list(torch.from_numpy(arrays["text_kv"]).split(config["lens"]))
    if "neg_kv" not in arrays:
        return prompts, None
    rows = torch.from_numpy(arrays["neg_kv"])
    lengths = config.get("neg")
    if not isinstance(lengths, list) or sum(lengths) != len(rows):
        lengths = [len(rows) // len(prompts)] * len(prompts)
    return prompts, list(rows.split(lengths))


class Recorder(Sampler):
    """A sampler that keeps logits, bits and what else a case compares."""

    def __init__(self, model: LoadedModel, accelerator: Accelerator | None = None):
        super().__init__(model, accelerator)
        self.logits: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        self.logits[step.scale] = logits_BLV.reshape(logits_BLV.shape[0], -1, 2)
        self.tokens[step.scale] = tokens

    def run(self, case: dict[str, Any], arrays: dict[str, np.ndarray], steps: Steps) -> Generation:
        prompts, negative = text_rows(arrays, case["config"])
        batch = len(prompts)
        generation = self.begin(
            [""] * batch,
            [0] * batch,
            steps=steps,
            noise=RecipeNoise(batch, case["tag"]),
            encoded=prompts,
            encoded_negative=negative,
        )
        for step in steps:
            self.advance(generation, step)
        return generation

    def compare(self, generation: Generation, arrays: dict[str, np.ndarray], logits_limit: float) -> list[Check]:
        """Logits, bits, codes, next inputs and the code sum, where the case holds them."""
        residual = self.model.tokenizer.residual
        assert isinstance(residual, BitResidual)
        checks = []
        for scale, tokens in self.tokens.items():
            if f"logits_s{scale}" in arrays:
                checks.append(
                    difference(f"logits@s{scale}", self.logits[scale], arrays[f"logits_s{scale}"], logits_limit)
                )
            if f"bits_s{scale}" in arrays:
                bits = residual.latent_bits(tokens.float(), scale).permute(0, 2, 3, 1)[:, None]
                checks.append(mismatches(f"bits@s{scale}", bits, arrays[f"bits_s{scale}"]))
            if f"codes_s{scale}" in arrays:
                codes = residual.codes(tokens, scale)[:, :, None]
                checks.append(difference(f"codes@s{scale}", codes, arrays[f"codes_s{scale}"], 1e-5))
            if f"word_in_s{scale}" in arrays:
                word_in = residual.next_input(generation.code_sum_before(scale), scale)
                checks.append(difference(f"word_in@s{scale}", word_in, arrays[f"word_in_s{scale}"], 1e-5))
        if "summed_codes" in arrays:
            golden = arrays["summed_codes"].reshape(generation.code_sum_BdHW.shape)
            checks.append(difference("summed_codes", generation.code_sum_BdHW, golden, 1e-5))
        return checks


def _bf16_text_attention(transformer: Infinity) -> None:
    """The official cast of q, k and v to bfloat16 around every attention to text, the pooling included."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(*(t.bfloat16().float() for t in (q, k, v)), attn_mask=mask)
        return out.bfloat16().float()

    def cross(self: CrossAttention, x_RLC: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = linear(x_RLC, self.mat_q).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return linear(attend(q, k, v, mask).transpose(1, 2).flatten(2), self.proj)

    def pool(self: AttentivePool, text_RTD: Tensor, mask: Tensor | None) -> Tensor:
        kv = F.linear(text_RTD, self.mat_kv.weight, torch.cat([self.zero_k_bias, self.v_bias]))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.mat_q[:, :, None].expand(text_RTD.shape[0], -1, -1, -1)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(1))

    for block in transformer.layers():
        block.ca.forward = types.MethodType(cross, block.ca)  # type: ignore[method-assign]
    pooling = transformer.text_proj_for_sos.ca
    pooling.forward = types.MethodType(pool, pooling)


@torch.inference_mode()
def run_infinity(json_path: Path) -> list[Check]:
    """An `infinity_*` case: the exact model, step by step, and its decoder."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    loaded, checks = build(case)
    transformer = loaded.transformer
    assert isinstance(transformer, Infinity)
    logits_limit = 1e-4
    if json_path.stem.endswith("_bf16ca"):
        # A difference of 1e-7 before a bfloat16 rounding can become 4e-3 after it; the cast itself moves logits by 0.1.
        logits_limit = 2e-2
        _bf16_text_attention(transformer)
    block_outputs: dict[int, list[Tensor]] = {}
    for layer, block in enumerate(transformer.layers()):
        block.register_forward_hook(
            lambda module, inputs, output, layer=layer: block_outputs.setdefault(layer, []).append(output)
        )
    sampler = Recorder(loaded)
    schedule = exact(len(loaded.grids))
    if all(guidance == 1 for guidance in case["config"]["cfg"]):
        schedule = StageSchedule(0, cfg_delay=0, branch="cond")  # the reference then runs no unconditional half
    steps = schedule.expand(loaded.grids, sampler.chunks)
    generation = sampler.run(case, arrays, steps)
    checks += sampler.compare(generation, arrays, logits_limit)
    # A case that mixes the branches after a layer does not say on which side of the mix it kept that layer's output.
    mixed_layers = loaded.sampling.inner_guidance_layers
    for layer, outputs in block_outputs.items():
        if layer in mixed_layers:
            continue
        for scale, output in enumerate(outputs):
            if f"block{layer}_out_s{scale}" in arrays:
                checks.append(
                    difference(
                        f"block_out@{layer}_s{scale}", output, arrays[f"block{layer}_out_s{scale}"], logits_limit
                    )
                )
    checks += _text_checks(transformer, arrays, case["config"])
    if "rope_cos_sin" in arrays:
        golden = arrays["rope_cos_sin"]
        ours = transformer._rope[:, : golden.shape[1]]
        checks.append(difference("rope", ours, golden.reshape(2, -1, golden.shape[-1]), 1e-5))
    if "decoder_raw" in arrays:
        checks += _decoder_checks(case, arrays, loaded, generation)
    return checks


def _text_checks(transformer: Infinity, arrays: dict[str, np.ndarray], config: dict[str, Any]) -> list[Check]:
    prompts, negative = text_rows(arrays, config)
    rows = [*prompts, *(negative or [transformer.cfg_uncond[: len(p)] for p in prompts])]
    conditioning = transformer.condition(prompts, negative)
    if all(guidance == 1 for guidance in config["cfg"]):
        # The reference then runs, and so records, the conditional branch alone.
        rows, conditioning = prompts, conditioning.select(slice(0, len(prompts)))
    checks = []
    if "text_normed" in arrays:
        checks.append(difference("text_normed", transformer.text_norm(torch.cat(rows)), arrays["text_normed"], 1e-5))
    if "ca_kv" in arrays:
        ca_kv = transformer.text_proj_for_ca(transformer.text_norm(torch.cat(rows)))
        checks.append(difference("ca_kv", ca_kv, arrays["ca_kv"], 1e-5))
    if "sos" in arrays:
        checks.append(difference("sos", conditioning.pooled_RC, arrays["sos"], 1e-5))
    if "gss" in arrays:
        gss = transformer.shared_ada_lin(conditioning.pooled_RC).view(arrays["gss"].shape)
        checks.append(difference("gss", gss, arrays["gss"], 1e-5))
    return checks


def _decoder_checks(
    case: dict[str, Any], arrays: dict[str, np.ndarray], loaded: LoadedModel, generation: Generation
) -> list[Check]:
    from stagevar.models.infinity.tokenizer import BSQVAE
    from stagevar.sampling.pixels import to_uint8

    c = case["config"]
    residual = loaded.tokenizer.residual
    assert isinstance(residual, BitResidual)
    vae = BSQVAE(c["d"], loaded.grids, patchify=bool(c.get("patchify", 0)), base_ch=c["base_ch"])
    checks = load_recipe(vae, case["vae_shapes"], "vae:")
    raw = vae.decode(generation.code_sum_BdHW)
    checks.append(difference("decoder_raw", raw, arrays["decoder_raw"], 2e-4))
    if "image_uint8_bgr" in arrays:
        # Truncation can turn the smallest difference into one step of 255.
        checks.append(difference("image_uint8", to_uint8(raw)[..., ::-1], arrays["image_uint8_bgr"], 1))
    return checks


class _Probe(StageVAR):
    """StageVAR that keeps what it projected, ran and restored, per (scale, chunk)."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        inner, scale = super().around(context, updates), context.step.scale

        def around(site: Site, x: Tensor, positions: Tensor | None, run: Any) -> Tensor:
            if site.kind != "chunk":
                return inner(site, x, positions, run)
            key = f"s{scale}_c{site.index}"

            def probed(small: Tensor, small_positions: Tensor | None) -> Tensor:
                self.seen[f"proj_{key}"] = small
                out = run(small, small_positions)
                self.seen[f"lowrank_out_{key}"] = out
                return out

            reduced = context.step.reduction is not None
            if reduced:
                self.seen[f"proj_src_{key}"] = x
                energy = x.float().square().sum(-1)
                self.seen[f"prob_{key}"] = energy / energy.sum(-1, keepdim=True)
            y = inner(site, x, positions, probed)
            self.seen[f"rtr_out_{key}" if reduced else f"cache_{key}"] = y
            return y

        return around


def fastervar_schedule(case: dict[str, Any], scales: int) -> StageSchedule:
    """The released method as parameters: low rank at the last three scales, guidance off where the case's cfg is 0."""
    config = case["config"]
    off = [scale for scale, guidance in enumerate(config["cfg"]) if guidance == 0]
    start = scales - 3
    skip = tuple(range(scales - 2, scales)) if config.get("skip") else ()
    return StageSchedule(
        structure_end=start, cfg_delay=off[0] - start if off else None, energy=float(config["alpha"]), skip=skip
    )


@torch.inference_mode()
def run_fastervar(json_path: Path) -> list[Check]:
    """A `fastervar_*` case: StageVAR as released."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    loaded, checks = build(case)
    probe = _Probe()
    sampler = Recorder(loaded, probe)
    steps = fastervar_schedule(case, len(loaded.grids)).expand(loaded.grids, sampler.chunks)
    generation = sampler.run(case, arrays, steps)
    checks += sampler.compare(generation, arrays, 2e-4)
    scales_run = [step.scale for step in steps if not step.skipped]
    checks.append(mismatches("scales_run", np.array(scales_run), arrays["scales_run"]))
    rows = [len(step.branches) * generation.batch for step in steps if not step.skipped]
    checks.append(mismatches("batch_rows", np.array(rows), arrays["batch_rows"]))
    checks += _cache_lengths(generation, arrays)
    for key, golden in arrays.items():
        kind = next(
            (k for k in ("proj_src_", "proj_", "prob_", "lowrank_out_", "rtr_out_", "cache_") if key.startswith(k)),
            None,
        )
        if key.startswith("keep_"):
            index = _drawn(probe, sampler, generation, steps, key)
            checks.append(mismatches(f"keep@{key[5:]}", index, golden.astype(np.int64)))
        elif key.startswith("ranks_s"):
            step = steps[int(key.removeprefix("ranks_s"))]
            checks.append(mismatches(f"ranks@{step.scale}", np.array(step.reduction.ranks), golden))  # type: ignore[union-attr]
        elif kind is not None:
            ours = probe.seen[key.removesuffix("_every16")]
            if key.endswith("_every16"):
                ours = ours[:, ::16]
            limit = {"proj_": 5e-4, "prob_": 1e-6, "cache_": 2e-4, "proj_src_": 2e-3}.get(kind, 2e-3)
            checks.append(difference(f"{kind.rstrip('_')}@{key.removeprefix(kind)}", ours, golden, limit))
    return checks


def _drawn(probe: _Probe, sampler: Recorder, generation: Generation, steps: Steps, key: str) -> Tensor:
    from stagevar.accelerators.stagevar import draw_indices

    _, scale_part, chunk_part = key.split("_")
    scale, chunk = int(scale_part[1:]), int(chunk_part[1:])
    step = steps[scale]
    source = probe.seen[f"proj_src_s{scale}_c{chunk}"]
    uniform = generation.noise.at(scale, step.branches).site_uniform("index", Site("chunk", chunk), (source.shape[1],))
    return draw_indices(source, step.reduction.ranks[chunk], uniform)  # type: ignore[union-attr]


def _cache_lengths(generation: Generation, arrays: dict[str, np.ndarray]) -> list[Check]:
    """Cache rows and lengths per layer after each run scale."""
    ours = []
    run = [i for i, step in enumerate(generation.steps) if not step.skipped]
    for i in run:
        step, lengths = generation.steps[i], generation._saved[i + 1].lengths
        branch = BOTH.index(step.branches[0])
        ours.append([[len(step.branches) * generation.batch, length] for length in lengths[branch]])
    return [mismatches("kv_batch_len", np.array(ours), arrays["kv_batch_len"])]
