"""Data: manifest, files, decoding, augmentation, cache, shards and the loaders of batches."""
