"""Input on the host: sources, preprocessing and the pipeline."""
