"""Registers, spills, shared memory and tensor-core instructions of each kernel, from a machine without a GPU.

python -m pallas_kernels.report                        # every kernel for an H200 (sm_90)
python -m pallas_kernels.report w4a --chip sm_80 sm_100  # those whose name has "w4a", for two other chips
python -m pallas_kernels.report --json report.json
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence


def measure(name: str, function, arguments, chip: str) -> dict:
    """One row of the report; the kernel that holds the tensor-core instructions, else the longest, stands for the
    case."""
    from pallas_kernels import deviceless

    start = time.perf_counter()
    kernels = deviceless.compile_for(chip, function, *arguments)
    row = {"case": name, "chip": chip, "seconds": round(time.perf_counter() - start, 1)}
    return row | dataclasses.asdict(kernels[0]) | {"float_bytes": sum(kernel.float_bytes for kernel in kernels)}


def line(row: dict) -> str:
    """A row as text."""
    if "error" in row:
        return f"{row['case']:42s} {row['chip']:7s} {row['error'].splitlines()[0][:120]}"
    tensor = ", ".join(f"{count} {name}" for name, count in row["tensor_core"].items()) or "none"
    if row["float_bytes"]:
        tensor += f"; {row['float_bytes']} bytes stored from floats, which CUDA before 13.1 gets wrong"
    return (
        f"{row['case']:42s} {row['chip']:7s} {row['registers']:4d} {row['spill_bytes']:6d} {row['shared_bytes']:8d}"
        f" {row['instructions']:6d}  {tensor}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when a kernel spills, stores bytes of floats, misses its instruction or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name", nargs="*", default=[""], help="parts of names: cases that have one of them are compiled"
    )
    parser.add_argument(
        "--chip", nargs="+", default=["sm_90"], help="sm_80 (A100), sm_89 (L4), sm_90 (H200), sm_100 (B200)"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    chosen = parser.parse_args(arguments)
    from pallas_kernels import deviceless  # before anything initializes JAX
    from pallas_kernels.cases import all_cases

    if what := deviceless.missing():
        print(f"pallas_kernels.report needs {what}", file=sys.stderr)
        return 2
    if unknown := set(chosen.chip) - set(deviceless.CHIPS):
        parser.error(f"no chip {sorted(unknown)}; here are {', '.join(deviceless.CHIPS)}")
    cases = [case for case in all_cases() if any(part in case[0] for part in chosen.name)]
    if not cases:
        parser.error(f"no case has one of {chosen.name} in its name: {', '.join(case[0] for case in all_cases())}")
    print(f"{'case':42s} {'chip':7s} regs spills   shared instr.  tensor cores")
    rows = []
    for name, function, shapes, expected in cases:
        for chip in chosen.chip:
            if chip not in expected:  # there is no such kernel: compiling it could end the process
                print(f"{name:42s} {chip:7s} not for this chip", flush=True)
                continue
            try:
                row = measure(name, function, shapes, chip)
            except Exception as error:  # the compiler's verdict on this case is what is reported
                row = {"case": name, "chip": chip, "error": f"{type(error).__name__}: {error}", "good": False}
            else:
                row["expected"] = expected.get(chip)
                row["good"] = not (row["spill_bytes"] or row["float_bytes"]) and (
                    row["expected"] is None or any(used.startswith(row["expected"]) for used in row["tensor_core"])
                )
            rows.append(row)
            print(line(row) + ("" if row["good"] else "   <-- not as it must be"), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if not row["good"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} as they must be: no spills, the expected instruction")
    for row in bad:  # again, where they are found
        print(f"not as it must be: {line(row)}; expected {row.get('expected') or 'no spills'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
