"""What kvc8-compile prints: sites by pass, the cache's bytes a token, and costs where asked for."""

import argparse
import json
from dataclasses import asdict

from kvc8.backends.npu import artifact
from kvc8.tools.driver.compiling import Compiled
from kvc8.tools.reporter import costs
from kvc8.tools.reporter.arguments import device, workload
from kvc8.tools.reporter.pass_facts import Sites


def tell(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> None:
    """Print what was done, or all of it as JSON."""
    if args.json:
        print(json.dumps(_as_json(args, compiled, sites), indent=1))
        return
    _tell_sites(compiled, sites)
    if args.explain:
        print(*costs.explain_lines(_explained(args, compiled, sites)), sep="\n")
    if args.report is True:
        print(*costs.report_lines(_report(args, compiled)), sep="\n")


def _report(args: argparse.Namespace, compiled: Compiled) -> costs.Report:
    work, on = workload(args), device(args)
    return costs.report(compiled.phases, compiled.unfused(), work, on)


def _explained(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> costs.Explained:
    return costs.explained(compiled.phases, sites, args.soc, args.block_size)


def of_npu(
    args: argparse.Namespace, compiled: Compiled, sites: Sites
) -> tuple[costs.Report, costs.Explained]:
    """What each phase costs, and why it calls what it calls."""
    return _report(args, compiled), _explained(args, compiled, sites)


def _as_json(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> dict[str, object]:
    layout, used = compiled.layout, artifact.disk_use(compiled.out)
    passes = [{"pass": n, "sites": count, "why": why} for (n, why), count in sites.items()]
    return {
        "output": str(compiled.out),
        "bytes": used.extra,
        "linked_bytes": used.weights,
        "kv_bytes_a_token": layout.bytes_per_token,
        "float16_kv_bytes_a_token": layout.float16_bytes_per_token,
        "passes": passes,
        "report": asdict(_report(args, compiled)),
        "explain": _explained(args, compiled, sites).as_json(),
    }


def _tell_sites(compiled: Compiled, sites: Sites) -> None:
    for (name, why), count in sites.items():
        counted = f"{count} site{'s' * (count != 1)}"
        print(f"{name}: {counted} {f'left alone: {why}' if why else 'rewritten'}")
    layout = compiled.layout
    ratio = layout.bytes_per_token / layout.float16_bytes_per_token
    print(f"KV cache: {layout.bytes_per_token:,} bytes a token, {ratio:.2f}x of float16")
    if compiled.target.kind == "npu":
        used = artifact.disk_use(compiled.out)
        links = f"{used.weights / 1e6:,.1f} MB of linked weights"
        print(f"{compiled.out}: {used.extra / 1e6:.2f} MB beside {links}")
