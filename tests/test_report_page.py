"""The report for people: every number, every word about a latency, nothing loaded, nothing that a user named runs."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from edgecompress import report_rows as words
from edgecompress import report_text
from edgecompress.cli.compress import command as compress
from edgecompress.cli.report import command
from edgecompress.errors import BadFileError
from edgecompress.files import append_line, write_document
from edgecompress.report_charts import Axis, Mark, chart, scale
from edgecompress.report_checks import checks_of
from edgecompress.report_page import render_html, render_markdown, summary_table
from edgecompress.report_spec import (
    ArtifactRow,
    Column,
    Goal,
    LayerRow,
    Predicted,
    RunReport,
)
from edgecompress.spec import Config, Cost, Source, Stage, Target, Trial  # fmt: skip

EVIL = "<script>alert('x')</script>|a\"b"


def cost(macs: int, size: int, bits: int, us: float | None, word: str = "estimated", params: int = 80_000) -> Cost:
    known = us is not None
    return Cost(
        macs=macs, sparse_macs=macs * 9 // 10, params=params, nonzeros=params * 8 // 10, size_bytes=size,
        bops=macs * bits * bits, latency_us=us, latency_low_us=us * 0.7 if us else None,
        latency_high_us=us * 1.5 if us else None, **({f"kernels_{word}": 10} if known else {}),
    )  # fmt: skip


def target(**changes: object) -> Target:
    fields: dict[str, object] = {
        "name": "orin", "device": "Orin Test 8GB", "runtime": "TensorRT", "runtime_version": "10.3",
        "exporter": "tensorrt", "dialect": "trt", "max_opset": 20, "integer_kernels": True, "precision": "int8",
        "precisions": ("fp32", "int8"), "channel_divisor": {"fp32": 4, "int8": 32, "fp16": 8}, "memory_mb": 8192,
        "sources": "see https://example.com/facts",
    }  # fmt: skip
    return Target.model_validate(fields | changes)


def layer(name: str, index: int = 0, bits: int = 6) -> LayerRow:
    return LayerRow(
        name=name, kind="conv", in_channels=(64, 32), out_channels=(64, 48 - index % 8), macs=(2_000_000, 750_000),
        keep_elements=0.875, weight_bits=bits, activation_bits=bits, stored_bytes=4321,
        latency=(Predicted(us=70.1, source="estimated"), Predicted(us=35.05, source="estimated")),
    )  # fmt: skip


def foretold(us: float, source: Source = "interpolated") -> Predicted:
    return Predicted(us=us, low_us=us * 0.8, high_us=us * 1.3, source=source)


def report(**changes: object) -> RunReport:
    """A finished run with both stages, both goals kept and an estimated latency."""
    before = Column(
        accuracy=0.9412, cost=cost(12_000_000, 313_616, 32, 701.0), average_weight_bits=32, host_latency_us=252.4,
        host_latency_p90_us=293.0, file="original.onnx",
    )  # fmt: skip
    after = Column(
        accuracy=0.9375, cost=cost(4_400_000, 36_730, 6, 655.0, params=31_650), average_weight_bits=5.87,
        host_latency_us=213.9, host_latency_p90_us=225.0, file="model.int8.onnx",
    )  # fmt: skip
    files = (
        ArtifactRow(
            name="original.onnx", format="onnx", size_bytes=313_616, accuracy=0.9412, host_latency_us=252.4,
            predicted_host=foretold(277.6),
        ),
        ArtifactRow(
            name="original.int8.onnx", format="onnxruntime", size_bytes=85_311, accuracy=0.94, host_latency_us=200.1,
            predicted_host=foretold(198.0, "estimated"),
        ),
        ArtifactRow(
            name="model.int8.onnx", format="onnxruntime", size_bytes=36_129, accuracy=0.9375, host_latency_us=213.9,
            predicted_host=foretold(192.5),
            checks={"emulator_max_difference": 0.0, "emulator_agreement": 1.0, "shapes_match_policy": True},
        ),
        ArtifactRow(
            name="tensorrt/model.onnx", format="tensorrt", size_bytes=36_730, accuracy=0.9361,
            checks={"dialect_lint": "clean", "tensorrt_rtx": "1.7", "tensorrt_rtx_SM86": "parser: no such node"},
        ),
    )  # fmt: skip
    fields: dict[str, object] = {
        "name": "net-digits-orin", "config": Config(model="net", data="digits", target="orin", budget="flops=0.5x", seed=7),
        "target": target(), "latency_source": "ESTIMATED within a factor 1.5; not measured",
        "host_source": "measured on Test CPU, 321 rows",
        "original": before, "compressed": after, "original_int8_us": 200.1, "original_int8_bytes": 85_311,
        "artifacts": files, "layers": (layer("conv1"), layer("fc", 3)),
        "goals": (Goal(goal="flops=0.5x", value=4.4e6, limit=6e6, unit="MACs", holds=True),),
        "found_by": {"prune": "greedy-loss", "quantize": "mutation"},
        "evaluations": {"prune:original": 1, "prune:greedy-loss": 1, "quantize:ddpg": 3, "quantize:mutation": 1},
        "seconds": {"stage 1": 41.25}, "provenance": {"date": "2026-01-02", "edgecompress": "0.1.0"},
    }  # fmt: skip
    return RunReport.model_validate(fields | changes)


def trials(run: RunReport) -> list[Trial]:
    def trial(stage: Stage, episode: int, arm: str, reward: float, price: Cost) -> Trial:
        return Trial(
            stage=stage,
            episode=episode,
            arm=arm,
            choice=(episode,),
            accuracy=reward + 0.04,
            loss=1,
            reward=reward,
            cost=price,
        )

    built = run.compressed.cost
    whole = run.original.cost.macs
    return [
        trial("prune", 0, "original", 0.9, cost(whole, 85_311, 8, 670.0)),
        trial("prune", 1, "greedy-loss", 0.5, built),
        *(trial("quantize", i, "ddpg", 0.8 + i / 100, cost(built.macs, 36_730, 4 + i, 655.0)) for i in range(3)),
        trial("quantize", 3, "mutation", 0.9, built),
    ]


def extreme() -> RunReport:
    """138 M parameters, 60 layers with long names, a measured table, names that would like to be markup."""
    run = report()
    big = cost(15_470_264_320, 553_430_000, 32, 912_345.0, "measured", 138_357_544)
    names = [f"features.stage{i:02d}.very_long_block_name.residual.branch.conv_bn_relu.{i}" for i in range(59)]
    return report(
        name=EVIL, config=run.config.model_copy(update={"model": EVIL, "data": "/data/" + EVIL, "stages": ("prune",)}),
        original=run.original.model_copy(update={"cost": big, "accuracy": 1.0}),
        layers=tuple(layer(name, i) for i, name in enumerate([*names, EVIL])), found_by={"prune": EVIL},
        latency_source=EVIL, provenance={EVIL: EVIL}, evaluations={f"prune:{EVIL}": 1200},
        artifacts=(*run.artifacts, ArtifactRow(name=EVIL, format=EVIL, size_bytes=1, checks={EVIL: EVIL})),
    )  # fmt: skip


def float_only() -> RunReport:
    """A target without integer kernels: no int8 file, no second stage, no latency model, and no trials kept."""
    run = report()
    dark = {"latency_us": None, "latency_low_us": None, "latency_high_us": None, "kernels_estimated": 0}
    columns = [
        column.model_copy(
            update={"cost": column.cost.model_copy(update=dark), "average_weight_bits": 32.0, "file": file}
        )
        for column, file in ((run.original, "original.onnx"), (run.compressed, "model.onnx"))
    ]
    model = ArtifactRow(name="model.onnx", format="onnx", size_bytes=128_450, accuracy=0.9375, host_latency_us=163.6)
    return report(
        target=target(integer_kernels=False, precision="fp16", precisions=("fp32", "fp16")), original=columns[0],
        compressed=columns[1], original_int8_us=None, original_int8_bytes=None,
        artifacts=(run.artifacts[0].model_copy(update={"predicted_host": None}), model),
        layers=(layer("conv1", bits=32).model_copy(update={"latency": None}),), host_source="",
        goals=(), found_by={"prune": "ddpg"}, evaluations={},
    )  # fmt: skip


def missed() -> RunReport:
    goals = (
        Goal(goal="latency@int8=0.6ms", value=655.0, limit=600.0, unit="us", holds=False),
        Goal(goal="accuracy drop", value=-0.37, limit=0.0, unit="points", holds=True),
    )
    return report(goals=goals)


RUNS = {"kept": report, "missed": missed, "float": float_only, "extreme": extreme}


def every(name: str) -> tuple[RunReport, list[Trial]]:
    run = RUNS[name]()
    return run, [] if name == "float" else trials(run)


class Reader(HTMLParser):
    """Visible text, and every tag with its attributes; complains about tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("name", RUNS)
