"""Checks and repairs the tied token table of a UMT5 text encoder.

UMT5 has one token table under two names, `shared.weight` and `encoder.embed_tokens.weight`. Wan's
checkpoints store only the first. Some versions of transformers do not tie the second to it and
leave it as uninitialised memory (docs/UMT5_WEIGHT_LOADING.md). So the table in use is compared with
the file after every load, whether or not the loader reported anything.
"""
