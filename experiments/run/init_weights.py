"""The weights that a run starts from (`config.init`), and the model.json that describes its own."""

import os
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import numpy as np

from experiments.config import naming
from experiments.experiment import Experiment, init_variables
from experiments.run import parallel, workdir
from nfnets_jax import models
from nfnets_jax.errors import UsageError
from nfnets_jax.image_size import shortest
from nfnets_jax.weights import convert_timm, pretrained

# Weights that were trained with other values of these options fit all the same.
FREE_OPTIONS = frozenset(
    {
        *('drop_rate', 'stochdepth_rate', 'bn_decay_rate', 'fc_init', 'skipinit_gain'),
        *('remat', 'scan', 'channels'),  # the stem has been fitted to the channels
    }
)


def load_for_new_run(
    experiment: Experiment, directory: str | os.PathLike, log: Callable[[str], None]
) -> tuple[hk.Params, hk.State] | None:
    """Returns the initial parameters and state of a run without checkpoints.

    None means random weights, the checkpoint of the run, or another process than 0.
    """
    path = experiment.config.init.weights
    if not path or not parallel.is_primary() or workdir.has_checkpoints(directory):
        return None
    params, state, report = load_weights(experiment, directory)
    log(f'{path}: {report}')
    return params, state


def load_weights(
    experiment: Experiment, directory: str | os.PathLike = ''
) -> tuple[hk.Params, hk.State, pretrained.Report]:
    """Reads the weights that `config.init.weights` names; a new head is random.

    Args:
      experiment: the experiment.
      directory: directory of the run. '{study}' in the name of the weights stands for the study
        that the run is a trial of, so that the config does not depend on where the study is.

    Raises:
      UsageError: the weights cannot be read, or are those of another network.
    """
    config = experiment.config
    study = os.path.normpath(os.path.join(directory, os.pardir, os.pardir))
    path = config.init.weights.replace('{study}', study)
    with naming('init.weights'):
        weights = pretrained.load_pretrained(path)
    channels = experiment.image_spec.pixels.channels
    is_fitted = channels != weights.metadata.channels
    if is_fitted:
        with naming('model'):
            weights = pretrained.fit_stem(weights, channels)
    if weights.metadata.model is not None:
        weights = _as_built(weights, config.model.to_dict(), path)
    for key in ('mean', 'std') if not is_fitted else ():  # Those of other channels are no rule.
        here, value = getattr(experiment.image_spec, key), getattr(weights.metadata, key)
        if not np.allclose(here, value, rtol=0, atol=0.01):  # Of 255: files round it otherwise.
            raise UsageError(
                f'config.data.{key}={here}: config.init.weights={path} were trained with {value}',
                f'config.data.{key}',
                'config.init.weights',
            )
    variables = jax.jit(init_variables, static_argnums=(0, 2))(
        experiment.model, config.seed, experiment.image_spec.shape
    )
    *variables, report = pretrained.fit_weights(weights, *variables, new_head=config.init.new_head)
    if not report.fits:
        raise UsageError(
            f'config.init.weights={path} do not fit {config.model.name}: {report}',
            'config.init.weights',
        )
    return *variables, report


def _as_built(weights: pretrained.Weights, model: dict[str, Any], path: str) -> pretrained.Weights:
    """Returns the weights for the network of a config, which may have another name.

    Raises:
      UsageError: the config builds another network.
    """
    name, metadata = model.pop('name'), weights.metadata
    assert metadata.model is not None
    here = models.resolved_options(name, **model)
    there = models.resolved_options(metadata.model, **metadata.options)
    if (here.get('conventions'), there.get('conventions')) == ('timm', 'timm_gains'):
        # Version 0.1.0 read timm's nf_resnet50 and nf_regnets as published networks.
        params = convert_timm.to_skip_gains(weights.params, there['activation'])
        weights, there = weights._replace(params=params), there | {'conventions': 'timm'}
    for option, value in there.items():
        if option in FREE_OPTIONS or here.get(option) == value:
            continue
        if option not in model and models.variant_info(name).name != metadata.model:
            raise UsageError(
                f'config.init.weights={path}: weights of {metadata.model}, but '
                f'config.model.name={name!r}',
                'config.init.weights',
                'config.model.name',
            )
        raise UsageError(
            f'config.model.{option}={here.get(option)!r}: config.init.weights={path} are of '
            f'a network with {value!r}',
            f'config.model.{option}',
            'config.init.weights',
        )
    return weights


def model_metadata(experiment: Experiment) -> pretrained.Metadata:
    """Returns the content of model.json: everything that is needed to use the weights of a run."""
    options, spec = experiment.config.model.to_dict(), experiment.image_spec
    classes = tuple(experiment.train_source.class_names)
    return pretrained.Metadata(
        model=models.variant_info(options.pop('name')).name,
        options=options,
        num_classes=len(classes),
        class_names=classes,
        multi_label=experiment.multi_label,
        train_size=shortest(spec.shape[:2]),
        test_size=spec.test_size,
        eval_mode=spec.test_mode,
        mean=spec.mean,
        std=spec.std,
        value_range=spec.pixels.value_range,
    )
