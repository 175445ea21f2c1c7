"""Steps with a checkpoint on its way against steps without, in the same run, and the memory of every process.

    cargo build --release
    python3 crates/everstep-cli/benches/checkpoint/bench.py target/release/everstep
    python3 crates/everstep-cli/benches/checkpoint/bench.py target/release/everstep --without    # no checkpoints: memory to compare with

`async_save.py` beside it does the same with `torch.distributed.checkpoint.async_save`. Linux only; needs 8 GB of memory and of disk.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).parent
# Pages are touched for the first time in the first steps.
WARMUP_STEPS = 2


def children(pid):
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in pids:
            found += [child, *children(child)]
    return found


def anonymous_mib(pid):
    """Memory that is not backed by a file."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) >> 10
    return 0


def name_of(pid):
    words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    roles = ("coordinator", "loader", "shard-", "worker")
    return next((word for word in words if word.startswith(roles)), None)


def lines(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []


def seconds(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def report(steps, flights):
    """Steps are (end, seconds), flights pairs of times; a step is busy if a checkpoint was on its way for any noticeable part of it.

    Machines drift: each busy step is compared with the nearest steps before and after it that were not."""
    is_busy, times = [], []
    for end, took in steps[WARMUP_STEPS:]:
        overlap = sum(max(0, min(end, last) - max(end - took, first)) for first, last in flights)
        is_busy.append(overlap > 0.01 * took)
        times.append(took)
    quiet = [k for k in range(len(times)) if not is_busy[k]]
    ratios = []
    for k in range(len(times)):
        before, after = [q for q in quiet if q < k], [q for q in quiet if q > k]
        if is_busy[k] and before and after:
            ratios.append(times[k] / statistics.mean([times[before[-1]], times[after[0]]]))
    print(f"checkpoints on their way for {[round(last - first, 1) for first, last in flights]} s")
    print(f"steps, busy ones with a star: {' '.join(f'{t:.2f}' + '*' * b for t, b in zip(times, is_busy))} s")
    if ratios:
        print(f"{len(ratios)} busy steps against their neighbours: {' '.join(f'{r:.3f}' for r in sorted(ratios))}")
        busy = [t for t, b in zip(times, is_busy) if b]
        medians = statistics.median(busy), statistics.median([times[k] for k in quiet])
        print(f"medians {medians[0]:.2f} s and {medians[1]:.2f} s: ratio {medians[0] / medians[1]:.3f}")
        print(f"median of the pairs: ratio {statistics.median(ratios):.3f}")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("everstep", type=pathlib.Path)
    arguments.add_argument("--steps", type=int, default=61)
    arguments.add_argument("--without", action="store_true", help="no checkpoint but the last")
    arguments.add_argument("--set", action="append", default=[], help="passed on")
    arguments = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text = "".join(f"line {k}: {k * k % 977} steps are not lost\n" for k in range(30_000))
        (folder / "corpus.txt").write_text(text)
        (folder / "run.toml").write_text((HERE / "run.toml").read_text())
        settings = [f"run.steps={arguments.steps}", *arguments.set]
        if arguments.without:
            settings.append("checkpoint.every=1000000")
        command = [arguments.everstep.resolve(), "train", "run.toml", "--run-dir", "run"]
        command += ["--topology", HERE.resolve() / "topology.toml"]
        command += [word for setting in settings for word in ("--set", setting)]
        run = folder / "run"
        peaks = {}
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            steps = len(lines(run / "metrics.jsonl"))
            for pid in children(process.pid):
                try:
                    name, mib = name_of(pid), anonymous_mib(pid)
                except OSError:
                    continue
                # The last checkpoint is taken in both runs.
                if name and WARMUP_STEPS <= steps < arguments.steps:
                    peaks[name] = max(peaks.get(name, 0), mib)
            time.sleep(0.05)
        if process.returncode != 0:
            raise SystemExit(f"everstep ended with {process.returncode}")
        metrics = lines(run / "metrics.jsonl")
        times = {step["step"]: seconds(step["time"]) for step in metrics}
        committed = [e for e in lines(run / "events.jsonl") if e["kind"] == "checkpoint_committed"]
        steps = [(seconds(step["time"]), step["step_seconds"]) for step in metrics]
        report(steps, [(times[e["step"]], seconds(e["time"])) for e in committed])
        print(f"peaks of anonymous memory: {dict(sorted(peaks.items()))} MiB")


if __name__ == "__main__":
    main()
