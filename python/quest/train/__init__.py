"""Training: configuration, data, optimisation, checkpoints and what is watched along the way.

Built on `quest.models` and the quantized layers of `quest`; nothing below knows of it.
"""
