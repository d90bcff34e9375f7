"""From settings to data: the tokenizer, and the splits as rows."""

import math

from data.preparation import prepare
from data.remote_cache import CacheDir, open_cache
from data.split import Split
from data.streaming import streamed
from data.token_rows import TokenRows
from data.tokenizer import Tokenizer, get_tokenizer
from dataloader import DataModule
from random_streams import VERSION, seed_of
from settings import Config
from settings.defaults import all_devices, block_sizes, needs_block_mask, user_cache


def build_tokenizer(config: Config) -> Tokenizer:
    return get_tokenizer(
        config.data.tokenizer_name_or_path,
        eos_token=config.data.eos_token,
        cache_dir=build_cache(config).folder,
        source=config.data.source,
    )


def build_data(
    config: Config, tokenizer: Tokenizer, *, train: bool, version: int = VERSION
) -> DataModule:
    """The splits that the mode reads, prepared at the first use; evaluation reads only its own.
    version: of the random streams."""
    loader, length = config.loader, config.model.length
    training = None
    if train and config.data.streaming:
        split, by_files = build_split(config, tokenizer, "train"), config.data.stream_by == "files"
        training = streamed(split, build_cache(config).folder, by_files)
    elif train:
        training = build_rows(config, tokenizer, "train")
    windows = isinstance(training, TokenRows) and training.length != length
    shifted = windows and config.algo.name == "ar"
    if shifted:
        length += 1  # windows of a longer row: one more token, so that ar predicts L as well
    special = config.data.insert_train_special
    valid = build_rows(config, tokenizer, "valid")
    validated_rows(config, len(valid))  # refuses a share that is less than a batch
    return DataModule(
        train=training,
        valid=valid,
        length=length,
        seed=seed_of(config.seed, version),
        batch_size=loader.batch_size,
        eval_batch_size=validation_rows(config),
        num_workers=loader.num_workers,
        window_bos=tokenizer.bos_id if special else None,
        window_eos=tokenizer.eos_id if special and shifted else None,
    )


def validation_rows(config: Config) -> int:
    """Of a device's batch. The noise is that of loader.eval_global_batch_size in any case."""
    tokens = config.eval.tokens_per_batch
    return config.loader.eval_batch_size if tokens is None else tokens // config.model.length


def validated_rows(config: Config, rows: int) -> int:
    """How many of the split's rows trainer.limit_val_batches lets a validation read. ValueError: it
    is a share of the batches of a device, and less than one of them."""
    limit, batch_size = config.trainer.limit_val_batches, validation_rows(config)
    if limit is None:
        return rows
    at_once = batch_size * all_devices(config)
    there = -(-rows // at_once)
    batches = int(limit * there) if isinstance(limit, float) else limit
    if limit and not batches:
        raise ValueError(
            f"trainer.limit_val_batches={limit:g} of {there:,} validation batches of {batch_size}"
            " rows is less than one; give a number of batches, such as 1, or a larger share"
        )
    return min(rows, batches * at_once)


def alignment(config: Config) -> int | None:
    """Documents that are kept apart begin at blocks, where the algorithm has them; of several sizes
    at blocks of each. In a row of one block they may begin anywhere."""
    if config.data.pack == "wrap":
        return None
    if not needs_block_mask(config):
        return 1
    return math.lcm(*(size for size in block_sizes(config) if size < config.model.length))


def build_rows(config: Config, tokenizer: Tokenizer, split: str) -> TokenRows:
    """split: "train" or "valid"."""
    wanted = build_split(config, tokenizer, split)
    return prepare(wanted, build_cache(config), config.loader.num_workers)


def build_cache(config: Config) -> CacheDir:
    return open_cache(config.data.cache_dir, user_cache())


def build_split(config: Config, tokenizer: Tokenizer, split: str) -> Split:
    data, train = config.data, split == "train"
    return Split(
        data.train if train else data.valid,
        split,
        tokenizer=tokenizer,
        length=config.model.length,
        wrap=data.wrap,
        align=alignment(config),
        whole=data.pack == "whole",
        insert_eos=data.insert_train_eos if train else data.insert_valid_eos,
        insert_special=data.insert_train_special if train else data.insert_valid_special,
        revision=data.train_revision if train else data.valid_revision,
        text_column=data.text_column,
        source=data.source,
        chat=dict(data.chat_fields or {}) if data.format == "chat" else None,
    )
