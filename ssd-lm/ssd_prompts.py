"""What samples continue: <s> alone, the lines of a file, or a data set's validation texts."""

from collections.abc import Iterator

from ssd_options import DOCUMENT_TOKENS, read_prompts, validation_corpus


class PromptError(ValueError):
    """The prompts do not serve; the message says what to do."""


def contexts(args, tokenizer) -> list[list[int]]:
    """Token ids before each sample; sample i takes number i, in turn."""
    if args.no_bos:
        start = []
    elif tokenizer.bos_token_id is None:
        raise PromptError("the tokenizer has no BOS token: give --no_bos to start without one")
    else:
        start = [tokenizer.bos_token_id]
    if args.prompts_file:
        return [start + encode(tokenizer, text) for text in read_prompts(args.prompts_file)]
    if args.prompts_data:
        return [start + ids for ids in document_starts(args, tokenizer)]
    return [start]


def document_starts(args, tokenizer) -> list[list[int]]:
    """The first tokens of the first texts that are long enough, one per sample."""
    tokens = args.prompt_tokens or DOCUMENT_TOKENS
    wanted = args.num_samples_to_generate
    found = []
    for text in documents(args.prompts_data, 50 * tokens):
        ids = encode(tokenizer, text)[:tokens]
        if len(ids) == tokens:
            found.append(ids)
        if len(found) == wanted:
            return found
    raise PromptError(
        f"--prompts_data={args.prompts_data} has {len(found)} texts of {tokens} tokens, "
        f"--num_samples_to_generate={wanted} asks for more"
    )


def documents(name: str, characters: int) -> Iterator[str]:
    """The beginnings of a data set's validation texts, detokenized as for the other models."""
    from data import corpora, detokenizers

    corpus, revision, cache = validation_corpus(name)
    text = ""
    try:
        for piece in corpora.opened(corpus, "valid", revision, corpus.column, cache)[1]:
            if len(text) < characters:
                text += piece.text
            if piece.ends:
                whole = text[:characters]
                if corpus.detokenizer:
                    whole = detokenizers.detokenize(corpus.detokenizer, whole)
                yield whole
                text = ""
    except ValueError as error:
        raise PromptError(f"--prompts_data={name}: {error}") from error


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def check_lengths(rows: list[list[int]], block_size: int, max_tokens: int) -> None:
    """The first block sees the whole context, every other one the block before it."""
    if 2 * block_size > max_tokens:
        raise PromptError(
            f"--decoding_block_size={block_size}: a block and the one before it do not fit "
            f"into the model's {max_tokens} positions"
        )
    for number, row in enumerate(rows, 1):
        if len(row) + block_size > max_tokens:
            raise PromptError(
                f"prompt {number} has {len(row)} tokens; with a block of {block_size} the model "
                f"takes at most {max_tokens - block_size}: shorten it"
            )
