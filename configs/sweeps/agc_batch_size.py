"""What a trial of the study `agc_batch_size` trains, for a sweep of Weights & Biases.

    python -m experiments.train --config=configs/sweeps/agc_batch_size.py:digits --workdir=runs/one

Sizes: those of the study. agc_batch_size.yaml, beside this file, sweeps the same values as the
study's grid at digits; docs/studies.md says how.
"""

from configs.studies import agc_batch_size

VARIANTS = agc_batch_size.VARIANTS


def get_config(size: str = 'digits'):
    return agc_batch_size.get_config(size).base
