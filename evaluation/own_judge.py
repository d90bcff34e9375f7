"""An autoregressive network of this project as a judge: what judge.py asks of transformers' models
and tokenizers, answered by ours."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from checkpointing.families import MODEL_TYPES
from checkpointing.layouts import read_checkpoint
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.trained import begins_with_bos, trained_network, trained_tokenizer
from data.tokenizer import Tokenizer
from models.masks import Causal
from models.network import Network
from samplers.params import CONTEXT_TOKENS


class NextToken(nn.Module):
    """`backbone` called as a causal model of transformers. Padding stands behind the text, where a
    causal network does not see it."""

    def __init__(self, backbone: Network, mask_id: int):
        super().__init__()
        self.backbone, self.mask_id = backbone, mask_id

    def base_model(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        """.last_hidden_state [B, T, E]: as transformers has it, after the last normalisation."""
        hidden = self.backbone.hidden(input_ids, attention_mask=Causal())
        return SimpleNamespace(last_hidden_state=self.backbone.features(hidden))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        """.logits [B, T, V] of the token after each; the mask's are -inf."""
        logits = self.backbone.logits(self.backbone.hidden(input_ids, attention_mask=Causal()))
        logits[..., self.mask_id] = -torch.inf
        return SimpleNamespace(logits=logits)


class Words:
    """`words` called as a tokenizer of transformers, with the EOS of the checkpoint."""

    def __init__(self, words: Tokenizer):
        self.words, self.eos_token_id = words, words.eos_id
        self.eos_token = words.hf.convert_ids_to_tokens(words.eos_id)

    def get_vocab(self) -> dict[str, int]:
        return self.words.hf.get_vocab()

    def __call__(self, text: str, **options) -> dict:
        return {"input_ids": self.words.encode(text)}


def is_own(name_or_path: str) -> bool:
    """Whether it is a checkpoint of this project, an export or a model of the same family."""
    from transformers import PretrainedConfig

    if "://" in name_or_path or Path(name_or_path).expanduser().is_file():
        return True
    config, _ = PretrainedConfig.get_config_dict(name_or_path)
    return config.get("model_type") in MODEL_TYPES


def load_own(name_or_path: str, cache_dir=None) -> tuple[NextToken, Words, int, int | None]:
    """The network, its tokenizer, the tokens it sees and the BOS that begins its rows, if one does:
    then their last place is left out, where the network expects EOS. CheckpointError where it is no
    autoregressive one."""
    found = read_checkpoint(name_or_path)
    if found.algorithms != ("ar",):
        raise CheckpointError(
            f"it holds {' or '.join(found.algorithms)} weights, and a judge must be autoregressive"
        )
    words = trained_tokenizer(found, cache_dir=cache_dir)
    backbone = trained_network(found, words, "ar")
    network, context = NextToken(backbone, words.mask_id), found.length or CONTEXT_TOKENS
    if begins_with_bos(found):
        if context < 3:
            raise CheckpointError(f"its rows of {context} tokens hold nothing but BOS and EOS")
        return network, Words(words), context - 1, words.bos_id
    return network, Words(words), context, None
