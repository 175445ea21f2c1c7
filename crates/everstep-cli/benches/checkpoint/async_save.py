"""The peer of `bench.py`: `torch.distributed.checkpoint.async_save` of a model and an optimizer state of the same size.

    pip install torch
    python3 crates/everstep-cli/benches/checkpoint/async_save.py
"""

import argparse
import pathlib
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from bench import anonymous_mib, report

LAYERS, WIDTH, HEADS, FEED_FORWARD, VOCABULARY = 14, 768, 12, 2048, 256
ROWS, CONTEXT, SLOTS = 4, 64, 4


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(WIDTH) for _ in range(2)])
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = torch.nn.Linear(WIDTH, 2 * FEED_FORWARD, bias=False)
        self.down = torch.nn.Linear(FEED_FORWARD, WIDTH, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, WIDTH))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=61)
    arguments.add_argument("--every", type=int, default=6)
    arguments.add_argument("--threads", type=int, default=1)
    arguments = arguments.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(arguments.threads)
    model = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, WIDTH), *(Block() for _ in range(LAYERS)), torch.nn.Linear(WIDTH, VOCABULARY)
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps, flights, pending, peak = [], [], None, {"quiet": 0, "busy": 0}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        begin = time.time()
        for step in range(1, arguments.steps + 1):
            for _ in range(SLOTS):
                tokens = torch.randint(VOCABULARY, (ROWS // SLOTS, CONTEXT + 1))
                logits = model(tokens[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                (loss / SLOTS).backward()
            optimizer.step()
            optimizer.zero_grad()
            stall = time.time()
            when = "quiet" if pending is None else "busy"
            peak[when] = max(peak[when], anonymous_mib("self"))
            if step % arguments.every == 0:
                if pending is not None:
                    pending.result()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                flight = [stall, None]
                flights.append(flight)
                pending = dcp.async_save(state, checkpoint_id=str(folder / f"step-{step}"))
                pending.add_done_callback(lambda _, flight=flight: flight.__setitem__(1, time.time()))
                print(f"async_save itself took {time.time() - stall:.2f} s")
            now = time.time()
            steps.append((now, now - begin))
            begin = now
        if pending is not None:
            pending.result()
        dist.destroy_process_group()
    # The step that calls `async_save` waits for the copy of the state: its stall belongs to what a checkpoint costs.
    report(steps, flights)
    print(f"peaks of anonymous memory at the ends of steps: {peak} MiB")


if __name__ == "__main__":
    main()
