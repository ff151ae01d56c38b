"""Texts and tables of a study, shared by the HTML page and Markdown."""

import collections
import math

from experiments.report.reading import Study
from experiments.report.results import Judgement, Tuning, judge, key, sample
from experiments.report.statistics import LEVEL, POWER, Verdict
from experiments.report.wording import (
    Table,
    axis_label,
    is_percent,
    mean_and_error,
    metric_label,
    number,
)
from experiments.study.schema import DONE, STATES, ChartSpec, Claim, Point

METHOD = (
    'Numbers are means over seeds ± the standard error of the mean, with the number of seeds in '
    'brackets. The tuned axes (the learning rate, unless the study says more) are tuned separately '
    'for each setting: the value with the best mean over seeds on validation images is used, and '
    'arms are compared on test images. In studies of earlier versions, without validation images, '
    'the same test images chose the value.',
    'A diverged trial is a result: it counts as chance level if the study gives that, and '
    'otherwise no comparison with it is judged. A trial that failed for another reason, or has not '
    'ended, is left out and listed.',
    'A claim is tested on the difference of two means. Its variance counts the seeds and the test '
    'images, crossed with one another and paired by image where both sides saw the same; where it '
    'is not known which images were right, it counts seeds alone, and the verdict says so. The '
    'tuning is counted, too: one choice of the better side, made for each seed by the other '
    'seeds, must be better than every choice of the other side. p is two-sided; the corrected p '
    f'counts all claims of the study (Holm), and is below {LEVEL:.0%} for a verdict, so that in '
    'one study of twenty, at most, any verdict is false. Sameness is tested for equivalence '
    'within the stated margin. '
    f'The difference that could have been seen is meant to be found in {POWER:.0%} of such '
    'studies, at the level that the number of claims leaves, tuning included. As three seeds tell '
    'their scatter roughly, in simulations it was found in 75 to 90 %.',
    'There is no verdict where a best value lies at the edge of its grid or has learned nothing, '
    'where the grids of the two sides are not equally large, or with fewer than two seeds. Figures '
    'that are the same in every run, such as memory, are compared without a test.',
    'Times are not shown, because trials share the machine with one another and with other '
    'programs.',
)

EDGES = 'A best value at the edge of the grid may not be the best: extend the grid by --extend.'

SYMBOLS = {
    Verdict.AGREES: '✓',
    Verdict.DOES_NOT: '✗',
    Verdict.NOISY: '≈',
    Verdict.UNDECIDED: '…',
    Verdict.UNTESTED: '?',
}


def progress(study: Study) -> str:
    """Returns '95 of 108 trials are complete, 9 diverged; 1 failed, 1 running, 2 pending.'"""
    counts = collections.Counter(trial.state for trial in study.trials)
    done = [f'{counts["complete"]} of {len(study.trials)} trials are complete']
    done += [f'{counts["diverged"]} diverged'] if counts['diverged'] else []
    rest = [f'{counts[state]} {state}' for state in STATES if state not in DONE and counts[state]]
    return ', '.join(done) + ('; ' + ', '.join(rest) if rest else '') + '.'


def is_complete(study: Study) -> bool:
    return all(trial.state in DONE for trial in study.trials)


def missing(spec: ChartSpec) -> str:
    """Returns the text in place of a chart without data."""
    steps = ' at two steps' if spec.kind == 'curves' else ''
    return f'{spec.title}: no trial has recorded {spec.y}{steps} yet.'


def describe_point(study: Study, point: Point) -> str:
    """Returns 'NF-ResNet-8 with AGC, batch size 512'."""
    parts = (
        study.label(a, v) if a == 'arm' else f'{axis_label(a)} {study.label(a, v)}'
        for a, v in point.items()
        if v is not None
    )
    return ', '.join(parts)


def verdict(judgement: Judgement) -> str:
    """Returns the outcome of a claim in a word or two, and what it counts if that is not all."""
    found = judgement.comparison
    told = found.basis == 'seeds alone' and found.verdict in (Verdict.AGREES, Verdict.DOES_NOT)
    return f'{found.verdict.value}{" (seeds alone)" if told else ""}'


def answers(study: Study) -> list[list[str]]:
    """Returns the answer to each claim of a study."""
    return list(map(answer, judge(study)))


def answer(judged: Judgement) -> list[str]:
    """Returns claim, verdict, difference and confidence, in a few words each."""
    found, metric = judged.comparison, judged.claim.metric
    difference = '' if math.isnan(found.difference) else _signed(found.difference, metric)
    if not math.isnan(found.interval[0]) and found.basis != 'exact':
        low, high = (_signed(x, metric) for x in found.interval)
        difference += f' ({low} to {high})'
    confidence = '' if math.isnan(found.p) else f'corrected p {_p(found.corrected)}'
    return [judged.claim.text, verdict(judged), difference, confidence or found.basis]


