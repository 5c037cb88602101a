"""Images on disk to batches on the device: indexing, order, augmentation, mixing, exact evaluation."""
