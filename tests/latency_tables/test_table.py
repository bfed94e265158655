"""Tables on disk: what is written is read, a kill loses one line, and nothing that is no measurement gets in."""

from dataclasses import replace

import pytest
from sample_tables import SETTING, conv_key, row, write_table

from edgecompress.errors import BadFileError
from edgecompress.latency_tables.table import read_table, sidecar


def test_round_trip_and_later_rows_win(tmp_path):
    first, second, other = row(conv_key(8, 8), 10.0), row(conv_key(8, 8), 12.5), row(conv_key(8, 16), 20.0)
    table = write_table(tmp_path / "t.csv", [first, other, second])
    assert table.rows == {first.key: replace(second, method="node_time again"), other.key: other}
    assert table.provenance.setting == SETTING


def test_rows_without_a_measurement_are_kept_but_not_used(tmp_path):
    unsupported = row(conv_key(8, 8), 0.0, "unsupported")
    table = write_table(tmp_path / "t.csv", [unsupported, row(conv_key(8, 16), 20.0, "contended")])
    assert unsupported.key in table.rows and set(table.usable) == {conv_key(8, 16)}


def test_torn_last_line_is_dropped_with_a_warning_and_mended(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(8, 8), 10.0), row(conv_key(8, 16), 20.0)])
    path.write_bytes(path.read_bytes()[:-15])
    with pytest.warns(UserWarning, match="torn"):
        table = read_table(path)
    assert set(table.rows) == {conv_key(8, 8)}
    assert set(read_table(path).rows) == {conv_key(8, 8)}  # no second warning: warnings are errors here


@pytest.mark.parametrize("value", ["nan", "-3.0", "0.0", "inf"])
def test_a_value_that_is_no_latency_is_refused_with_its_line(tmp_path, value):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(8, 8), 10.0), row(conv_key(8, 16), 20.0)])
    path.write_text(path.read_text().replace("20.0000,0.1000", f"{value},0.1000"))
    with pytest.raises(BadFileError, match="Line 3 of the latency table"):
        read_table(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "other-cpu"), ("runtime_version", "1.20.0"), ("threads", 2), ("provider", "XnnPack")],
)
def test_another_setting_is_refused_by_name_unless_allowed(tmp_path, field, value):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(8, 8), 10.0)])
    wanted = SETTING.model_copy(update={field: value})
    with pytest.raises(BadFileError, match=f"{field} = .* instead of {value}"):
        read_table(path, wanted)
    assert read_table(path, wanted, allow_mismatch=True).rows


def test_a_row_of_another_device_inside_the_file_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(8, 8), 10.0), row(conv_key(8, 16), 20.0)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace("test-cpu", "my-cpu")]))
    with pytest.raises(BadFileError, match=r"Line 3.*another device"):
        read_table(path)


def test_another_schema_and_other_columns_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [])
    text = sidecar(path).read_text()
    sidecar(path).write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(BadFileError, match="schema version 99"):
        read_table(path)
    sidecar(path).write_text(text)
    path.write_text("a,b,c\n")
    with pytest.raises(BadFileError, match="other columns"):
        read_table(path)
