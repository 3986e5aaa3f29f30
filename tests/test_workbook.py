"""Workbooks are read as openpyxl reads them, but hold nothing of their rows."""

import datetime
import errno
import gc
import io
import itertools
import tempfile
import tracemalloc
import warnings
import zipfile

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radonc_jax.data import workbook
from radonc_jax.data.rows import Layout, open_rows, read_rows
from radonc_jax.data.workbook import Workbook

MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
STRINGS = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
OVERRIDE = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{STRINGS}"/></Types>'
HEADER = '<row r="1"><c r="A1" t="inlineStr"><is><t>diagnosis</t></is></c></row>'


def write_workbook(path, rows, strings=None, before="", after=""):
    """A workbook as programs write it that keep texts in a table of their own, as Excel does.

    Args:
      path: of the file.
      rows, strings: iterables of XML, of the rows and of the table of texts; without one, None.
      before, after: XML of the worksheet beside its rows.
    """
    with tempfile.TemporaryFile() as file:
        book = openpyxl.Workbook()
        # Styles 1 to 3: a date, a time span, a number.
        for place, style in (("A1", "yyyy-mm-dd"), ("A2", "[h]:mm"), ("A3", "0.00")):
            book.active[place].number_format = style
        book.save(file)
        with zipfile.ZipFile(file) as made, zipfile.ZipFile(path, "w") as archive:
            for name in made.namelist():
                content = made.read(name)
                if strings is not None:
                    content = content.replace(b"</Types>", OVERRIDE.encode())
                if name != "xl/worksheets/sheet1.xml":
                    archive.writestr(name, content)
            with archive.open("xl/worksheets/sheet1.xml", "w") as sheet:
                sheet.write(f"<worksheet {MAIN}>{before}<sheetData>".encode())
                sheet.writelines(row.encode() for row in rows)
                sheet.write(f"</sheetData>{after}</worksheet>".encode())
            if strings is not None:
                with archive.open("xl/sharedStrings.xml", "w") as table:
                    table.write(f"<sst {MAIN}>".encode())
                    table.writelines(text.encode() for text in strings)
                    table.write(b"</sst>")


def openpyxl_rows(path):
    """{title: rows} as openpyxl itself reads them, missing rows as empty ones."""
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        for sheet in book.worksheets:
            sheet.reset_dimensions()
        return {
            sheet.title: [tuple(row) for row in sheet.iter_rows(values_only=True)]
            for sheet in book.worksheets
        }
    finally:
        book.close()


def own_rows(path):
    book, read = Workbook(path), {}
    try:
        for title, sheet in book.sheets.items():
            rows = read[title] = []
            for number, values in sheet.numbered_rows():
                rows.extend([()] * (number - 1 - len(rows)))
                rows.append(values)
    finally:
        book.close()
    return read


def assert_as_openpyxl(path):
    ours, theirs = own_rows(path), openpyxl_rows(path)
    assert repr(ours) == repr(theirs)  # in which 1, 1.0 and True differ
    return ours


