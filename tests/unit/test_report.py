"""The report: one file that says what summary.json says, in either language."""

import base64
import io
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from string import Formatter

import pytest
from fontTools.ttLib import TTFont
from synthetic import one_at_a_time, results, under_load

from disagg.errors import InputError
from disagg.measure import plots, report, sentences
from disagg.measure.plots_scene import FONT, STYLE
from disagg.measure.words import EN, ZH

ARMS = ["2C", "1P1D"]
SOURCES = [
    Path(report.__file__),
    Path(report.__file__).with_suffix(".html"),
    *Path(plots.__file__).parent.glob("plots*.py"),
]
TERMS = r"(TTFT|TPOT|ITL|E2E|SLO|KV|PD|token|worker|prefill|decode|goodput|ms|s|t|x|p50|p90|p99|[CPD]\d|\d+C|\d+P\d+D)"


@pytest.fixture(autouse=True, scope="module")
def coarse_pictures() -> Iterator[None]:
    """Fewer dots, the same pictures: most of the time goes into writing PNGs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 40)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two arms."""
    path = tmp_path_factory.mktemp("results")
    results(path, ARMS, one_at_a_time(ARMS) + under_load(ARMS, [8.0, 20.0], 3, 60))
    return path


@pytest.fixture(scope="module")
def english(folder: Path) -> str:
    """Its page."""
    return page(folder)


def page(folder: Path, lang: report.Lang = "en") -> str:
    report.build(folder, lang)
    return (folder / "report.html").read_text(encoding="utf-8")


def visible(html: str) -> str:
    """What a reader sees: no style, no code, no tags."""
    text = re.sub(r"(?s)<(style|code|pre)\b.*?</\1>", " ", html)
    return unescape(re.sub(r"<[^>]+>", " ", text))


def foreign(text: str) -> set[str]:
    """The words in Latin letters that are neither a term of the field, nor a unit, a worker or an arm."""
    return {word for word in re.findall(r"[A-Za-z0-9]*[A-Za-z][A-Za-z0-9]*", text) if not re.fullmatch(TERMS, word)}


def test_everything_is_written_and_nothing_is_loaded(folder: Path, english: str) -> None:
    """All figures exist and are embedded; no address, script or linked file is in the page."""
    assert all((folder / f"{name}.png").exists() for name in plots.FIGURES)
    assert english.count("data:image/png;base64,") == len(plots.FIGURES)
    text = re.sub(r"base64,[^\"]*", "", english)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", text)


def test_the_numbers_that_matter_are_on_the_page(english: str) -> None:
    """Both arms, published figures, SLO, verdict and the command."""
    text = visible(english)
    for expected in (*ARMS, "182.3", "156.7", "58.2", "124.1", "12.3", "14.04%", "TTFT ≤ 250 ms", "not resolved"):
        assert expected in text
    assert "disagg compare --model seed" in english
    assert all(re.search(rf"{worker}\s+\d+ %", text) for worker in ("C0", "C1", "P0", "D0"))  # how busy each was


def test_chinese_pages_have_no_english_left(folder: Path) -> None:
    """Between Chinese words only the field's own terms, names and numbers may stand in Latin letters."""
    text = visible(page(folder, "zh"))
    assert foreign(re.sub(r"2026\S+|cpu:[\d,]+|\bseed\b", " ", text)) == set()


def test_chinese_pages_bring_their_characters(folder: Path, english: str) -> None:
    """A machine without a Chinese font shows them; the page grows by less than 200 KB, and English ones by nothing."""
    html = page(folder, "zh")
    (encoded,) = re.findall(r"@font-face \{[^}]*url\(data:font/woff;base64,([^)]+)\)", html)
    glyphs = TTFont(io.BytesIO(base64.b64decode(encoded))).getBestCmap()
    missing = {character for character in html if not character.isascii() and ord(character) not in glyphs}
    assert missing <= {"–"}  # a dash for no value, which every font has
    assert '"Report Chinese", system-ui' in html  # behind system-ui Chromium leaves boxes
    assert len(encoded) < 200_000
    assert "Report Chinese" not in english


