"""Figure 8: a run cut off at every single step and resumed ends with the bits of a run that nothing disturbed.

    OMP_NUM_THREADS=1 python benchmarks/resume_exact.py [--out benchmarks/records/resume_exact.json]

digits, the default engine and two of its variants, Adam, 30 steps (22 to the epoch, so the cut falls in mid-epoch too). Three ways of being
cut off: SIGINT and SIGTERM after step k (a checkpoint is written, the run is resumed), and SIGKILL at the file operation that makes the
checkpoint of step k visible (the last good one is resumed). Compared: every tensor of the last checkpoint (weights, optimizer, engine
state, buffers) byte for byte, its metadata and metrics.jsonl, wall-clock seconds left out.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from recording import record

from altgrad import checkpoint, errors, trainer
from altgrad.trainer import TrainSettings

STEPS = 30
RULES = {
    "forward": {},
    "forward, weights, rank 1": {"space": "weights", "rank": 1, "tangents": 4},
    "forward, momentum guess": {"space": "weights", "guess": "momentum", "tangents": 4},
}


def settings(rule: dict) -> TrainSettings:
    return TrainSettings(engine="forward", engine_settings=rule, steps=STEPS, save_every=1)


def outcome(folder: pathlib.Path) -> tuple:
    saved = checkpoint.load_latest(folder / "checkpoints")
    tensors = {name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().numpy().tobytes()) for name, tensor in saved.tensors.items()}
    rows = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return saved.step, tensors, {k: v for k, v in saved.meta.items() if k != "seconds"}, rows


def cut(folder: pathlib.Path, rule: dict, step: int, number: int) -> None:
    """Run until the signal of `number` arrives after `step`."""

    def on_step(training, row):
        if training.step == step:
            os.kill(os.getpid(), number)

    try:
        trainer.fit(trainer.build(settings(rule)), run_folder=folder, on_step=on_step)
    except errors.Interrupted:
        return
    if step < STEPS:
        raise SystemExit(f"the signal after step {step} did not stop the run")


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import resume_exact
from altgrad import trainer
replace, reached = os.replace, []
def kill(source, target, **how):
    if reached and reached[-1] >= {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target, **how)
os.replace = kill
trainer.fit(trainer.build(resume_exact.settings({rule!r})), run_folder={folder!r}, on_step=lambda training, row: reached.append(training.step) and None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for place, (label, rule) in enumerate(RULES.items()):
            whole = root / f"{place}-whole"
            trainer.fit(trainer.build(settings(rule)), run_folder=whole)
            expected = outcome(whole)
            for number in (signal.SIGINT, signal.SIGTERM):
                equal = 0
                for step in range(1, STEPS):
                    folder = root / f"{place}-{number.name}-{step}"
                    cut(folder, rule, step, number)
                    trainer.fit(trainer.resume(folder))
                    equal += outcome(folder) == expected
                rows.append({"engine": label, "cut_by": number.name, "cuts": STEPS - 1, "bit_equal": equal})
                print(rows[-1], flush=True)
            equal, steps = 0, (2, 11, 22, 23, 29)
            for step in steps:
                folder = root / f"{place}-kill-{step}"
                script = KILLED.format(here=str(pathlib.Path(__file__).parent), step=step, rule=rule, folder=str(folder))
                died = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
                if died.returncode != -signal.SIGKILL:
                    raise SystemExit(f"the run was not killed: {died.returncode} {died.stderr.decode()[-500:]}")
                trainer.fit(trainer.resume(folder, fallback=True))
                equal += outcome(folder) == expected
            rows.append({"engine": label, "cut_by": "SIGKILL while a checkpoint is written", "cuts": len(steps), "bit_equal": equal})
            print(rows[-1], flush=True)
    record(arguments.out, {"steps": STEPS, "rows": rows})
    sys.exit(any(row["bit_equal"] != row["cuts"] for row in rows))


if __name__ == "__main__":
    main()
