"""Everything between words and token ids: tokenizer, chat template, detokenizer, stop strings, output parser, grammars.

Nothing here knows tensors or models. ``tokenizers``, ``jinja2`` and ``llguidance`` are imported when first used.
"""
