"""What a benchmark writes: rows of one run each, also where several runs fill one table."""

import argparse
import json

import pytest

pytestmark = pytest.mark.cpu_only

report = pytest.importorskip("benchmarks.report", reason="benchmarks draw with matplotlib")


def cell(column: str, seconds: float) -> dict:
    return {
        "column": column,
        "seconds": 2 * [seconds],
        "first": seconds,
        "median": seconds,
        "errors": [1e-7],
        "note": "",
    }


def row(operation: str, n: int = 10, threads: int = 1, **seconds: float) -> dict:
    cells = [cell(column, value) for column, value in seconds.items()]
    return {"network": "5-8-1", "P": 57, "n": n, "threads": threads, "operation": operation, "cells": cells}


def test_a_row_measured_again_takes_the_whole_rows_place():
    rows = [row("Gram", ours=1.0, theirs=2.0), row("J u", ours=3.0, theirs=4.0)]
    new = [row("J u", ours=5.0), row("Gram", n=20, ours=6.0), row("Gram", threads=2, ours=7.0)]
    assert report.merged(rows, new) == [rows[0], new[0], new[1], new[2]]


def test_columns_with_a_row_each_are_told_apart():
    rows = [row("adapt", ours=1.0) | {"way": "ours"}, row("adapt", theirs=2.0) | {"way": "theirs"}]
    new = [row("adapt", theirs=3.0) | {"way": "theirs"}]
    assert report.merged(rows, new) == [rows[0], new[0]]


@pytest.mark.parametrize("keep", [True, False])
def test_earlier_results_are_kept_where_that_is_asked_for(keep, tmp_path):
    arguments = argparse.Namespace(output=tmp_path, keep=keep)
    assert report.earlier(arguments, "engines") == {"rows": []}
    rows = [row("Gram", ours=1.0)]
    report.write(tmp_path, "engines", {"rows": rows}, "# Engines")
    assert report.earlier(arguments, "engines")["rows"] == (rows if keep else [])
    assert json.loads((tmp_path / "engines.json").read_text())["machine"]["torch"]


def test_a_table_of_rows_with_different_columns():
    lines = report.table([row("Gram", theirs=2.0, ours=1.0), row("J u", ours=0.5)], "ours").splitlines()
    columns = [[text.strip() for text in line.split("|")[5:7]] for line in lines]
    assert columns[0] == ["theirs", "ours"]
    assert columns[2:] == [["2 s (2×)", "1 s"], ["", "500 ms"]]