def test_the_font_has_every_character_that_a_chinese_page_may_say() -> None:
    """Also the sentences that this folder's page has no use for."""
    glyphs = TTFont(FONT).getBestCmap()
    tables = (ZH, sentences.SENTENCES["zh"], sentences._VERDICT["zh"], sentences._METRIC["zh"])
    said = set("".join(text for table in tables for text in table.values()))
    assert {character for character in said if ord(character) not in glyphs} == set()


def test_both_tables_have_the_same_keys_and_blanks() -> None:
    """Every word is translated, and a translation takes the same values."""
    assert EN.keys() == ZH.keys()
    blanks = {key: [{name for _, name, _, _ in Formatter().parse(table[key])} for table in (EN, ZH)] for key in EN}
    assert {key for key, (english, chinese) in blanks.items() if english - {None} != chinese - {None}} == set()


def test_every_word_is_used_and_every_used_word_exists() -> None:
    """A literal key must exist; `w("kind." ~ name)` and `words(f"part.{name}")` use their whole group."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    keys = set(re.findall(r"""(?:\bw|words)\(\s*["']([a-z]+\.\w+)["']""", source)) | set(
        re.findall(r'"(axis\.\w+)"', source)
    )
    keys |= {key for pair in re.findall(r'words\("(text\.\w+)" if .* else "(text\.\w+)"', source) for key in pair}
    groups = set(re.findall(r"""(?:\bw|words)\(f?["']([a-z]+)\.(?:\{\w+\})?["']""", source))
    assert keys - EN.keys() == set()
    unused = {key for key in EN.keys() - keys if key.split(".")[0] not in groups}
    assert {key for key in unused if not re.fullmatch(r"plot\.\w+_rate", key)} == set()


def test_the_template_holds_no_words_of_its_own() -> None:
    """Text outside of tags and expressions would stay English in a Chinese page."""
    source = Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8")
    source = re.sub(r"(?s)\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\}|<style>.*?</style>|&\w+;", " ", source)
    assert foreign(re.sub(r"<[^>]+>", " ", source)) == set()


def test_only_one_at_a_time(tmp_path: Path) -> None:
    """Without load there is no table of rates, and the page says what is missing."""
    results(tmp_path, ARMS, one_at_a_time(ARMS, 2, 4))
    html = page(tmp_path)
    assert EN["text.concurrent_missing"] in html
    assert EN["report.differences"] not in html


def test_a_void_run_says_why_and_gives_no_verdict(tmp_path: Path) -> None:
    """Failures at one rate make that rate void: its reason is in the box, its verdict is not."""
    records = under_load(ARMS, [8.0], 2, 30)
    for record in records[-3:]:
        record.finish_reason, record.error, record.token_at = "error", "worker <P0> was lost", []
    results(tmp_path, ARMS, records)
    html = page(tmp_path)
    assert "8 requests/s: void." in html
    assert "worker &lt;P0&gt; was lost" in html  # text of others is escaped
    assert not re.search(r"class=\"(better|worse|open|equal)\"", html)


def test_many_arms(tmp_path: Path) -> None:
    """Every arm of four is on the page."""
    arms = ["1C", "2C", "1P1D", "2P2D"]
    results(tmp_path, arms, one_at_a_time(arms, 1, 4) + under_load(arms, [10.0], 2, 20))
    text = visible(page(tmp_path))
    assert all(arm in text for arm in arms)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """A folder that compare did not write is one sentence, not a trace."""
    with pytest.raises(InputError, match="give a folder that compare has written"):
        report.build(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.0000421, "0.042"),
        (0.00123, "1.23"),
        (0.0123, "12.3"),
        (0.1823, "182"),
        (1.2344, "1,234"),
    ],
)
def test_milliseconds_keep_three_digits(seconds: float | None, shown: str) -> None:
    """Three significant digits, thousands with a comma, a dash for what is not known."""
    assert report.milliseconds(seconds) == shown


def test_changes_show_their_sign_and_no_minus_zero() -> None:
    """A relative change in percent always shows its sign."""
    assert [report.change(share) for share in (0.022, -0.714, 3.61, -0.0001)] == ["+2.2", "-71.4", "+361", "+0.0"]


def test_flatten_leaves_out_what_says_nothing() -> None:
    """Nested settings become dotted names; empty ones are left out."""
    assert dict(report.flatten({"a": {"b": 1, "c": None, "d": ""}, "e": [], "f": (1, 2)})) == {"a.b": "1", "f": "1, 2"}
