"""Trains one model in several ways on the same text with the same seed, prints what each reached, and draws the curves.

    cargo build --release
    pip install matplotlib
    python3 crates/everstep-model/benches/curves/curves.py target/release/everstep tinyshakespeare.txt [NAME ...]

Without names all of `WAYS` are trained, one after another; what was trained before, in `--folder`, is only drawn. The text may be any;
the committed pictures and figures are of tinyshakespeare, characters as tokens, on a CPU.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess

HERE = pathlib.Path(__file__).parent
# A dense layer of 320 has the active parameters of four experts of 64 and the shared one.
WAYS = {
    "experts": [],
    "experts, no bias": ["model.moe.balance_rate=0", "model.moe.balance_loss=0"],
    "dense": ["model.moe.dense_layers=8"],
    "MTP": ["model.mtp.modules=1"],
    "Muon": ["optimizer.muon.momentum=0.95"],
    "bfloat16": ['compute.dtype="bfloat16"'],
    "FP8": ['compute.dtype="bfloat16"', "compute.fp8=true"],
}
PICTURES = {
    "experts.svg": ["experts", "experts, no bias", "dense"],
    "ways.svg": ["experts", "MTP", "Muon", "bfloat16", "FP8"],
}
# Loads and losses are means over so many last steps.
LAST_STEPS = 200
# Steps that a point of a curve is the mean of.
SMOOTH = 25


def train(everstep, text, folder, name, steps):
    run = folder / name.replace(", ", "-").replace(" ", "-")
    done = run / "done"
    if not done.exists():
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(exist_ok=True, parents=True)
        settings = [f"data.train=[{json.dumps(str(text.resolve()))}]", f"run.steps={steps}", *WAYS[name]]
        command = [everstep.resolve(), "train", HERE.resolve() / "run.toml", "--run-dir", run.resolve()]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        done.touch()
    lines = lambda file: [json.loads(line) for line in (run / file).read_text().splitlines()]
    return lines("metrics.jsonl"), [event for event in lines("events.jsonl") if event["kind"] == "evaluation"]


def describe(name, rows, evaluations):
    last = rows[-LAST_STEPS:]
    mean = lambda field: statistics.mean(row[field] for row in last)
    loads = [row["expert_load"] for row in last if "expert_load" in row]
    load = f"  fullest expert {statistics.mean(loads):.2f} times the mean (at most {max(loads):.2f})" if loads else ""
    seconds = statistics.median(row["step_seconds"] for row in rows)
    print(f"{name:18} held-out {evaluations[-1]['loss']:.4f}  training {mean('loss'):.4f}  {seconds * 1e3:.0f} ms a step{load}")


def draw(path, curves):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "everstep"
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 6), height_ratios=[3, 2])
    base_name, base = next(iter(curves.items()))
    for name, rows in curves.items():
        starts = range(0, len(rows) - SMOOTH + 1, SMOOTH)
        steps = [rows[at]["step"] + SMOOTH // 2 for at in starts]
        means = lambda rows: [statistics.mean(row["loss"] for row in rows[at : at + SMOOTH]) for at in starts]
        above.plot(steps, means(rows), label=name, linewidth=1.2)
        below.plot(steps, [100 * (own / other - 1) for own, other in zip(means(rows), means(base))], linewidth=1.2)
    above.set(ylabel="training loss, nats a character", ylim=(1.2, 2.6))
    below.set(xlabel=f"step (means of {SMOOTH})", ylabel=f"against {base_name}, %", ylim=(-4, 4))
    above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("everstep", type=pathlib.Path)
    arguments.add_argument("text", type=pathlib.Path)
    arguments.add_argument("names", nargs="*", choices=[*WAYS, []], default=[])
    arguments.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("curves"))
    arguments.add_argument("--steps", type=int, default=2000)
    arguments = arguments.parse_args()
    rows = {}
    for name in arguments.names or WAYS:
        rows[name], evaluations = train(arguments.everstep, arguments.text, arguments.folder, name, arguments.steps)
        describe(name, rows[name], evaluations)
    for picture, names in PICTURES.items():
        if all(name in rows for name in names):
            draw(arguments.folder / picture, {name: rows[name] for name in names})


if __name__ == "__main__":
    main()
