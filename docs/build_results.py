"""Rewrites verdicts in the guide to studies and in the overview: `python docs/build_results.py`.

The rows and the numbers of claims and trials in docs/studies.md and docs/results/README.md follow
from the tables in docs/results.
"""

import collections
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from configs.studies.settings import OURS  # noqa: E402
from experiments.report import reading, results, static, summaries, tables  # noqa: E402
from experiments.report.reading import Study  # noqa: E402
from experiments.report.results import Judgement  # noqa: E402
from experiments.report.statistics import Verdict  # noqa: E402

Judged = Sequence[tuple[Study, Sequence[Judgement]]]  # studies and what became of their claims

SIZES = ('cifar10', 'cifar10_small', 'caltech101_small', 'digits')  # what carries most first
HEADINGS = {'### What contradicts': Verdict.DOES_NOT, '### What holds': Verdict.AGREES}


def guide(text: str, judged: Judged) -> str:
    """Returns docs/studies.md with the tables under `HEADINGS` and the sentence of counts anew."""
    names = re.findall(r'^\| `(\w+)` \|', text, re.M)  # its table of the files in configs/studies
    ordered = sorted(judged, key=lambda x: (names.index(x[0].name), SIZES.index(x[0].size)))
    for heading, verdict in HEADINGS.items():
        before, after = text.split(f'{heading}\n')
        rows = [row for ours in (False, True) for row in _rows(ordered, verdict, ours=ours)]
        table = re.search(r'^\|[-|]+\|\n((\|.*\n)+)', after, re.M)
        assert table is not None
        after = after[: table.start(1)] + ''.join(rows) + after[table.end(1) :]
        text = f'{before}{heading}\n{after}'
    trials = sum(len(study.trials) for study, _ in judged)
    text = re.sub(r'[\d,]+ trials(?= in all)', f'{trials:,} trials', text, count=1)
    counts = collections.Counter(j.comparison.verdict for _, several in judged for j in several)
    sentence = (
        f'Of their {counts.total()} claims {counts[Verdict.DOES_NOT]} are contradicted, '
        f'{counts[Verdict.AGREES]} hold, {counts[Verdict.NOISY]} are too noisy to say, and '
        f'{counts[Verdict.UNDECIDED]} undecided'
    )
    return re.sub(r'Of their \d+ claims [^:]* undecided', sentence, text)


def overview(text: str, judged: Judged) -> str:
    """Returns docs/results/README.md with the number of claims of each verdict anew."""
    for study, several in judged:
        counts = collections.Counter(j.comparison.verdict.value for j in several)
        told = ', '.join(f'{count} {verdict}' for verdict, count in counts.most_common())
        row = rf'(?m)^(.*\({static.slug(study)}\.md\).*; of )\d+ claims .*( \|)$'
        text = re.sub(row, rf'\g<1>{counts.total()} claims {told}\g<2>', text)
    return text


def _rows(judged: Judged, verdict: Verdict, *, ours: bool) -> Iterator[str]:
    for study, several in judged:
        page = f'[`{study.name}:{study.size}`](results/{static.slug(study)}.md)'
        for judgement in several:
            if judgement.comparison.verdict is verdict and (judgement.claim.source == OURS) == ours:
                cells = map(static.escape, summaries.answer(judgement))
                yield '| ' + ' | '.join([page, *cells]) + ' |\n'


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = tables.restore_all(DOCS / 'results', pathlib.Path(directory))
        judged = [(study, results.judge(study)) for study in map(reading.load, found)]
        for path, rewrite in ((DOCS / 'studies.md', guide), (DOCS / 'results/README.md', overview)):
            path.write_text(rewrite(path.read_text(encoding='utf-8'), judged), encoding='utf-8')


if __name__ == '__main__':
    main()
