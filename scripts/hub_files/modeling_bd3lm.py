"""The model that transformers loads from an exported folder: BD3LM, and the samplers as `generate`.

checkpointing/export.py puts it into exports, beside the files of models/ and samplers/.
"""

from functools import partial

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from .denoiser import Denoiser, Score
from .hf import BD3LM as Network
from .hf import BD3LMConfig
from .masks import Causal, Full
from .noise_schedule import get_schedule
from .params import SamplingParams
from .request import TextRequest
from .writing import generate

__all__ = ["BD3LM", "BD3LMConfig", "BD3LMForCausalLM"]

SEDD_STEPS = 1000  # as in the paper


class BD3LM(Network):
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        num_samples: int = 1,
        max_length: int | None = None,
        seed: int = 1,
        **params,
    ) -> Tensor:
        """Texts, int64 [B, max_length]; behind the end of a shorter one (var_length) stands EOS.

        input_ids [B, P]: prompts, BOS included; mask tokens in them are filled. Without them
        `num_samples` texts that begin with BOS. max_length: the trained length, if not given; a
        block diffusion model writes any multiple of its block size. params: fields of
        samplers/params.py, such as nucleus_p, steps, num_steps, block_size (any, of a block
        diffusion model), context_size, var_length, batch_size. The same seed gives the same texts.
        """
        config = self.config
        if input_ids is None:
            if config.bos_token_id is None:
                raise ValueError("config.json has no bos_token_id: give input_ids")
            input_ids = torch.full((num_samples, 1), config.bos_token_id)
        length = max_length or config.model_length
        own = ("input_ids", "num_samples", "max_length")
        params = self._params(len(input_ids), length).changed(own, seed=seed, **params)
        requests = [TextRequest(i, tuple(row)) for i, row in enumerate(input_ids.tolist())]
        device = self.backbone.embeddings.device
        texts = torch.full((len(requests), params.length), params.eos_id)
        training = self.training
        self.eval()
        try:
            asked = self._asked(params.block_size)
            made = generate(config.algo, asked, requests, params, device=device)
            for samples in made:
                for sample in samples:
                    texts[sample.row, : len(sample.tokens)] = sample.tokens
        finally:
            self.train(training)
        return texts

    def _params(self, rows: int, length: int) -> SamplingParams:
        config = self.config
        schedule = get_schedule(config.noise, config.mdlm_loss_scale)
        return SamplingParams(
            length=length,
            bos_id=config.bos_token_id,
            eos_id=config.eos_token_id,
            batch_size=rows,
            block_size=config.block_size if config.algo == "bamdlm" else 1,
            context_size=config.model_length,
            window=min(config.model_length, length),
            kv_cache=config.algo in ("ar", "bamdlm"),
            num_steps=SEDD_STEPS if config.algo == "sedd" else 0,
            move_chance=lambda t: schedule(t).p,
        )

    def _asked(self, block_size: int):
        """What the samplers ask: see denoiser.py. block_size: bamdlm's."""
        config = self.config
        if config.algo == "sedd":
            return Score(self.backbone, config.mask_token_id, config.time_conditioning)
        ask = partial(Denoiser, self.backbone, config.mask_token_id)
        if config.algo == "bamdlm":
            return ask(block_size, self.adapt.sampling_mask(block_size), self.adapt)
        return ask(1, {"ar": Causal(), "mdlm": Full()}[config.algo])


class BD3LMForCausalLM(BD3LM):
    """An ar model as others ask it, such as lm-eval's `hf`: row i of the logits is about token
    i + 1, and the mask, which is no word, is left out."""

    def forward(self, *args, **kwargs) -> CausalLMOutput:
        logits = super().forward(*args, **{**kwargs, "return_dict": True}).logits
        mask = torch.arange(logits.shape[-1], device=logits.device) == self.config.mask_token_id
        return CausalLMOutput(logits=logits.masked_fill(mask, -torch.inf))
