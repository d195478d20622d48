"""The frozen LLM around soft tokens.

`prompts` makes token ids in front of and behind them, and answers as trees. `causal` runs decoder-only LLMs, `rows`
those whose layers read no tree, `seq2seq` encoder-decoders. `base` is what they share, `families` picks one and checks
it. `states` caches what is frozen, `passes` groups rows of like length, `chains` sums answers' tokens.
"""
