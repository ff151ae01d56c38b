"""Tells how much a study would train, before it begins and without its data."""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from experiments.experiment import build
from experiments.run import planned_data
from experiments.study import config as study_config
from experiments.study.planning import Planner
from nfnets_jax.data.sources import Source


def describe(
    study: ConfigDict, open_source: Callable[..., Source] = planned_data.open_source
) -> str:
    """Returns the numbers of trials, programs and training images of a study, in two lines.

    A coarse search decides from its results which trials it repeats with all seeds, so it has a
    first number and a largest one; what --extend adds to a grid is in neither. An image counts
    every time that it is trained on.

    Args:
      study: as in `study_config.default_study`.
      open_source: as `experiment.build` takes it.

    Raises:
      UsageError: a mistake in the study, or data that are not here and that nothing is known of.
    """
    planner = Planner(study)
    every, first = planner.grid, planner.plan([])
    images: dict[str, int] = {}  # to train on, by program
    for trial in every:
        if trial.program not in images:
            with study_config.naming_trial(trial, study):
                images[trial.program] = _training_images(trial.config, study, open_source)
    once = 0
    if study.pretrain:
        with study_config.naming_pretraining():
            once = _training_images(study.pretrain, study, open_source)

    def total(trials: Iterable[study_config.Trial]) -> int:
        return once + sum(images[trial.program] for trial in trials)

    name = f'{study.name} ({study.size})'
    programs = f'{len(images)} compiled programs'
    if len(first) == len(every):
        trials, trained = f'{len(every):,} trials', f'{total(every):,} images to train on'
    else:
        trials = f'{len(first):,} trials in the search, at most {len(every):,} in all'
        trained = (
            f'{total(first):,} images to train on in the search, at most {total(every):,} in all'
        )
    return f'{name}: {trials}; {programs}\n{trained}'


def _training_images(
    config: ConfigDict, study: ConfigDict, open_source: Callable[..., Source]
) -> int:
    """Returns how many images a run of the study with this config trains on."""
    if 'train' not in study.measure:
        return 0
    experiment = build(config, training=False, open_source=open_source)
    return experiment.total_steps * config.batch_size
