"""Turn a checkpoint into a folder for transformers, or a model on the Hugging Face hub.

    python scripts/export_hf.py CKPT FOLDER [--push ID]

The folder works where this project is not installed (AutoModelForMaskedLM.from_pretrained with
trust_remote_code=True), and inside it without remote code (algo.backbone=hf_dit, or llama).
With --format sdar it is one for servers of block diffusion (SGLang, LMDeploy): of models trained
with algo=bamdlm algo.backbone=llama in the shape of Qwen3 and with its vocabulary.
Adapters (lora.rank) are merged; with --adapter the folder has them alone, for peft.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpointing import export
from checkpointing.adapter_folder import write_adapter
from checkpointing.as_trained import check_as_trained
from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import read_checkpoint
from data.tokenizer import Tokenizer, get_tokenizer, wrap
from scripts.support.command import answered, new_parser
from settings.tables import algorithms

SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="file, folder, fsspec URL or hub id")
    parser.add_argument("folder", metavar="FOLDER", help="to be written")
    parser.add_argument("--push", metavar="ID", help="then upload it as this hub model")
    parser.add_argument("--private", action="store_true", help="make a new hub model private")
    parser.add_argument("--tokenizer", metavar="NAME", help="name or folder, if not the run's own")
    parser.add_argument("--algo", choices=list(algorithms()), help="if CKPT does not tell")
    parser.add_argument("--disable-ema", action="store_true", help="plain weights, not averages")
    parser.add_argument("--format", choices=list(export.FORMS), default="project", help="see above")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, for peft")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in FOLDER")
    options = parser.parse_args(arguments)
    return answered("export_hf", lambda: run(options))


def run(options) -> None:
    checkpoint = read_checkpoint(options.checkpoint)
    tokenizer = find_tokenizer(checkpoint, options.tokenizer)
    own = section(checkpoint.config, "data").get("tokenizer_name_or_path")
    check_as_trained(checkpoint, None, tokenizer, options.tokenizer or own)
    given = {"use_ema": not options.disable_ema, "overwrite": options.overwrite}
    if options.adapter and options.format != "project":
        raise ValueError(f"--adapter does not go with --format {options.format}: choose one")
    if options.adapter:
        folder = write_adapter(checkpoint, options.folder, tokenizer, **given)
    else:
        forms = {"algo": options.algo, "form": options.format}
        folder = export.export(checkpoint, options.folder, tokenizer, **given, **forms)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if options.push:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.push, private=options.private, exist_ok=True)
        place = api.upload_folder(repo_id=options.push, folder_path=str(folder))
        print(f"uploaded to {place}")


def find_tokenizer(checkpoint: Checkpoint, name: str | None) -> Tokenizer:
    """The one asked for, else the one pickled in an authors' checkpoint, else the run's by name."""
    if name is not None:
        return get_tokenizer(name)
    data = section(checkpoint.config, "data")
    eos_token = data.get("eos_token")
    kept = section(checkpoint.raw, "hyper_parameters").get("tokenizer")
    if isinstance(kept, dict) and isinstance(kept.get("_tokenizer"), str):
        return wrap(rebuilt(kept), "of the checkpoint", eos_token)
    if "tokenizer_name_or_path" not in data:
        raise ValueError(f"{checkpoint.source} names no tokenizer: give --tokenizer")
    return get_tokenizer(
        data["tokenizer_name_or_path"],
        eos_token=eos_token,
        cache_dir=data.get("cache_dir"),
    )


def rebuilt(kept: dict):
    """A tokenizer from its pickled state: the fast tokenizer's JSON and the special tokens."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    # transformers 5 keeps them in a map, transformers 4 in attributes
    roles = {f"{role}_token": kept.get(f"_{role}_token") for role in SPECIAL_ROLES}
    special = {}
    for role, token in (roles | section(kept, "_special_tokens_map")).items():
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[role] = token
    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(kept["_tokenizer"]), **special)


if __name__ == "__main__":
    sys.exit(main())
