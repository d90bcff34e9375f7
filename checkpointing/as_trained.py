"""What shapes cannot show: settings under which a checkpoint's weights mean what they mean.

Every setting of model.*, algo.* and adapt.* is compared at every load but those of MAY_DIFFER, so a
new one is too. What a checkpoint does not say had the default.
"""

import functools
import os
import reprlib

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import ALIASES
from checkpointing.restricted_pickle import CheckpointError
from data.tokenizer import Tokenizer
from random_streams import VERSION
from settings.composing import composed_defaults
from settings.keys import LEAVES, get
from settings.schema import Config

MAY_DIFFER = {
    # the names and shapes of weights show them
    "model.hidden_size",
    "model.cond_dim",
    "model.n_blocks",
    "model.n_heads",
    "model.adaln",
    # how it is trained or computed
    "adapt.ar_loss",
    "model.dropout",
    "model.attn_backend",
    "model.compile",
    "model.activation_checkpointing",
    "model.param_dtype",
    # of llama, which is built as the checkpoint says
    "model.n_kv_heads",
    "model.head_dim",
    "model.ffn_size",
    "model.rope_theta",
    "model.rms_norm_eps",
    "model.qk_norm",
    "model.qkv_bias",
    "model.tied",
    # positions are relative
    "model.length",
    # compared by themselves: load.py, modes/build.py
    "algo.name",
    "algo.backbone",
    # of sampling alone
    "algo.T",
    "algo.sampler",
    # says that there are blocks; block_size says how many
    "algo.cross_attn",
    # published evaluations set them otherwise
    "algo.ignore_bos",
    "algo.mdlm_loss_scale",
    "algo.var_min",
    "algo.clip_search_delta",
    "algo.clip_search_widths",
    "algo.fix_clipping",
}


def check_as_trained(
    checkpoint: Checkpoint, config: Config | None, tokenizer: Tokenizer, name: str
) -> None:
    """CheckpointError where a run takes the weights otherwise than they were trained. config: None
    where the loader has no settings, so the defaults; name: of the tokenizer."""
    ours = written_here(checkpoint)
    record = checkpoint.config if ours else {}
    groups = ["model"]
    trained = section(record, "algo").get("name")
    if config is not None and ALIASES.get(trained, trained) == config.algo.name:
        groups += ["algo", "adapt"]
    found, algo = [], checkpoint.algorithms[0]
    for key in (key for key in LEAVES if key.split(".")[0] in groups and key not in MAY_DIFFER):
        group, setting = key.split(".")
        said = section(record, group)
        theirs = said[setting] if setting in said else _defaults(algo)[group][setting]
        here = _defaults(algo)[group][setting] if config is None else get(config, key)
        found.append((key, theirs, here))
    if ours and config is not None and config.mode == "ppl_eval":
        data = section(record, "data")
        theirs = data.get("pack", "wrap")
        # a row of one document looks like either to the network, and `whole` like `documents`
        joined = data.get("wrap") is not False and config.data.wrap
        if joined and "wrap" in (theirs, config.data.pack):
            found.append(("data.pack", theirs, config.data.pack))
    for key, theirs, here in found:
        if theirs != here:
            way_out = f"give {key}={theirs}, or another checkpoint" if config else "use main.py"
            raise CheckpointError(
                f"{checkpoint.source} was trained with {key}={theirs}, here it is {here}, by which"
                f" its weights mean something else: {way_out}"
            )
    _check_tokenizer(checkpoint, tokenizer, name)


def _check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, name: str) -> None:
    """The same ids. The fingerprint also changes with the version of the library, so one known by
    the same name passes with another; a folder of that name may hold another."""
    about = section(section(checkpoint.raw, "hyper_parameters"), "tokenizer")
    if not written_here(checkpoint) or "fingerprint" not in about:
        return
    theirs, size, mask = (about.get(key) for key in ("name_or_path", "vocab_size", "mask_id"))
    same_name = theirs == name and not os.path.isdir(os.path.expanduser(name))
    same = (size, mask) == (tokenizer.vocab_size, tokenizer.mask_id)
    if not (same and (same_name or about["fingerprint"] == tokenizer.fingerprint)):
        raise CheckpointError(
            f"{checkpoint.source} was trained with the tokenizer {theirs} ({size} ids, mask {mask},"
            f" {about['fingerprint']}), here it is {name} ({tokenizer.vocab_size} ids, mask"
            f" {tokenizer.mask_id}, {tokenizer.fingerprint}): give data.tokenizer_name_or_path and"
            " data.eos_token as they were"
        )


@functools.cache
def _defaults(algo: str) -> dict:
    """To compose them takes a tenth of a second, and a checkpoint of today says every setting."""
    return composed_defaults(f"algo={algo}")


def written_here(checkpoint: Checkpoint) -> bool:
    """Whether a run of this project wrote the file; the authors' settings mean other things."""
    return "examples_seen" in section(checkpoint.raw, "sampler")


def streams_version(checkpoint: Checkpoint) -> int:
    """Which version of the random streams the run goes on with: the first did not say so."""
    first = 1 if written_here(checkpoint) else VERSION
    version = section(checkpoint.raw, "sampler").get("streams", first)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{checkpoint.source} began with version {reprlib.repr(version)} of the random streams;"
            f" this code has {' and '.join(map(str, range(1, VERSION + 1)))}"
        )
    return version