def test_page_is_whole_loads_nothing_and_runs_nothing(name: str) -> None:
    page = render_html(*every(name))
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "foreignObject"} & {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        assert not {key for key in attributes if key in ("src", "href", "srcset") or key.startswith("on")}
    assert not re.search(r"https?://|url\(|@import", page)
    assert not re.search(r"\b(nan|None|inf|undefined|True|False)\b", reader.text)
    widths = [float(number) for number in re.findall(r"width:(-?[\d.]+)%", page)]
    assert widths and all(0 <= width <= 100 for width in widths)


def test_names_that_a_user_gave_are_only_text() -> None:
    reader = Reader(render_html(*every("extreme")))
    assert reader.text.count(EVIL) >= 5
    labels = [attributes.get("aria-label") for _, attributes in reader.tags]
    assert any(label and "trials" in label for label in labels)
    markdown = render_markdown(*every("extreme"))
    assert "<script" not in markdown.replace(report_text.command(extreme().config), "")


def test_headline_and_table_numbers_appear() -> None:
    text = Reader(render_html(*every("kept"))).text
    for wanted in (
        "The goal was kept", "94.12 % → 93.75 %", "-0.37 points", "314 kB → 36.7 kB", "0.117x", "36,730 B", "85,311 B",
        "36,129 B", "12.00 M", "4.400 M", "10.80 M", "31,650", "25,320", "12.29 G", "158.4 M", "5.87 bit", "252 µs",
        "200 µs", "214 µs measured", "p90 225 µs", "655 µs estimated", "458 µs to 982 µs", "10 of 10 kernels estimated",
        "64 → 48", "87.5 %", "6 bit", "4,321 B", "50.0 % → 18.8 %", "found by greedy-loss", "41.2 s",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "tensorrt/model.onnx reaches 93.61 %" in text


def test_every_latency_says_what_it_stands_on() -> None:
    run = report()
    shaky = run.compressed.cost.model_copy(
        update={"kernels_estimated": 0, "kernels_interpolated": 2, "kernels_measured": 8}
    )
    assert str(words.latency(shaky)) == "655 µs interpolated (458 µs to 982 µs)"
    after = run.compressed.model_copy(update={"cost": shaky})
    run = run.model_copy(update={"compressed": after})
    text = Reader(render_html(run, [])).text
    assert "Latency on Orin Test 8GB interpolated 701 µs → 655 µs" in text
    assert "655 µs interpolated" in text and "8 of 10 kernels measured, 2 of 10 kernels interpolated" in text
    assert words.rows(run)[-1].ratio.word == "estimated"  # the original's evidence is the weaker one
    for row in words.rows(run)[-2:]:
        assert all(cell.word for cell in (row.cells[0], row.cells[2], row.ratio))
    assert "not known" in Reader(render_html(float_only(), [])).text


def test_each_layer_has_its_share_of_the_latency_and_the_rest_its_own_row() -> None:
    text = Reader(render_html(*every("kept"))).text
    assert "10.0 % → 5.0 % 70.1 µs → 35.0 µs estimated" in text  # of 701 µs
    assert words.outside_us(report()) == pytest.approx((701 - 2 * 70.1, 655 - 2 * 35.05))
    assert "outside the layers starting kernels, pooling, additions 80.0 % → 83.4 % 561 µs → 585 µs estimated" in text
    mixed = layer("a").model_copy(
        update={"latency": (Predicted(us=9, source="measured"), Predicted(us=5, source="interpolated"))}
    )
    assert words.layer_latency(mixed).word == "interpolated"
    below_zero = report(layers=tuple(
        layer(str(i)).model_copy(update={"latency": (Predicted(us=400, source="measured"),) * 2}) for i in range(2)
    ))  # fmt: skip
    assert words.outside_us(below_zero) == pytest.approx((-99, -145))
    widths = [float(number) for number in re.findall(r"width:(-?[\d.]+)%", render_html(below_zero, []))]
    assert all(0 <= width <= 100 for width in widths)
    assert "outside the layers" not in Reader(render_html(float_only(), [])).text


def test_predictions_stand_beside_the_measured_times() -> None:
    text = Reader(render_html(*every("kept"))).text
    assert "original.onnx 278 µs interpolated 222 µs to 361 µs 252 µs measured +10 %" in text
    assert "model.int8.onnx 192 µs interpolated 154 µs to 250 µs 214 µs measured -10 %" in text
    assert "Prediction for this machine: measured on Test CPU, 321 rows." in text
    assert "On Orin Test 8GB nothing was measured by this run" in text
    assert "| 252 µs measured | 278 µs interpolated |" in render_markdown(*every("kept"))
    assert "Nothing to compare." in Reader(render_html(float_only(), [])).text


def test_accuracy_names_the_file_that_it_is_of() -> None:
    cells = words.rows(report())[0].cells
    assert [cell.note for cell in cells] == ["original.onnx", "original.int8.onnx", "model.int8.onnx"]
    assert "93.75 % (model.int8.onnx)" in render_markdown(report())


def test_a_missed_goal_is_not_hidden() -> None:
    run, tried = every("missed")
    text = Reader(render_html(run, tried)).text
    assert "1 of 2 goals missed" in text and "✗ missed" in text and "655 µs estimated limit 600 µs" in text
    assert "**missed**: latency@int8=0.6ms (655 µs, limit 600 µs)" in render_markdown(run)
    assert "1 of 2 goals missed" in str(summary_table(run).title)


def test_charts_mark_the_built_policy_and_what_is_over_the_budget() -> None:
    run, tried = every("kept")
    page = render_html(run, tried)
    assert page.count('class="ring"') == 4  # two charts of two stages
    assert page.count("hollow") - page.count(".hollow") == 2  # the original, in both charts of stage 1
    assert "It ends at 0.500." in page and "It ends at 0.900." in page  # 0.9 of the original does not count in stage 1
    tightened = [trial.model_copy(update={"arm": "other"}) for trial in tried]
    assert words.chosen(run, tightened, "prune") is None and 'class="ring"' not in render_html(run, tightened)
    assert "nothing to draw" in render_html(run, [])
    bops = Goal(goal="bops=0.01x", value=2e8, limit=1e8, unit="BOPs", holds=False)
    over = [words.fits(run.model_copy(update={"goals": (bops,)}), trial) for trial in tried]
    assert over == [True, True, True, False, False, False]  # stage 1 does not choose bits
    float_page = Reader(render_html(float_only(), [])).text
    assert float_page.count("This stage was not run") == 1 and "int8 alone not pruned" not in float_page


def test_chart_of_one_value_and_round_ticks() -> None:
    assert scale([0.61, 0.98]).ticks == pytest.approx((0.6, 0.7, 0.8, 0.9, 1.0))
    assert scale([3, 3]).low < 3 < scale([3, 3]).high
    axis = Axis("<x>", str)
    drawn = chart([Mark(0, 0, 0, "<b>")], axis, axis, 'a "label"', line=[(0, 0)], limit=(5, "budget"))
    places = [float(number) for number in re.findall(r'(?:cx|cy|x1|x2|y1|y2)="([-\d.]+)%"', drawn)]
    assert places and all(0 <= place <= 100 for place in places)
    assert "<b>" not in drawn and "<x>" not in drawn and "a &#34;label&#34;" in drawn


@pytest.mark.parametrize("name", RUNS)
def test_markdown_tables_are_square(name: str) -> None:
    markdown = render_markdown(*every(name))
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert not re.search(r"\b(nan|None|inf)\b", markdown)


def test_int8_alone_is_priced_from_the_search() -> None:
    run, tried = every("kept")
    assert words.rows(run)[-1].cells[1] == words.Cell()
    row = words.rows(run, tried)[-1]
    assert row.cells[1].value == "670 µs" and row.cells[1].word == "estimated"
    assert [str(row.cells[1]) for row in words.rows(run, tried)][5] == "768.0 M"


@pytest.mark.parametrize(("name", "columns"), [("kept", 5), ("float", 4), ("extreme", 5)])
def test_summary_table_has_the_same_rows_as_the_page(name: str, columns: int) -> None:
    run, tried = every(name)
    table = summary_table(run, tried)
    labels = [str(cell).splitlines()[0] for cell in table.columns[0].cells]
    assert labels == [row.label for row in words.rows(run, tried)] and len(table.columns) == columns
    page = Reader(render_html(run, tried)).text
    assert all(label in page for label in labels)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    assert "compressed" in capture.get() and (name == "float" or "estimated" in capture.get())


def test_numbers_in_words() -> None:
    assert [words.quantity(n) for n in (0, 999_999, 138_357_544, 15.47e9, 2e12)] == [
        "0", "999,999", "138.4 M", "15.47 G", "2.000 T",
    ]  # fmt: skip
    assert [words.duration(us) for us in (0.5, 9.876, 999.9, 1029.6, 912_345, None)] == [
        "0.500 µs", "9.88 µs", "1,000 µs", "1,030 µs", "912 ms", "–",
    ]  # fmt: skip
    assert [words.file_size(n) for n in (36_730, 553_430_000)] == ["36,730 B", "553.4 MB"]
    assert [words.ratio(1, 2), words.ratio(36_730, 313_616), words.ratio(1, 15_000), words.ratio(1, 0)] == [
        "0.50x", "0.117x", "0.000067x", "–",
    ]  # fmt: skip


def test_command_reproduces_the_configuration() -> None:
    config = Config(
        model="my.nets:build", data="/data/my set", target="x86", budget="flops=0.5x,size=40KB", seed=3,
        max_accuracy_drop=1.5, stages=("prune",), require_measured=True,
    )  # fmt: skip
    found = shlex.split(report_text.command(config))
    assert found[:2] == ["edgecompress", "compress"] and "--require-measured" in found and "--agent" not in found
    pairs = {
        "--data": "/data/my set",
        "--stages": "prune",
        "--max-accuracy-drop": "1.5",
        "--seed": "3",
        "--episodes": "80",
    }
    assert all(found[found.index(option) + 1] == value for option, value in pairs.items())
    tuned = shlex.split(report_text.command(config.model_copy(update={"importance": "l1"})))
    assert sorted(tuned) == sorted([*found, "--importance", "l1"])


def test_command_uses_only_options_that_exist() -> None:
    options = {option for parameter in compress.params for option in parameter.opts}
    fields = set(Config.model_fields) - {"schema_version"}
    assert {f"--{name.replace('_', '-')}" for name in fields} <= options


def test_checks_pass_fail_or_only_tell() -> None:
    found = {
        check.text: check.passed for check in checks_of(report().artifacts[2].checks | report().artifacts[3].checks)
    }
    assert list(found.values()) == [True, None, True, True, None, False]
    assert checks_of({"relative_error": 0.5})[0].passed is None and checks_of({"new_key": 3})[0].text == "new_key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run, tried = every("kept")
    write_document(tmp_path / "report.json", run)
    for trial in tried:
        append_line(tmp_path / "trials.jsonl", trial)
    return tmp_path


def test_command_writes_the_page_and_prints_the_table(folder: Path) -> None:
    result = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert result.exit_code == 0 and "0.117x" in result.output and "estimated" in result.output
    assert (folder / "report.html").read_text(encoding="utf-8") == render_html(*every("kept"))


def test_command_prints_markdown_and_json(folder: Path) -> None:
    markdown = CliRunner().invoke(command, [str(folder), "--format", "md"], catch_exceptions=False)
    assert markdown.output == render_markdown(*every("kept")) and not (folder / "report.html").exists()
    out = folder / "copy.json"
    printed = CliRunner().invoke(command, [str(folder), "--format", "json"], catch_exceptions=False)
    CliRunner().invoke(command, [str(folder), "--format", "json", "--out", str(out)], catch_exceptions=False)
    assert RunReport.model_validate_json(printed.output) == report() and out.read_text() == printed.output


def test_command_explains_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="no run at"):
        CliRunner().invoke(command, [str(tmp_path / "nowhere")], catch_exceptions=False)
    with pytest.raises(BadFileError, match=r"report\.json"):
        CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
    assert "edgecompress report runs/first" in CliRunner().invoke(command, ["--help"]).output


def test_the_pareto_set_is_a_table_with_the_built_trial_and_the_way_to_another():
    run = report(name="my run")
    known = trials(run)
    small = known[1].model_copy(
        update={"choice": (9,), "episode": 9, "accuracy": 0.1, "cost": cost(3_000_000, 30_000, 8, 500.0)}
    )
    page = render_html(run, [*known, small])
    tables = re.findall(r'<table class="arms front">.*?</table>', page, re.DOTALL)
    assert [table.count('<th scope="row">') for table in tables] == [3, 3]
    assert all(table.count('class="built"') == 1 for table in tables)
    assert "latency, estimated" in tables[0] and "over the budget" in tables[0] and "BOPs" not in tables[0]
    assert "BOPs" in tables[1]
    commands = [line for line in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL) if "pick" in line]
    taken = shlex.split(commands[0].replace("&#39;", "'").splitlines()[-1])
    assert taken[:2] == ["edgecompress", "compress"] and taken[taken.index("--pick") + 1] == "runs/my run"
    assert len(commands) == 2 and "--stage quantize" in commands[1]


def test_the_command_turns_off_what_was_turned_off():
    config = Config(budget="flops=0.5x", reconstruct=False, single_weights=False, two_four=True)
    words = report_text.command(config).split()
    assert {"--no-reconstruct", "--no-single-weights", "--two-four"} <= set(words)
