"""The networks as Hugging Face models, with the configuration and the forward pass of the published
BD3-LM classes.

Weights are saved under `backbone.` in safetensors, as published. scripts/export_hf.py copies this
folder's files beside them, for where this project is not installed.
"""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .adaptation import Adaptation, open_blocks
from .cache import KVCache
from .dit import DiT
from .llama import Llama, LlamaRotary
from .masks import AttentionMask, BlockDiffusion, Causal, CausalClean, Full

DEFAULTS = {  # of config.json, beside those of transformers
    "adapt": None,  # what is other than in Adaptation, by the settings adapt.*
    "algo": None,
    "begins_with_bos": False,
    "block_size": 1,
    "vocab_size": 50258,
    "model_length": 1024,
    "cross_attn": True,
    "adaln": True,
    "attn_backend": "sdpa",
    "causal": False,
    "hidden_dim": 768,
    "cond_dim": 128,
    "n_blocks": 12,
    "n_heads": 12,
    "dropout": 0.1,
    "time_conditioning": False,
    "var_min": True,
    "sampling_eps_min": 1e-3,
    "sampling_eps_max": 1.0,
    "mask_token_id": None,
    "llama": None,  # fields of LlamaShape; None: the network is DiT
}


class BD3LMConfig(PretrainedConfig):
    """The published keys, and what a sampler needs to know: `algo` (without it, what the published
    switches imply), the ids of special tokens and whether its training rows begin with BOS."""

    model_type = "bd3lm"
    attribute_map: ClassVar = {"max_position_embeddings": "model_length"}  # where others look

    def __init__(self, **given):
        for name, default in DEFAULTS.items():
            setattr(self, name, given.pop(name, default))
        self.algo = self.algo or _implied(self.causal, self.cross_attn, self.time_conditioning)
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__init__(**{"bos_token_id": None, "eos_token_id": None} | given)


def _implied(causal: bool, cross_attn: bool, time_conditioning: bool) -> str:
    if causal:
        return "ar"
    if cross_attn:
        return "bamdlm"
    return "sedd" if time_conditioning else "mdlm"


def _network(config: BD3LMConfig) -> DiT | Llama:
    shared = {"dropout": config.dropout, "attn_backend": config.attn_backend}
    if config.llama is not None:
        return Llama(**config.llama, **shared)
    return DiT(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_dim,
        cond_dim=config.cond_dim,
        n_blocks=config.n_blocks,
        n_heads=config.n_heads,
        adaln=config.adaln,
        **shared,
    )


class BD3LM(PreTrainedModel):
    """`backbone` is the network; the buffers sampling_eps_min/max keep the clipped schedule."""

    config_class = BD3LMConfig
    base_model_prefix = "bd3lm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.backbone = _network(config)
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(float(config.sampling_eps_min)))
            self.register_buffer("sampling_eps_max", torch.tensor(float(config.sampling_eps_max)))
        self.post_init()

    def _init_weights(self, module):
        """Networks initialise themselves, and every weight of an export is in the file; what
        follows from config.json is not."""
        if isinstance(module, LlamaRotary):
            module.reset()

    @property
    def adapt(self) -> Adaptation:
        return Adaptation.named(**(self.config.adapt or {}))

    def get_input_embeddings(self):
        return self.backbone.embed

    def mask_for(self, sample_mode: bool) -> AttentionMask:
        """Who sees whom: the algorithm's training form, or the one of sampling."""
        if self.config.causal:
            return Causal()
        if not self.config.cross_attn:
            return Full()
        make = self.adapt.sampling_mask if sample_mode else self.adapt.training_mask
        return make(self.config.block_size)

    def _sigma(self, timesteps: Tensor | None) -> Tensor | None:
        if not self.config.time_conditioning:
            return None
        if timesteps is None:
            raise ValueError("this model is conditioned on time: give timesteps [B]")
        return timesteps.flatten()

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        sample_mode: bool = False,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput:
        """Raw logits of input_ids [B, T].

        A block diffusion model takes [x_t ; x_0] of twice the length and answers for the x_t half,
        or with `sample_mode` the sequence so far and answers for all of it; then `cache` (from
        `model.backbone.new_cache`) holds what was committed before. With adapt.label=next row i is
        about token i + 1, and [x_t ; x_0] is answered whole. timesteps [B]: noise level sigma, for
        time-conditioned models. attention_mask [B, T or T/2]: 0 at padding.
        """
        mask = self.mask_for(sample_mode) if cache is None else cache.attention_mask
        sigma, document_ids = self._sigma(timesteps), None
        if attention_mask is not None and not bool(attention_mask.all()):
            times = input_ids.shape[1] // attention_mask.shape[1]
            document_ids = attention_mask.long().repeat(1, times)
        asked = mask.answered(input_ids.shape[1]) if isinstance(mask, BlockDiffusion) else None
        opened = None
        if isinstance(mask, CausalClean):
            first = None if cache is None else cache.committed
            opened = open_blocks(input_ids, self.config.mask_token_id, mask.block_size, first)
        with self.backbone.states(asked) if output_hidden_states else nullcontext() as states:
            hidden = self.backbone.hidden(
                input_ids,
                sigma,
                attention_mask=mask,
                document_ids=document_ids,
                open_blocks=opened,
                cache=cache,
            )
        logits = self.backbone.logits(hidden, sigma)
        output = MaskedLMOutput(logits=logits, hidden_states=states and tuple(states))
        return output.to_tuple() if return_dict is False else output
