"""Build the wheel and use it outside the checkout, as `pip install mm-pretrain` would. Run by `make test`."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECK = """
import sys, time
start = time.perf_counter()
import mm
assert mm.__file__.startswith(sys.argv[1]), mm.__file__
assert "torch" not in sys.modules
from mm.data import builtin
from mm.data.shards import expand
shards = expand("builtin:emoji/*.tar.gz")
assert len(shards) == 6, shards
from mm.data.tokenizer import Tokenizer
assert len(Tokenizer.load("builtin:emoji")) == 4096
from mm.page import render
assert not {"data", "models", "train"} & set(sys.modules)
"""


def main() -> None:
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder) / "wheels", Path(folder) / "site"
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--disable-pip-version-check", "--wheel-dir", str(wheels), str(root)],
            check=True,
        )  # fmt: skip
        (wheel,) = wheels.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        outside = [name for name in names if not name.startswith(("mm/", "mm_pretrain-"))]
        assert not outside, f"the wheel holds more than mm/: {outside[:5]}"
        zipfile.ZipFile(wheel).extractall(site)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run([sys.executable, "-c", CHECK, str(site)], cwd=folder, env=environment, check=True)
        help = [sys.executable, "-m", "mm", "--help"]
        subprocess.run(help, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, imports and finds its data")


if __name__ == "__main__":
    main()
