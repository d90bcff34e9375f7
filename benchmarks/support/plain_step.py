"""The yardstick: a training step as published, written from the papers on bare tensors.

Nothing here is shared with the framework but the names of the parameters, so that both can be given
the same weights. As in the authors' code: a dense boolean (2L)^2 mask, logits of all 2L rows in
float32, log-softmax over the whole vocabulary, modulation per sample in every layer, an EMA that
walks over the parameters one by one.

    B batch   L tokens   S block size   V vocabulary with the mask token   E width   H heads
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-3
NEVER = -1e6  # the published stand-in for minus infinity


def block_diffusion_mask(length: int, block_size: int, device=None) -> Tensor:
    """[2L, 2L]: who sees whom over [x_t ; x0], true where seen (arXiv:2503.09573, section 3.1)."""
    index = torch.arange(2 * length, device=device)
    clean, block = index >= length, index % length // block_size
    q, k = block[:, None], block[None]
    same_half = clean[:, None] == clean[None]
    diagonal = (q == k) & same_half
    offset = (q > k) & clean[None] & ~clean[:, None]
    causal = (q >= k) & clean[None] & clean[:, None]
    return diagonal | offset | causal


def norm(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), [x.shape[-1]]) * weight


def conditioning(w: dict, sigma: Tensor) -> Tensor:
    steps = torch.arange(128, device=sigma.device, dtype=torch.float32)
    angles = sigma[:, None] * torch.exp(-math.log(10_000) * steps / 128)[None]
    x = torch.cat([torch.cos(angles), torch.sin(angles)], -1)
    x = F.linear(x, w["sigma_map.mlp.0.weight"], w["sigma_map.mlp.0.bias"])
    x = F.linear(F.silu(x), w["sigma_map.mlp.2.weight"], w["sigma_map.mlp.2.bias"])
    return F.silu(x)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def logits(w: dict, heads: int, tokens: Tensor, sigma: Tensor, mask, *, period: int) -> Tensor:
    """[B, T] -> [B, T, V], every row. mask: [T, T], or "causal", or None (all see all)."""
    x = w["vocab_embed.embedding"][tokens]
    width = x.shape[-1] // heads
    frequency = 1.0 / 10_000 ** (torch.arange(0, width, 2, device=x.device).float() / width)
    angles = (torch.arange(tokens.shape[1], device=x.device) % period)[:, None] * frequency[None]
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()
    adaln = "sigma_map.mlp.0.weight" in w
    c = conditioning(w, sigma) if adaln else None

    def modulation(name: str, parts: int):
        table = F.linear(c, w[f"{name}.weight"], w[f"{name}.bias"])[:, None]
        return table.chunk(parts, -1)

    layer = 0
    while f"blocks.{layer}.attn_qkv.weight" in w:
        name = f"blocks.{layer}"
        y = norm(x, w[f"{name}.norm1.weight"])
        if adaln:
            m = modulation(f"{name}.adaLN_modulation", 6)
            y = y * (1 + m[1]) + m[0]
        qkv = F.linear(y, w[f"{name}.attn_qkv.weight"])
        q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        q, k = rotary(q, cos, sin).to(v.dtype), rotary(k, cos, sin).to(v.dtype)
        if isinstance(mask, str):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = F.linear(y.transpose(1, 2).flatten(2), w[f"{name}.attn_out.weight"])
        x = x + (m[2] * y if adaln else y)
        y = norm(x, w[f"{name}.norm2.weight"])
        if adaln:
            y = y * (1 + m[4]) + m[3]
        y = F.linear(y, w[f"{name}.mlp.0.weight"], w[f"{name}.mlp.0.bias"])
        y = F.linear(
            F.gelu(y, approximate="tanh"), w[f"{name}.mlp.2.weight"], w[f"{name}.mlp.2.bias"]
        )
        x = x + (m[5] * y if adaln else y)
        layer += 1
    x = norm(x, w["output_layer.norm_final.weight"])
    if adaln:
        shift, scale = modulation("output_layer.adaLN_modulation", 2)
        x = x * (1 + scale) + shift
    return F.linear(x, w["output_layer.linear.weight"], w["output_layer.linear.bias"]).float()


def subs(scores: Tensor, x_t: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities [B, L, V]; a point mass where the token is visible."""
    scores[:, :, mask_id] += NEVER
    scores = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
    visible = x_t != mask_id
    scores[visible] = NEVER
    scores[visible, x_t[visible]] = 0
    return scores


def masked_loss(w, heads, x0, x_t, t, loss_mask, *, mask_id: int, block_size: int, mask=None):
    """bamdlm, and mdlm where block_size is L (one pass over x_t alone): the mean of the counted.

    t [B, N]. mask: that of `block_diffusion_mask`, made once by the caller as the authors do."""
    length = x0.shape[1]
    sigma = torch.zeros(len(x0), device=x0.device)
    tokens = x_t if mask is None else torch.cat([x_t, x0], -1)
    scores = logits(w, heads, tokens, sigma, mask, period=length)[:, :length]
    log_p = subs(scores, x_t, mask_id)
    log_p = torch.gather(log_p, -1, x0[:, :, None]).squeeze(-1)
    nll = -log_p / t.repeat_interleave(block_size, 1)
    return (nll * loss_mask).sum() / loss_mask.sum()


def score_entropy_loss(w, heads, x0, x_t, t, loss_mask, *, mask_id: int):
    """SEDD, loglinear: t [B, 1]."""
    sigma = torch.clamp(-torch.log1p(-t), max=-math.log(EPS))  # [B, 1]
    log_score = logits(w, heads, x_t, sigma[:, 0], None, period=x0.shape[1])
    expm1 = torch.expm1(sigma)
    log_score = log_score - expm1.log()[:, :, None] - math.log(log_score.shape[-1] - 1)
    log_score = torch.scatter(log_score, -1, x_t[..., None], torch.zeros_like(log_score[..., :1]))
    hidden = x_t == mask_id
    ratio = 1 / expm1.expand_as(x_t)[hidden]
    negative = ratio * torch.gather(log_score[hidden], -1, x0[hidden][:, None]).squeeze(-1)
    score = log_score[hidden].exp()
    positive = score[:, :mask_id].sum(-1) + score[:, mask_id + 1 :].sum(-1)
    entropy = torch.zeros(x_t.shape, device=x_t.device)
    entropy[hidden] += positive - negative + ratio * (ratio.log() - 1)
    nll = entropy * (expm1 / t)
    return (nll * loss_mask).sum() / loss_mask.sum()


def next_token_loss(w, heads, x0, loss_mask, *, mask_id: int):
    tokens, targets = x0[:, :-1], x0[:, 1:]
    sigma = torch.zeros(len(x0), device=x0.device)
    scores = logits(w, heads, tokens, sigma, "causal", period=x0.shape[1])
    scores[:, :, mask_id] = NEVER
    log_p = scores.log_softmax(-1).gather(-1, targets[:, :, None])[:, :, 0]
    return -(log_p * loss_mask[:, 1:]).sum() / loss_mask[:, 1:].sum()
