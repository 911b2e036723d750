"""Figure 7: the module kinds of the doctor's list, each driven and held to backprop's directional derivative.

python benchmarks/forward_coverage.py [--out benchmarks/records/forward_coverage.json]
"""

import argparse

from recording import record

from altgrad.doctor import examine_probes
from altgrad.probes import EXTRA, PROBES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    rows = []
    for precision in ("float64", "float32"):
        for group, probes in (("listed", PROBES), ("extra", EXTRA)):
            found = examine_probes(probes, precision=precision)
            rows += [{"group": group, "precision": precision, **row} for row in found]
    print("\n".join(str(row) for row in rows))
    listed = [row for row in rows if row["group"] == "listed" and row["precision"] == "float64"]
    print(f"{sum(bool(row['driven']) for row in listed)} of {len(listed)} driven")
    record(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()
