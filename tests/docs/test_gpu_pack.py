"""The folder for machines without network: a wheel without what nothing imports is still whole."""

import sys
import zipfile

import pytest
from documentation import ROOT


sys.path.append(str(ROOT / "benchmarks"))
import gpu_pack


FILES = {
    "pyarrow/lib.so": b"code of its own",
    "pyarrow/libarrow_s3.so.1": b"code",
    "pyarrow/tests/test_it.py": b"",
    "pyarrow-1.dist-info/RECORD": b"pyarrow/lib.so,,\npyarrow/libarrow_s3.so.1,,\npyarrow/tests/test_it.py,,\n",
}


def wheel(path, **changes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**FILES, **changes}.items():
            file.writestr(name, content)
    return path


def test_a_stored_wheel_lists_what_it_holds(tmp_path):
    path = wheel(tmp_path / "pyarrow.whl")
    gpu_pack.store(path)
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == ["pyarrow/lib.so", "pyarrow-1.dist-info/RECORD"]
        assert file.read("pyarrow-1.dist-info/RECORD") == b"pyarrow/lib.so,,\n"
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def test_a_library_that_another_one_needs_is_not_left_out(tmp_path):
    path = wheel(tmp_path / "pyarrow.whl", **{"pyarrow/lib.so": b"\0libarrow.so.1\0libarrow_s3.so.1\0"})
    with pytest.raises(SystemExit, match="pyarrow/lib.so needs libarrow_s3.so.1, which `is_left_out` leaves out"):
        gpu_pack.store(path)