def outcome(study: Study, judgement: Judgement) -> str:
    """Returns the outcome of a claim, with the numbers that the verdict rests on."""
    claim, comparison = judgement.claim, judgement.comparison
    if judgement.samples is None:
        return f'{comparison.reason}.'.capitalize()
    points = [point for point in (claim.better, claim.worse) if point is not None]
    sides = ', '.join(
        f'{mean_and_error(found, claim.metric)} of {describe_point(study, point)}'
        for point, found in zip(points, judgement.samples, strict=True)
    )
    text = f'{metric_label(claim.metric)}: {sides}. '
    if not math.isnan(comparison.difference):
        text += f'Difference {_signed(comparison.difference, claim.metric)}'
        if comparison.basis and comparison.basis != 'exact':
            low, high = (_signed(x, claim.metric) for x in comparison.interval)
            text += f' ({1 - LEVEL:.0%} interval {low} to {high})'
        text += f'; claimed is {_claimed(claim)}. '
    if not math.isnan(comparison.p):
        seen = _signed(comparison.detectable, claim.metric)
        what = 'smallest margin' if claim.direction == 'same' else 'smallest difference'
        text += (
            f'p {_p(comparison.p)}, corrected {_p(comparison.corrected)}, by the '
            f'{comparison.basis}; {what} that could have been seen {seen}. '
        )
    text += f'{comparison.reason.capitalize()}. ' if comparison.reason else ''
    here = study.scopes.get(study.arm_of(points[0]), 'the setting above')
    if claim.scope and claim.scope != here:
        text += f'Claimed of {claim.scope}; judged here on {here}. '
    edges = [
        f'{axis_label(axis)} {_with_edge(study, tuning, axis)} of {describe_point(study, point)}'
        for point, tunings in zip(points, judgement.tunings, strict=True)
        for tuning in tunings
        for axis in tuning.at_edge()
    ]
    text += f'Perhaps not the best: {"; ".join(edges)}.' if edges else ''
    return text[:1].upper() + text[1:].strip()


def _claimed(claim: Claim) -> str:
    if claim.direction == 'same':
        margin = _signed(claim.margin, claim.metric).removeprefix('+')
        return f'the same to within {margin}'
    bound = 'more' if claim.direction == 'greater' else 'less'
    return f'{bound} than {_signed(claim.margin, claim.metric)}'


def _p(value: float) -> str:
    return '< 0.0001' if value < 1e-4 else f'= {value:.2g}'


def _signed(value: float, metric: str) -> str:
    sign = '+' if value > 0 else ''
    written = number(value, metric).replace('-', '\N{MINUS SIGN}')
    return sign + written + (' points' if is_percent(metric) else '')


def results_table(study: Study, tunings: list[Tuning]) -> Table:
    """Returns each setting at its tuned values, and marks those at the edge of the grid."""
    axes = [a for a in study.axes if any(t.setting.get(a) is not None for t in tunings)]
    tuned = [a for a in study.tuned if any(a in t.tried for t in tunings)]
    header = [*map(axis_label, axes), *(f'best {axis_label(a)}' for a in tuned)]
    rows = [
        [
            *(study.label(a, t.setting.get(a)) for a in axes),
            *(_with_edge(study, t, a) for a in tuned),
            mean_and_error(t.sample, study.metric),
        ]
        for t in tunings
    ]
    return Table([*header, metric_label(study.metric)], rows)


def _with_edge(study: Study, tuning: Tuning, axis: str) -> str:
    label = study.label(axis, tuning.chosen[axis])
    edge = tuning.edge(axis)
    return f'{label} (the {edge} tried)' if edge else label


def has_edges(tunings: list[Tuning]) -> bool:
    return any(tuning.at_edge() for tuning in tunings)


def grid_table(study: Study, tunings: list[Tuning]) -> Table:
    """Returns the study's metric at every point of the grids of tuned values."""
    tuned = [a for a in study.tuned if any(a in t.tried for t in tunings)]
    axes = [a for a in study.axes if any(t.setting.get(a) is not None for t in tunings)]
    rows = []
    for tuning in tunings:
        for choice, found in tuning.by_choice.items():
            values = dict(choice)
            best = ' ← best' if choice == key(tuning.chosen) and len(tuning.by_choice) > 1 else ''
            rows.append(
                [
                    *(study.label(a, tuning.setting.get(a)) for a in axes),
                    *(study.label(a, values[a]) for a in tuned),
                    mean_and_error(found, study.metric) + best,
                ]
            )
    header = [*map(axis_label, axes), *map(axis_label, tuned), metric_label(study.metric)]
    return Table(header, rows)


def trials_table(study: Study, *, only_unsuccessful: bool = False) -> Table:
    """Returns all trials with their results, or those that are not complete with their errors."""
    rows = []
    for trial in study.trials:
        if only_unsuccessful and trial.state == 'complete':
            continue
        last = trial.error or ''
        if not only_unsuccessful:
            mean = sample(study, [trial], study.metric).mean
            last = number(mean, study.metric) if trial.state == 'complete' else '-'
        rows.append([trial.id, trial.state, f'{trial.step:,}', last])
    last = 'error' if only_unsuccessful else metric_label(study.metric)
    return Table(['trial', 'state', 'step', last], rows)


def provenance(study: Study) -> dict[str, str]:
    """Returns what is needed to reproduce the figures, besides the commands."""
    versions = ', '.join(f'{name} {version}' for name, version in study.versions.items())
    facts = {'size': study.size, 'hardware': study.hardware, 'versions': versions}
    return {name: fact for name, fact in facts.items() if fact not in ('', '-')}
