"""Contracts: sound passes keep them; of ten planted faults each is found where it was planted."""

from pathlib import Path

import pytest
import torch
from support import planted

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.rewrite import name_of
from kvc8.tools import command, opt, verify
from kvc8.tools.verifier import repro
from kvc8.tools.verifier.contracts import RecordedCall, check
from kvc8.tools.verifier.recording import Parameters, empty, feed, record
from kvc8.tools.verifier.repro import Bisection

pytestmark = pytest.mark.slow

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"  # symmetric
QWEN2 = CHECKPOINTS / "qwen2_fp16_none_asym" / "quant"  # with zero points and biases
PROMPT = feed([5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 50, 18, 90])
STEP = feed([7], 13)


class Model:
    """A QUANTIZED program in float32, its parameters, and its caches after a prompt."""

    def __init__(self, directory: Path) -> None:
        checkpoint = open_checkpoint(directory)
        self.program = capture(checkpoint, torch.float32)
        self.parameters = Parameters(checkpoint.read)
        pipeline.run(self.program, pipeline.QUANTIZE)
        start, inputs = empty(self.program), PROMPT.inputs(self.program)
        self.state = record(self.program, self.parameters, inputs, start).caches

    def check(self, phase, passes, see=lambda checked: None, last=1):
        """Run passes, and check the last of them."""
        program = self.program.copy()
        pipeline.run(program, passes[:-last])
        call = RecordedCall(PROMPT) if phase == "prefill" else RecordedCall(STEP, self.state)
        return check(program, passes[-last:], [call], self.parameters, see)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {"llama": Model(LLAMA), "qwen2": Model(QWEN2)}


def passes(name: str, phase: str, **options):
    """The passes of a phase up to the one of that name."""
    shared, own = pipeline.phases(Options(**options))[phase]
    found = (*shared, *own)
    return found[: [name_of(step) for step in found].index(name) + 1]


KV = {"fold": "kv", "prefill_kv": "int8"}
FAULTS = [
    ("qwen2", "fold_kv_scales", "decode", {}, planted.wrong_sign_of_an_offset),
    ("llama", "fold_kv_scales", "decode", {}, planted.scale_of_v_for_k),
    ("llama", "fold_k_scale", "decode", KV, planted.one_heads_scale_shifted),
    ("llama", "lower_paged_attention", "decode", {}, planted.slot_off_by_one),
    ("qwen2", "fuse_linears", "decode", {}, planted.dropped_bias),
    ("llama", "fold_k_scale", "prefill", KV, planted.unpaired_rope_scale),
    ("llama", "lower_linear", "decode", {}, planted.stale_dtype),
    ("llama", "lower_paged_attention", "prefill", KV, planted.missing_mask),
    ("llama", "fuse_linears", "decode", {}, planted.swapped_gate_and_up),
    ("qwen2", "lower_linear", "decode", {}, planted.truncating_quantizer),
]
each_fault = pytest.mark.parametrize(
    ("model", "name", "phase", "options", "fault"), FAULTS, ids=[f[4].__name__ for f in FAULTS]
)


@each_fault
def test_a_planted_fault_is_found_in_its_pass_and_layer(
    models, tmp_path, capsys, model, name, phase, options, fault
):
    """All passes of the phase up to it are checked; those before it keep their contracts."""
    sound = passes(name, phase, **options)
    broken = (*sound[:-1], planted.plant(sound[-1], fault))
    found = Bisection(tmp_path / "repro", models[model].parameters.read)
    verdicts = models[model].check(phase, broken, found.see, len(broken))
    assert [verdict.name for verdict in verdicts if verdict.sentence] == [name]
    verdict = verdicts[-1]
    assert found.found == verdict.sentence
    assert sum(file.stat().st_size for file in found.folder.iterdir()) < 2_000_000
    assert command.entry(opt.parser(), opt.work, ["--run", str(found.folder)]) == 1
    said = capsys.readouterr().err
    if verdict.refused:
        assert verdict.sentence.startswith(f"{name}: layer 1: ")
        assert said.startswith(f"error: {verdict.node}: written as ")
        return
    assert said.startswith(f"{name}: breaks its contract {verdict.contract}: ")
    assert {site.layer for site in verdict.breaches} == {"layer 1"}
    assert verdict.sentence.startswith(
        f"{name}: breaks its contract {verdict.contract} in layer 1, {phase}: "
    )


@pytest.mark.parametrize(("model", "name", "phase", "options"), [f[:4] for f in FAULTS[:6]])
def test_a_repro_of_a_sound_site_keeps_its_contract(models, tmp_path, model, name, phase, options):
    def see(checked):
        read = models[model].parameters.read
        repro.write(checked, checked.verdict.worst, read, tmp_path / "repro")

    models[model].check(phase, passes(name, phase, **options), see)
    assert repro.run(tmp_path / "repro") == ""


@pytest.mark.parametrize(
    ("directory", "options"),
    [
        (QWEN2, []),
        (LLAMA, ["--fold", "kv", "--prefill-kv", "int8"]),
        (QWEN2, ["--kv-scales-by", "token"]),
    ],
    ids=["asymmetric", "symmetric", "by token"],
)
def test_every_pass_keeps_its_contract_in_the_dtype_of_the_model(
    directory, options, tmp_path, capsys
):
    page = tmp_path / "r.html"
    given = ["passes", str(directory), "--report", str(page), *options]
    assert command.entry(verify.parser(), verify.work, given) == 0
    said = capsys.readouterr().out
    assert "BREACH" not in said
    assert said.count("fuse_norm_quant") == 3
    told = page.read_text()
    for heat in ("Contracts: percent of the bound", "Isolated: relative RMS", "Accumulated: "):
        assert f"<h3>{heat}" in told
    assert 'class="breach"' not in told
