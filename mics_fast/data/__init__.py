"""From a manifest to batches: files, decoding, augmentation, loaders, cache, shards."""
