"""Texts that benchmarks train and measure on."""

from benchmarks.texts import plain


def test_manual_page_becomes_plain_text():
    page = '.\\" comment\n.TH LS 1\n.SH BEZEICHNUNG\nls \\- Ordner\\-Inhalt\n.PP\n\\fB\\-a\\fR, \\f(CWx\\fP\n'
    assert plain(page) == "BEZEICHNUNG\nls - Ordner-Inhalt\n-a, x"
