"""The networks: encoder, masked auto-encoder, discriminator, and the model of each stage.

A model computes no loss and reads no file; ``initial_weights.py`` reads one for it.
"""
