"""The report of one round: a self-contained HTML page with the decision first and what led to it behind.

    page.py        render_report: the parts of the page put together
    decision.py    the gate's rules in words
    results.py     the models on the evaluation sets and on public benchmarks
    drift.py       how far the candidate's predictions moved, on each set, over all rounds, by which weights
    rounds.py      the continual-learning matrix, transfer, forgetting and drift over all rounds
    training.py    curves of the training run, and what the round cost
    subspace.py    spectra, sizes of the updates, use of the free subspace
    heat_map.py svg.py formats.py    what the others draw and write with
    templates/     one a section, and the style sheet

Names, paths, prompts and answers are untrusted: the templates escape them, and plots go through an XML tree before they
are inlined.
"""

from osft.evaluation.report.page import render_report

__all__ = ["render_report"]
