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
    """Steps are (end, seconds), flights pairs of times; a step counts as busy if a checkpoint was on its way for more than half of it."""
    busy, quiet = [], []
    for end, took in steps[WARMUP_STEPS:]:
        begin = end - took
        overlap = sum(max(0, min(end, last) - max(begin, first)) for first, last in flights)
        if overlap > 0.5 * took:
            busy.append(took)
        elif overlap == 0:
            quiet.append(took)
    print(f"checkpoints on their way for {[round(last - first, 1) for first, last in flights]} s")
    print(f"busy steps {sorted(round(s, 2) for s in busy)} s")
    print(f"quiet steps {sorted(round(s, 2) for s in quiet)} s")
    if busy and quiet:
        ratio = statistics.median(busy) / statistics.median(quiet)
        print(f"medians {statistics.median(busy):.2f} s and {statistics.median(quiet):.2f} s: ratio {ratio:.3f}")


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
