"""From settings to what the cost of training depends on."""

import torch

from models.llama import Llama
from models.network import Network
from modes.build import build_counts, interval
from noise_schedule import get_schedule
from objectives import algorithms
from objectives.counts import CountLaw
from objectives.sizes import shares_of_steps
from settings import Config
from settings.defaults import noise_block
from training.flops import NetworkShape
from training.optimizers import trained


def build_shape(config: Config, backbone: Network) -> NetworkShape:
    """What the cost of training depends on."""
    algo, law, share = config.algo, build_counts(config), 1.0
    schedule = config.training.block_schedule
    drawn = config.training.block_sizes
    if schedule is not None:
        drawn = shares_of_steps(schedule, config.trainer.max_steps)
    sizes = drawn or {noise_block(config): 1.0}
    if law is not None and config.training.views == 1:
        share = sum(weight * expected_share(law, size) for size, weight in sizes.items())
    elif law is None and algorithms.get_algorithm(algo.name).noise:
        times = torch.linspace(*interval(config.training), 1001, dtype=torch.float64)
        schedule = get_schedule(config.noise.type, algo.mdlm_loss_scale)
        share = float(schedule(times).p.mean())
    return NetworkShape(
        algo=algo.name,
        hidden_size=backbone.hidden_size,
        n_blocks=len(backbone.blocks),
        vocab_size=backbone.vocab_size,
        length=config.model.length,
        block_size=config.block_size,
        masked_share=share,
        views=config.training.views,
        sizes=drawn,
        causal_clean=config.adapt.clean == "causal",
        answers_clean=config.adapt.label == "next" or config.adapt.ar_loss > 0,
        ar_loss=config.adapt.ar_loss > 0,
        adapters=None if config.lora.rank is None else adapter_weights(backbone),
        **_layers(backbone),
    )


def adapter_weights(backbone: Network) -> int:
    """Of the adapters of a layer; without those of the modulation, which has one row a batch."""
    named = trained(backbone.blocks[0])
    return sum(p.numel() for name, p in named if "adaLN_modulation" not in name)


def expected_share(law: CountLaw, size: int) -> float:
    """Of a block of `size` tokens that the law masks, on average."""
    m = torch.arange(1, size + 1)
    return float((m * law.chance(m, torch.tensor(size))).sum() / size)


def _layers(backbone: Network) -> dict:
    """Widths of NetworkShape that are not the DiT's."""
    if not isinstance(backbone, Llama):
        return {}
    shape = backbone.shape
    return {
        "query_width": shape.n_heads * shape.head_dim,
        "key_width": shape.n_kv_heads * shape.head_dim,
        "mlp_weights": 3 * shape.hidden_size * shape.ffn_size,
        "qk_norm": shape.qk_norm,
    }
