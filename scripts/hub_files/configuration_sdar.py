"""The configuration of an export for servers of block diffusion: keys as in config.json.

checkpointing/served.py puts it into such exports. transformers has no class for this model type.
"""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    model_type = "sdar"
