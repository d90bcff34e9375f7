"""Settings of the text that is trained on and evaluated."""

from dataclasses import dataclass
from typing import Any

from settings.limits import Limit, doc, one_of
from settings.tables import chat_names

CHAT_FIELDS = Limit(
    f"names in your files for some of {', '.join(chat_names())}, such as {{messages:"
    " conversations, user: human}",
    lambda value: all(
        name in chat_names() and isinstance(own, str) and own for name, own in value.items()
    ),
    {},
)


@dataclass
class Data:
    train: str | None = doc("training text: name of a corpus, or .txt, .jsonl or .parquet files")
    valid: str | None = doc("validation text: the same")
    source: str | None = doc("local copy of the corpus (file or folder), read instead of the hub")
    text_column: str | None = doc(
        "column or field that holds the text; null: the corpus's own, `text` in your files"
    )
    format: str = doc(
        "what your files hold: text, or conversations of messages, of which the answers alone are"
        " learnt (data=chat)",
        one_of("text", "chat"),
    )
    chat_fields: dict[str, Any] | None = doc(
        "with data.format=chat, what your files call messages, prompt, response, role, content, or"
        " the roles system, user, assistant, such as {messages: conversations, role: from}",
        CHAT_FIELDS,
    )
    tokenizer_name_or_path: str = doc(
        "tokenizer: gpt2, bert-base-uncased, text8, characters, characters:ACGT, shakespeare-bpe,"
        " state_of_the_union-bpe, a folder or a hub id"
    )
    eos_token: str | None = doc("token that ends documents and chunks; null: the tokenizer's own")
    cache_dir: str | None = doc("folder or URL of prepared data; null: bamdlm/ in the user's cache")
    train_revision: str | None = doc("revision of the corpus on the hub; null: one known to work")
    valid_revision: str | None = doc("the same for validation")
    wrap: bool = doc("join documents, then cut chunks of model.length; false: one document per row")
    pack: str = doc(
        "with wrap, chunks are running text; with documents, each document starts at a block "
        "and sees only itself; whole is the same, but cuts no document that fits into a chunk",
        one_of("wrap", "documents", "whole"),
    )
    streaming: bool = doc("tokenize the training text during training, not before it")
    stream_by: str = doc(
        "with data.streaming: units, all devices read the whole text and each tokenizes its share;"
        " files, each reads files of its own, of which there must be 48 or more",
        one_of("units", "files"),
        default="units",
    )
    insert_train_eos: bool = doc("put EOS after each training document")
    insert_train_special: bool = doc("put BOS and EOS round training chunks or packed documents")
    insert_valid_eos: bool = doc("put EOS after each validation document")
    insert_valid_special: bool = doc("put BOS and EOS round validation chunks or packed documents")