ODD_STRINGS = [
    "<si><t>plain</t></si>",
    '<si><t xml:space="preserve"> a &amp; b\nc </t></si>',
    "<si><t>line_x000D_end _x005F_x000D_ _x0041_ x005F_</t></si>",
    '<si><r><rPr><b/><sz val="11"/></rPr><t>T1 </t></r><r><t xml:space="preserve"> N0</t></r></si>',
    '<si><t>漢字</t><rPh sb="0" eb="1"><t>かんじ</t></rPh><phoneticPr fontId="1"/></si>',
    "<si><t/></si>",
    "<si/>",
    "<si><t>naïve 🦓 \u2028\u00a0</t></si>",
    f"<si><t>{'long ' * 200}</t></si>",
]
ODD_CELLS = [
    *(f'<c r="{{}}" t="s"><v>{number}</v></c>' for number in range(len(ODD_STRINGS))),
    '<c r="{}" t="s"/>',
    '<c r="{}"/>',
    '<c r="{}"><v>7</v></c>',
    '<c r="{}"><v>-2.50</v></c>',
    '<c r="{}" s="3"><v>1E-3</v></c>',
    '<c r="{}"><v>60</v></c>',
    '<c r="{}" s="1"><v>44197</v></c>',
    '<c r="{}" s="1"><v>44197.75</v></c>',
    '<c r="{}" s="2"><v>1.5</v></c>',
    '<c r="{}" s="1"><v>99999999999</v></c>',
    '<c r="{}" t="d"><v>2021-01-01T12:30:00</v></c>',
    '<c r="{}" t="b"><v>1</v></c>',
    '<c r="{}" t="b"><v>0</v></c>',
    '<c r="{}" t="e"><v>#N/A</v></c>',
    '<c r="{}"><f>1+1</f><v>2</v></c>',
    '<c r="{}" t="str"><f>A1&amp;"x"</f><v>cached</v></c>',
    '<c r="{}"><f>NOW()</f></c>',
    '<c r="{}" t="inlineStr"><is><t>in _x000D_ line</t></is></c>',
    '<c r="{}" t="inlineStr"><is><r><rPr><i/></rPr><t>rich </t></r><r><t>line</t></r></is></c>',
    '<c r="{}" t="inlineStr"/>',
]
# What Excel writes around the rows, of which none is a row.
BEFORE = (
    '<sheetPr><pageSetUpPr fitToPage="1"/></sheetPr><dimension ref="A1:A1"/>'
    '<sheetViews><sheetView workbookViewId="0"><selection activeCell="A1" sqref="A1"/></sheetView>'
    '</sheetViews><cols><col min="1" max="2" width="9"/></cols>'
)
AFTER = (
    '<mergeCells count="1"><mergeCell ref="A1:B1"/></mergeCells><conditionalFormatting sqref="A1">'
    '<cfRule type="cellIs" priority="1" operator="equal"><formula>1</formula></cfRule>'
    '</conditionalFormatting><pageMargins left="1" right="1" top="1" bottom="1" header="1" '
    'footer="1"/>'
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_cells_of_every_kind_are_read_as_openpyxl_reads_them(tmp_path_factory, data):
    """Also rows and cells that are missing, have no place, or go back."""
    path = tmp_path_factory.getbasetemp() / "any.xlsx"
    rows, number = [], 0
    for _ in range(data.draw(st.integers(0, 6))):
        number += data.draw(st.sampled_from([1, 1, 1, 2, 5, 0, -1]))
        cells, column = [], 0
        for cell in data.draw(st.lists(st.sampled_from(ODD_CELLS), max_size=6)):
            column += data.draw(st.sampled_from([1, 1, 1, 3]))
            placed = cell.format(f"{chr(64 + column)}{max(number, 1)}")
            if data.draw(st.booleans()):
                placed = placed.replace(f' r="{chr(64 + column)}{max(number, 1)}"', "")
            cells.append(placed)
        attributes = data.draw(st.sampled_from([f'r="{number}"', "", f'r="{number}" ht="30"']))
        rows.append(f"<row {attributes}>{''.join(cells)}</row>")
    write_workbook(
        path, rows, ODD_STRINGS, *data.draw(st.sampled_from([("", ""), (BEFORE, AFTER)]))
    )
    with warnings.catch_warnings(record=True):  # of the date out of range
        assert_as_openpyxl(path)


def test_all_kinds_of_cells_at_once_and_several_sheets(tmp_path):
    path = tmp_path / "all.xlsx"
    row = "".join(cell.replace(' r="{}"', "") for cell in ODD_CELLS)
    rows = [HEADER, *[f"<row>{row}</row>"] * 3]
    with warnings.catch_warnings(record=True):
        write_workbook(path, rows, ODD_STRINGS, BEFORE, AFTER)
        ((_, first, second, third),) = assert_as_openpyxl(path).values()
    assert first == second == third
    assert first[2:5] == ("line_x000D_end _x000D_ _x0041_ ", "T1  N0", "漢字")
    book = openpyxl.Workbook()
    book.active.append(["a", None, 1.5, datetime.datetime(2021, 3, 4, 5, 6), True, "=1+1", "#N/A"])
    book.create_sheet("Second").append(["b"])
    chart = openpyxl.chart.BarChart()
    chart.add_data(openpyxl.chart.Reference(book.active, min_col=3, min_row=1))
    book.create_chartsheet("Chart").add_chart(chart)
    book.create_sheet("Empty")
    book.epoch = openpyxl.utils.datetime.CALENDAR_MAC_1904
    book.save(path)
    assert list(assert_as_openpyxl(path)) == ["Sheet", "Second", "Empty"]


@pytest.mark.parametrize("held", [1 << 20, 1])
def test_texts_are_kept_by_number_whatever_is_on_the_disk(tmp_path, monkeypatch, held):
    """Nothing of them has a name there, and all is closed."""
    monkeypatch.setattr(workbook, "_IN_MEMORY", held)
    monkeypatch.setattr(workbook, "_REPEATED", 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    texts = [f"{number} ü" * (number % 50) for number in range(500)]
    path = tmp_path / "cases.xlsx"
    order = [*range(500), *range(499, -1, -7), 3, 3, 3, 0]
    rows = (f'<row><c t="s"><v>{number}</v></c></row>' for number in order)
    write_workbook(path, rows, (f"<si><t>{text}</t></si>" for text in texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        book = Workbook(path)
        assert not list((tmp_path / "temporary").iterdir())
        assert [row[0] for _, row in book.sheets["Sheet"].numbered_rows()] == [
            texts[number] for number in order
        ]
        assert list(book.shared_strings) == texts
        for wrong in (-1, 500):
            with pytest.raises(IndexError):
                book.shared_strings[wrong]
        book.close()
        assert book.shared_strings._bytes.closed and book.shared_strings._ends.closed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "strings", "kind"),
    [
        ([HEADER, '<row><c t="s"><v>1</v></c></row>'], ["<si><t>Zebra</t></si>"], "IndexError"),
        ([HEADER, '<row><c t="s"><v>-1</v></c></row>'], ["<si><t>Zebra</t></si>"], "IndexError"),
        ([HEADER, '<row><c t="s"><v>Zebra</v></c></row>'], ["<si/>"], "ValueError"),
        ([HEADER, "<row><c><v>Zebra</v></c></row>"], None, "ValueError"),
        ([HEADER, "<row><c><v>Zebra</c></row>"], None, "ParseError"),
        ([HEADER, "<row><c><v>1</v></c></row>"], ["<si><t>Zebra</si>"], "ParseError"),
        (
            [HEADER, "<row><c><v>1</v></c></row>"],
            ['<si><r><rPr><u val="Zebra"/></rPr></r></si>'],
            "ValueError",
        ),
    ],
)
def test_a_damaged_workbook_is_refused_without_quoting_it(
    tmp_path, monkeypatch, rows, strings, kind
):
    """With all its files closed, of which an error would tell here."""
    monkeypatch.setattr(workbook, "_IN_MEMORY", 1)
    path = tmp_path / "cases.xlsx"
    write_workbook(path, rows, strings)
    with pytest.raises(ValueError, match=rf"not a readable workbook \({kind}\)$") as error:
        open_rows(path)
    assert "Zebra" not in str(error.value)
    del error
    gc.collect()


@pytest.mark.parametrize("room", [0, 50])
def test_a_full_disk_is_not_taken_for_a_damaged_workbook(tmp_path, monkeypatch, room):
    """Met while texts are written or, of those that wait in a buffer, when the first is read."""

    class Disk(io.FileIO):
        left = room

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def file(**options):
        return io.BufferedRandom(Disk(tmp_path / f"{next(numbers)}", "w+b"))

    numbers = itertools.count()
    path = tmp_path / "cases.xlsx"
    rows = [HEADER, '<row r="2"><c t="s"><v>0</v></c></row>']
    write_workbook(path, rows, ["<si><t>Zebra sarcoma</t></si>"] * 4)
    monkeypatch.setattr(workbook, "_IN_MEMORY", 10)
    monkeypatch.setattr(workbook.tempfile, "TemporaryFile", file)
    with pytest.raises(ValueError, match="no room for its texts in .*TMPDIR") as error:
        open_rows(path)
    assert "Zebra" not in str(error.value)
    del error
    gc.collect()


@pytest.mark.filterwarnings("error")
def test_a_date_out_of_range_is_not_quoted_in_a_warning(tmp_path):
    """It may be a number of a patient in a column that is shown as a date."""
    path = tmp_path / "cases.xlsx"
    write_workbook(path, [HEADER, '<row r="2"><c r="A2" s="1"><v>99999999999</v></c></row>'])
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("ignore", workbook._QUOTING, module="openpyxl")
        assert [values for _, values in open_rows(path)] == [["#VALUE!"]]
    assert not told


@pytest.mark.parametrize("kind", ["texts", "inline", "links"])
def test_memory_does_not_grow_with_the_rows(tmp_path, kind):
    """Nor with different texts, nor with what is set for single rows."""

    def peak(count):
        path = tmp_path / f"{count}.xlsx"
        texts = (f"{number}" * 60 for number in range(10**6, 10**6 + count))
        cell = '<c t="inlineStr"><is><t>{}</t></is></c>' if kind == "inline" else "<c><v>{}</v></c>"
        strings, after = None, ""
        values = iter(texts)
        if kind == "texts":
            cell, strings, values = '<c t="s"><v>{}</v></c>', [], range(count)
            strings = (f"<si><t>{text}</t></si>" for text in texts)
        elif kind == "links":
            values = range(count)
            links = (f'<hyperlink ref="A{n}" location="A1"/>' for n in range(1, count + 1))
            after = f"<hyperlinks>{''.join(links)}</hyperlinks>"
        row = f'<row r="{{}}" ht="30" customHeight="1">{cell}</row>'
        rows = (row.format(number, value) for number, value in enumerate(values, 1))
        write_workbook(path, rows, strings, after=after)
        layout = Layout(".xlsx", sheet="Sheet")
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_rows(path, layout, ragged=True)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(4000), peak(20_000)
    assert many < few + 5e5, (few, many)
