"""The footer's sizes are those that pyarrow reports; a malformed one is refused in one line."""

import pyarrow
import pyarrow.parquet
import pytest

from smollm_jax.data.parquet_footer import column_sizes
from smollm_jax.errors import InputFileError


def table(rows: int) -> pyarrow.Table:
    texts = [f"text {i % 7}" * (i % 5) for i in range(rows)]
    nested = [{"a": [i, i + 1], "b": {"c": 1.5, "d": i % 2 == 0}} for i in range(rows)]
    maps = pyarrow.array([[("k", i)] for i in range(rows)], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    return pyarrow.table({"text": texts, "nested": nested, "map": maps, "n": [None] * rows, "x": [0.5] * rows})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 3, "compression": "zstd"},
        {"row_group_size": 1, "use_dictionary": False, "write_statistics": False, "store_schema": False},
        {"sorting_columns": [pyarrow.parquet.SortingColumn(0)], "write_page_index": True, "column_encoding": None},
    ],
)
def test_sizes_are_those_that_pyarrow_reports(tmp_path, options):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table(40), path, **options)
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [[group.column(i) for i in range(metadata.num_columns)] for group in groups]
    assert column_sizes(path, len(groups), metadata.num_columns) == [
        [(chunk.total_uncompressed_size, chunk.total_compressed_size) for chunk in group] for group in chunks
    ]
    assert metadata.num_columns == 8
    for other in ((len(groups) + 1, 8), (len(groups), 7)):
        with pytest.raises(InputFileError, match="its footer is malformed"):
            column_sizes(path, *other)


def test_a_malformed_footer_is_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table(3), path)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - length
    for cut in (1, 5, length // 2, length - 1):  # a footer that ends too early
        path.write_bytes(content[: start + cut] + cut.to_bytes(4, "little") + b"PAR1")
        with pytest.raises(InputFileError, match=r"x\.parquet: not a readable Parquet file: its footer is malformed"):
            column_sizes(path, 1, 8)
    endless = b"\x19\xf1" + b"\xff" * 8 + b"\x0f"  # a list of 2**60 booleans
    footers = b"\x49" * 400, b"\x4c" * 400, b"\x15" + b"\xff" * 20, b"\x1d\x00", b"\x19\xfc\xff\xff\xff\xff\x0f"
    for footer in (*footers, endless):
        path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(InputFileError, match="its footer is malformed"):
            column_sizes(path, 1, 8)
    for other in (b"", b"PAR1", content[:-4] + b"PARE", content[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(other)
        with pytest.raises(InputFileError, match="its footer is malformed"):
            column_sizes(path, 1, 8)
