"""Step times and the lag of checkpoints while the store had bad days.

    everstep chaos run crates/everstep-cli/benches/checkpoint/bad-days.toml --run-dir DIR --set 'run.store="s3://bucket"'
    python3 crates/everstep-cli/benches/checkpoint/bad_days.py DIR
"""

import json
import pathlib
import statistics
import sys

from bench import WARMUP_STEPS, lines, seconds

# A fault's effects outlast it: checkpoints catch up.
AFTER_S = 15


def main():
    folder = pathlib.Path(sys.argv[1])
    report = json.loads((folder / "report.json").read_text())
    metrics = lines(folder / "disturbed" / "metrics.jsonl")[WARMUP_STEPS:]
    events = lines(folder / "disturbed" / "events.jsonl")
    committed = [(seconds(e["time"]), e["step"]) for e in events if e["kind"] == "checkpoint_committed"]
    steps = [(seconds(m["time"]), m["step"], m["step_seconds"]) for m in metrics]
    # The report counts from the start of the run's process, which logs its first event a little later.
    begin = seconds(events[0]["time"])
    windows = [(f["label"], begin + f["at"], begin + f["until"]) for f in report["faults"]]

    def lag(at, step):
        return step - max((s for t, s in committed if t <= at), default=0)

    def show(what, chosen):
        took = statistics.median(s for _, _, s in chosen) * 1e3
        worst = max(lag(at, step) for at, step, _ in chosen)
        print(f"{what}: {len(chosen)} steps, median {took:.1f} ms, checkpoints at most {worst} steps behind")
        return took

    quiet = [s for s in steps if not any(first <= s[0] <= last + AFTER_S for _, first, last in windows)]
    base = show("quiet", quiet)
    for label, first, last in windows:
        took = show(label, [s for s in steps if first <= s[0] <= last])
        caught_up = next((at for at, step in committed if at > last and lag(at, step) == 0), None)
        print(f"  ratio {took / base:.3f}; the next checkpoint {'never' if caught_up is None else f'{caught_up - last:.1f} s'} after it")


if __name__ == "__main__":
    main()
