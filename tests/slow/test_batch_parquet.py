"""Manifests in Parquet, which the extra `parquet` reads."""

from pathlib import Path

import pyarrow
import pytest
from batch_jobs import results, run
from pyarrow import parquet

from granite_jax import GraniteError


def test_rows_of_parquet_are_entries(corpus: Path, tmp_path: Path) -> None:
    # Given Parquet with columns that some rows lack, and one without a column of audio
    table = pyarrow.table({"audio": ["a/1.wav", "a/3.wav"], "offset": [None, 0.05], "keywords": [["Kai"], None]})
    parquet.write_table(table, corpus / "m.parquet")
    parquet.write_table(table.drop_columns("audio"), corpus / "none.parquet")
    # When they are run, then the rows are entries, and the other is named
    _, asr = run(corpus / "m.parquet", tmp_path / "out")
    assert [line["audio"] for line in results(tmp_path / "out")] == ["a/1.wav", "a/3.wav"]
    assert asr.keywords == [["Kai"], []]
    with pytest.raises(GraniteError, match="has no column such as audio or path, only offset, keywords"):
        run(corpus / "none.parquet", tmp_path / "none")
    (corpus / "cut.parquet").write_bytes((corpus / "m.parquet").read_bytes()[:-9])
    with pytest.raises(GraniteError, match=r"cut\.parquet: is damaged Parquet"):
        run(corpus / "cut.parquet", tmp_path / "cut")
