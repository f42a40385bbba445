"""The truth about a UMT5 text encoder's tied weights: inspect the file, verify the memory, repair,
explain.

UMT5 keeps one token table under two names, `shared.weight` and `encoder.embed_tokens.weight`; Wan's
checkpoints store only the first. Whether the second is then tied to it or left as uninitialised
memory depends on the version of transformers (docs/UMT5_WEIGHT_LOADING.md), so the table *in use*
is compared with the file, whatever was said.
"""
