"""Write what check.py reads, in kvc8's own environment: `python make.py OUT`.

OUT/NAME           an artifact of a golden checkpoint, and OUT/NAME.py its QUANTIZED program
OUT/programs/      the artifacts' programs, for tests/real_npu/check.py
OUT/found.pt       the tokens that the program in float64 gives, its logits, and the artifact's
"""

import shutil
import sys
from pathlib import Path

import torch
from steps import NAMES, artifact, exact, logits

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.precision.widen import widen
from kvc8.ir.text import show
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.driver.compiling import compile_model
from kvc8.tools.driver.request import Target

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "checkpoints"


def main(out: str) -> None:
    """Write all of it."""
    folder, found = Path(out), {}
    (folder / "programs").mkdir()
    for name in NAMES:
        checkpoint = open_checkpoint(GOLDEN / name / "quant")
        for suffix, options in (("", Options()), ("-unfused", Options(fuse="off"))):
            compile_model(checkpoint, folder / f"{name}{suffix}", Target("npu"), options)
            for phase in ("prefill", "chunk", "decode"):
                text = folder / f"{name}{suffix}" / f"{phase}.py"
                shutil.copy(text, folder / "programs" / f"{name}{suffix}-{phase}.py")
        program = capture(checkpoint)
        pipeline.run(program, pipeline.QUANTIZE)
        wide = widen(program)
        (folder / f"{name}.py").write_text(show(wide) + "\n")
        tokens, wanted = logits(exact(wide, GOLDEN / name / "quant"))
        _, near = logits(artifact(folder / name), tokens)
        found[name] = {"tokens": tokens, "exact": wanted, "artifact": near}
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
