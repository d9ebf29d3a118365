"""The page: figures that can be checked by hand, text that cannot break out, one file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lascaux.config.load import to_toml
from lascaux.config.schema import Config, ScheduleConfig, TrainConfig
from lascaux.errors import CheckpointError
from lascaux.report.html import MFU_CONVENTION, escape, headline_figures, write_report
from lascaux.report.records import elapsed_seconds, read_run

CONFIG = Config(train=TrainConfig(steps=100), schedule=ScheduleConfig(warmup_steps=10))
EVIL = '</pre><script>alert(1)</script> & "q" \'\x00\x1b[31m'


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(num_steps: int) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {
            "step": step,
            "tokens_seen": step * 8192,
            "loss": 5.0 - step / 100,
            "lr": 6e-4,
            "grad_norm": 0.5,
            "tokens_per_second": 16_000.0 + step,
            "mfu": 0.4 + step / 2000,
            "seconds": 0.5,
        }
        for step in range(1, num_steps + 1)
    ]
    records[-1] |= {"valid_loss": 3.25, "bits_per_byte": 1.375}
    return records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "a run & more"
    (run / "data").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(CONFIG))
    write_lines(run / "metrics.jsonl", metrics(100))
    write_lines(
        run / "samples.jsonl",
        [
            {"step": 50, "prompt": "def ", "text": "early"},
            {"step": 100, "prompt": "<b>", "text": EVIL},
        ],
    )
    write_lines(
        run / "events.jsonl",
        [{"time": "2026-01-02T03:04:05+00:00", "step": 7, "event": "continue", "detail": EVIL}],
    )
    machine = {"device": "cpu", "memory_bytes": 2**34, "git": None, "lascaux": "0.1.0"}
    machine["matmul_peak_flops_per_second"] = 153e9
    (run / "environment.json").write_text(json.dumps(machine))
    split = {"documents": 10, "tokens": 1000, "text_bytes": 3400}
    source = {
        "path": "stdlib",
        "excluded": {"empty": 2, "not UTF-8": 1},
        "splits": {"train": split, "valid": split},
    }
    index = {"sources": [source, source], "identity": "abcdef0123456789"}
    (run / "data" / "index.json").write_text(json.dumps(index))
    return run


class Reader(HTMLParser):
    """Tags, attributes and text of a page, failing on elements closed out of order."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_without_script_or_address(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value is not None and value.startswith("#")
    inside = {f"#{place}" for place in re.findall(r'id="([^"]+)"', page)}
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= inside
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert addresses <= {"http://www.w3.org/1999/xlink"}  # the name of a namespace
    assert "prefers-color-scheme: dark" in page
    assert not list(run.glob(".tmp*"))


def test_text_from_the_run_is_shown_as_it_is(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    text = Reader(page).text
    shown = EVIL.replace("\x00", "␀").replace("\x1b", "␛")
    assert text.count(shown) == 2
    assert "a run & more" in text
    assert "<b>&lt;b&gt;</b>" in page
    assert escape("half a character: \ud800") == "half a character: ?"


def test_headline_figures(run: Path) -> None:
    figures = {label: (value, note) for label, value, note in headline_figures(read_run(run))}
    assert figures["Bits per byte"] == ("1.375", "validation, step 100")
    assert figures["Validation loss"] == ("3.250", "nats per token")
    assert figures["Training loss"] == ("4.005", "nats per token, mean of the last 2 steps")
    assert figures["Tokens seen"][0] == "819 k"
    assert figures["Wall time"] == ("50 s", "to step 100, validation included")
    assert figures["Speed"] == ("16,051 tokens/s", "median over the steps")
    assert figures["MFU"] == ("42.6 %", f"median; {MFU_CONVENTION}")
    assert MFU_CONVENTION == (
        "MFU = (6·N + 12·L·d·T) per token ÷ measured matrix-multiply peak, PaLM appendix B"
    )


def test_machine_data_events_and_config_are_there(run: Path) -> None:
    text = Reader(write_report(run).read_text(encoding="utf-8")).text
    for wanted in (
        "16.0 GiB",
        "153 GFLOP/s",
        "not known",
        "20 documents, 2.00 k tokens, 6.64 KiB of text",
        "3.40",
        "abcdef012345",
        "2026-01-02 03:04:05 UTC",
        "d_model = 256",
        "finished all 100 steps",
    ):
        assert wanted in text


def test_config_and_metrics_are_enough(run: Path) -> None:
    for name in ("samples.jsonl", "events.jsonl", "environment.json", "data/index.json"):
        (run / name).unlink()
    records = metrics(3)
    del records[-1]["valid_loss"], records[-1]["bits_per_byte"]
    write_lines(run / "metrics.jsonl", records)
    text = Reader(write_report(run).read_text(encoding="utf-8")).text
    assert "stands at step 3 of 100" in text
    for absent in ("Samples", "Events", "Machine", "Data", "Bits per byte"):
        assert absent not in text


def test_wall_time_is_what_the_run_recorded_or_the_sum_of_its_steps() -> None:
    assert elapsed_seconds([{"seconds": 1.0}, {"seconds": 2.0}]) == [1.0, 3.0]
    recorded = [{"seconds": 1.0, "elapsed_seconds": 4.0}, {"seconds": 2.0, "elapsed_seconds": 9.0}]
    assert elapsed_seconds(recorded) == [4.0, 9.0]


def test_a_torn_last_line_is_left_out(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 101, "tok')
    assert len(read_run(run).metrics) == 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "tok', "line 2 is not JSON"),
        ("[1, 2]", "line 2: expected an object with step, tokens_seen"),
        ('{"step": 2}', "without tokens_seen, loss, lr"),
    ],
)
def test_a_damaged_line_is_named(run: Path, line: str, message: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_metric_that_is_no_number_is_named(run: Path) -> None:
    records = metrics(3)
    records[2]["lr"] = "high"
    write_lines(run / "metrics.jsonl", records)
    with pytest.raises(CheckpointError, match="line 3: 'lr' must be a number; got 'high'"):
        write_report(run)


def test_a_folder_that_is_no_run_says_what_to_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="lascaux train --run"):
        write_report(tmp_path / "nowhere")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="no metrics yet.*`lascaux train --run .*` trains it"):
        write_report(run)


def test_other_damaged_files_are_named(run: Path) -> None:
    (run / "environment.json").write_text("{")
    with pytest.raises(CheckpointError, match="environment.json is not JSON"):
        write_report(run)
    (run / "environment.json").write_text("[]")
    with pytest.raises(
        CheckpointError, match="environment.json: expected a JSON object, found list"
    ):
        write_report(run)


def test_a_report_replaces_the_one_before(run: Path) -> None:
    (run / "report.html").write_text("old")
    assert "old" not in write_report(run).read_text(encoding="utf-8")[:100]


def test_a_page_that_cannot_be_written_is_the_users_to_mend(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(CheckpointError, match="cannot write .*report.html: Is a directory"):
        write_report(run)
