"""Weights in and out: published names, files, safe reading, conversion and export."""
