"""`everstep train` against the same GPT in plain PyTorch (`gpt.py`): same shape, text, precision and threads, in turn.

    cargo build --release
    pip install torch==2.11.0
    python3 crates/everstep-cli/benches/pytorch/bench.py target/release/everstep tinyshakespeare.txt [--shape larger] [--dtype bfloat16] [--compile] [--processes 2]

Prints the tokens per second of each pair, and the median of their ratios. A step is a whole one on both sides: batch, forward, backward,
clipping, AdamW; on ours also leases, sums and the commit. With two processes, of one thread each, theirs is `DistributedDataParallel` over
gloo, and ours has a second replica of all parameters and moments.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from gpt import WARMUP_STEPS

HERE = pathlib.Path(__file__).parent
EXAMPLE = HERE / "../../../../examples/shakespeare-char.toml"
# layers, heads, width, context, rows
SHAPES = {"small": (4, 4, 128, 64, 12), "larger": (6, 6, 384, 256, 8)}


def ours(args, steps):
    layers, heads, width, context, rows = SHAPES[args.shape]
    settings = {
        "data.train": [str(args.text.resolve())],
        "run.steps": steps,
        "model.layers": layers,
        "model.heads": heads,
        "model.kv_heads": heads,
        "model.width": width,
        "model.ffn_width": 4 * width,
        "model.context": context,
        "batch.rows": rows,
        "batch.slots": args.slots,
        "compute.dtype": args.dtype,
        "evaluation.every": 0,
        "checkpoint.every": 0,
        "optimizer.warmup_steps": 5,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [args.everstep.resolve(), "train", EXAMPLE.resolve(), "--run-dir", folder]
        command += [word for field, value in settings.items() for word in ("--set", f"{field}={json.dumps(value)}")]
        command += ["--topology", HERE / "two-processes.toml"] if args.processes == 2 else []
        subprocess.run(command, check=True, capture_output=True)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    took = [json.loads(line)["step_seconds"] for line in lines]
    return rows * context / statistics.median(took[WARMUP_STEPS:])


def theirs(args, steps):
    shape = zip(("layers", "heads", "width", "context", "rows"), SHAPES[args.shape])
    command = [sys.executable, HERE / "gpt.py", args.text, "--steps", str(steps), "--dtype", args.dtype, "--threads", str(2 // args.processes), "--processes", str(args.processes)]
    command += [word for name, value in shape for word in (f"--{name}", str(value))]
    command += ["--compile"] if args.compile else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["tokens_per_second"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("everstep", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="220 of the small shape, 40 of the larger one if left out")
    args = parser.parse_args()
    steps = args.steps or (220 if args.shape == "small" else 40)
    ratios = []
    for pair in range(args.pairs):
        sides = [ours, theirs] if pair % 2 == 0 else [theirs, ours]
        seen = {side: side(args, steps) for side in sides}
        ratios.append(seen[ours] / seen[theirs])
        print(f"everstep {seen[ours]:.0f}, PyTorch {seen[theirs]:.0f} tokens/s: ratio {ratios[-1]:.3f}", flush=True)
    print(f"median of {args.pairs} pairs: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
