"""Images as tensors: folders, splits, photographs for the quick start, samplers and loaders."""
