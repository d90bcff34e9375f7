"""Conversations as training text: from files, through the tokenizer's chat template, to ids of
which those of answers are marked."""
