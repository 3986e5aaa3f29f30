"""Workbooks (.xlsx) read a row at a time in constant memory; what cells mean is left to openpyxl.

Its own read-only mode holds every text of the workbook, an empty element for each row and what is
set for single rows. Here texts lie in temporary files, which have no name, so that nothing of them
stays after a kill, and an element is dropped as soon as it has been read.
"""

import array
import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from openpyxl.cell.text import Text
from openpyxl.reader.excel import ExcelReader
from openpyxl.worksheet._read_only import ReadOnlyWorksheet
from openpyxl.worksheet._reader import ROW_TAG, WorkSheetParser
from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS
from openpyxl.xml.functions import iterparse  # refuses entities where defusedxml is installed

_STRING_TAG = f"{{{SHEET_MAIN_NS}}}si"
_IN_MEMORY = 1 << 20  # bytes of a temporary file that are held before it lies on the disk
_REPEATED = 4096  # texts that are held because cells often repeat them,
_SHORT = 100  # of at most so many bytes

# openpyxl's warning of a date that is out of range, which quotes the cell.
_QUOTING = "Cell .* is marked as a date"
warnings.filterwarnings("ignore", _QUOTING, module="openpyxl")


class Workbook(ExcelReader):
    """An open workbook; to be closed.

    Args:
      path: of the file.

    Attributes:
      sheets: its worksheets by title, in their order.

    Raises:
      Exception: of many kinds, where the file is no workbook or a damaged one; from `Worksheet`
        too. Messages may quote cells.
    """

    def __init__(self, path: Path):
        super().__init__(path, read_only=True, data_only=True, keep_links=False)
        self.shared_strings = _Texts()
        try:
            self.read()
        except BaseException:
            self.close()
            raise
        self.sheets: dict[str, Worksheet] = {sheet.title: sheet for sheet in self.wb.worksheets}

    def read_strings(self):
        """Overrides openpyxl's: into `_Texts`."""
        part = self.package.find(SHARED_STRINGS)
        if part is not None:
            with self.archive.open(part.PartName[1:]) as source:
                for element in _elements(source, _STRING_TAG):
                    # As openpyxl.reader.strings.read_string_table has it.
                    text = Text.from_tree(element).content.replace("x005F_", "")
                    self.shared_strings.append(text)

    def read_worksheets(self):
        """Overrides openpyxl's: they are `Worksheet`s, and without their hyperlinks."""
        for sheet, relation in self.parser.find_sheets():
            if relation.target not in self.valid_files:
                continue
            if "chartsheet" in relation.Type:
                self.read_chartsheet(sheet, relation)
            else:
                made = Worksheet(self.wb, sheet.name, relation.target, self.shared_strings)
                self.wb._sheets.append(made)

    def close(self) -> None:
        self.archive.close()
        self.shared_strings.close()


class Worksheet(ReadOnlyWorksheet):
    """One of a `Workbook`."""

    def _get_size(self):
        """Overrides openpyxl's, which may read all rows: what a file says of its size is not used,
        because some programs write it wrong, and rows would be left out."""

    def numbered_rows(self) -> Iterator[tuple[int, tuple]]:
        """(number, values) of the rows that are stored; a row ends with its last stored cell."""
        book = self.parent
        with self._get_source() as source:
            parser = WorkSheetParser(
                source,
                self._shared_strings,
                data_only=True,
                epoch=book.epoch,
                date_formats=book._date_formats,
                timedelta_formats=book._timedelta_formats,
            )
            last = 0
            for element in _elements(source, ROW_TAG):
                number, cells = parser.parse_row(element)
                parser.row_dimensions.clear()  # heights and styles, kept for each row
                if number > last:  # openpyxl leaves out rows that go back
                    yield number, self._get_row(cells, values_only=True)
                    last = number


class _Texts(Sequence):
    """The texts of a workbook, by the numbers that its cells give."""

    def __init__(self):
        self._bytes = tempfile.SpooledTemporaryFile(_IN_MEMORY)
        self._ends = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # in `_bytes`; 8 bytes for each text
        self._end = self._count = 0
        self._repeated: dict[int, str] = {}
        self._ends.write(array.array("Q", [0]))

    def append(self, text: str) -> None:
        self._end += self._bytes.write(text.encode())
        self._ends.write(array.array("Q", [self._end]))
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        text = self._repeated.get(index)
        if text is not None:
            return text
        if not 0 <= index < self._count:
            raise IndexError("no such text in the workbook")
        self._ends.seek(8 * index)
        start, end = array.array("Q", self._ends.read(16))
        self._bytes.seek(start)
        text = self._bytes.read(end - start).decode()
        if end - start <= _SHORT:
            if len(self._repeated) == _REPEATED:
                self._repeated.clear()
            self._repeated[index] = text
        return text

    def close(self) -> None:
        for file in (self._bytes, self._ends):
            with contextlib.suppress(OSError):  # what a full disk has not taken is not needed now
                file.close()


def _elements(source, tag: str) -> Iterator[Element]:
    """Elements of a tag, each whole and dropped when the next is asked for, as all others are."""
    around: list[Element] = []  # elements that are open
    inside = False
    for event, element in iterparse(source, ("start", "end")):
        if event == "start":
            around.append(element)
            inside = inside or element.tag == tag
            continue
        around.pop()
        if element.tag == tag:
            yield element
            inside = False
        if around and not inside:
            around[-1].clear()  # of the element, which its parent would keep, empty or not
