"""Pictures on their way to the device: sources, preprocessing and the input pipeline."""
