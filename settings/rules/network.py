"""What must hold between the settings of the algorithm and of its network."""

from collections.abc import Iterator

from settings.defaults import needs_block_mask, sized_by_checkpoint
from settings.schema import Config
from settings.tables import algorithms, names_with


def network(config: Config) -> Iterator[str]:
    model, algo = config.model, config.algo
    if model.length % config.block_size:
        yield f"block_size={config.block_size} does not divide model.length={model.length}"
    if algo.backbone == "llama" and algo.time_conditioning:
        yield (
            f"algo.backbone=llama takes no noise level, and algo={algo.name} tells it to its"
            " network: set algo.time_conditioning=False, or use algo.backbone=dit"
        )
    size, heads = f"model.hidden_size={model.hidden_size}", f"model.n_heads={model.n_heads}"
    width, rest = divmod(model.hidden_size, model.n_heads)
    if algo.backbone == "dit" and rest:
        yield f"{size} is not a multiple of {heads}"
    elif algo.backbone == "dit" and width % 2:
        yield f"{size} / {heads} is odd: rotary positions need an even width per head"
    elif algo.backbone == "llama" and not sized_by_checkpoint(config):
        if model.head_dim is None:
            yield f"{size} is not a multiple of {heads}: set model.head_dim"
        elif model.head_dim % 2:
            odd = f"model.head_dim={model.head_dim} (null: hidden_size / n_heads) is odd"
            yield f"{odd}: rotary positions need an even width per head"
        if model.n_heads % model.n_kv_heads:
            yield f"{heads} is not a multiple of model.n_kv_heads={model.n_kv_heads}"


def algorithm(config: Config) -> Iterator[str]:
    algo, blocks = config.algo, config.block_size < config.model.length
    entry = algorithms()[algo.name]
    for key in ("parameterization", "sampler"):
        if (value := getattr(algo, key)) != entry[key]:
            yield f"algo.{key}={value} does not fit algo={algo.name}, which needs {entry[key]}"
    whole = entry["noise"] and not entry["blocks"]
    windows = "steps" in entry["can"] and config.mode in ("sample_eval", "demo")
    if whole and blocks and not windows:
        yield (
            f"block_size={config.block_size}: algo={algo.name} is one block of"
            f" model.length={config.model.length}; blocks are algo=bamdlm"
        )
    if algo.time_conditioning and not entry["time_conditioning"]:
        yield (
            f"algo.time_conditioning=True: algo={algo.name} does not tell its network the noise"
            f" level, only {names_with('time_conditioning')} does; set it to False"
        )
    if needs_block_mask(config) and not algo.cross_attn:
        yield f"algo.cross_attn=False: algo={algo.name} with blocks below model.length needs it"
    for key, does in (("cross_attn", "has blocks to cross"), ("var_min", "clips its schedule")):
        if getattr(algo, key) and not entry["blocks"]:
            only = f"only {names_with('blocks')} {does}"
            yield f"algo.{key}=True does not fit algo={algo.name}: {only}"
    if algo.mdlm_loss_scale and config.noise.type != "loglinear":
        yield f"algo.mdlm_loss_scale=True is defined for noise=loglinear, not {config.noise.type}"
