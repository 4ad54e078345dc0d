"""Ask the real torch_npu about lowered programs, on a machine without an NPU.

    python check.py STUBS PROGRAMS

STUBS is what stubs.py made, PROGRAMS what lower.py wrote. For each program:

1. Its text is read with torch_npu's own schemas and shape functions; reading infers the type of
   each call and compares it with the type that the text has, sizes as symbols.
2. It runs on fake tensors of device npu with sizes put in; shapes, dtypes and devices are compared.
3. torch.export takes it on device npu with its sizes dynamic, and none becomes a number.
4. torchair (GE graph mode) converts each distinct NPU call whose op it has a converter for, and
   the whole program where it has one for all. It would ask CANN whether it knows an op; here,
   without CANN, that question is answered with yes.

None of this says that an op runs on a device: CANN checks its arguments there, not here.
"""

import ctypes
import os
import sys
import warnings
from pathlib import Path


def load_stubs(folder: Path) -> None:
    """Give the loader what torch_npu's libraries ask for, before torch is imported."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    warnings.simplefilter("ignore")
    for stub in sorted(folder.glob("lib*.so")):
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_stubs(Path(sys.argv[1]))
    from report import report

    sys.exit(report(Path(sys.argv[2])))
