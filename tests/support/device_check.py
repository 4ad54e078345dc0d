"""kvc8-device-check on a stand-in for an NPU: the whole of it, on any machine.

    python tests/support/device_check.py -o report [--plant "saturates at 126" ...]

Kernels are kvc8's emulation, behind the limits of legality.json. Where the real torch_npu loads, as
tools/check-npu has it do without CANN, schemas are its own, and what each call gives is held to its
meta functions; how many were asked is said. Exit status 1 where anything is found, but for faults
that were planted.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run it."""
    sys.path.insert(0, str(TESTS))
    from support.real_meta import Meta, real_meta_functions

    names = real_meta_functions()  # and so before the next line, which declares the ops
    from support.stand_in import FAULTS, open_stand_in

    from kvc8.tools import device_check

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plant", action="append", default=[], choices=list(FAULTS))
    parser.add_argument("--soc", default="ascend910b")
    parser.add_argument("--limit", type=float, metavar="SECONDS")
    given = parser.parse_args(namespace=argparse.Namespace(golden=TESTS / "golden"))
    log, path = tempfile.mkstemp()
    os.close(log)
    meta = None if names is None else Meta(names, path)
    start = time.monotonic()
    opener = partial(open_stand_in, tuple(given.plant), meta)
    report = device_check.make_report(given, opener, small=True)
    print(f"{time.monotonic() - start:.0f} s")
    print("\n".join(meta.summary() if meta else ["the real torch_npu does not load here"]))
    Path(path).unlink()
    return int(bool(report["findings"]) and not given.plant)


if __name__ == "__main__":
    sys.exit(main())
