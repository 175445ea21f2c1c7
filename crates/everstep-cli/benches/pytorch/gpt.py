"""The GPT of `examples/shakespeare-char.toml` as a user of PyTorch would write it, trained eagerly (or compiled); prints one JSON object.

    python3 gpt.py tinyshakespeare.txt [--layers 6 --width 384 ...] [--dtype bfloat16] [--compile] [--processes 2 --threads 1]

Several processes share the rows of a step, with `DistributedDataParallel` over gloo.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn import functional

WARMUP_STEPS = 20


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        heads = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).split(c, 2))
        y = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self, vocab, layers, heads, width, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.08)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=pathlib.Path)
    for name, default in [("layers", 4), ("heads", 4), ("width", 128), ("context", 64), ("rows", 12), ("threads", 2), ("steps", 220)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


def train(rank, args, meeting):
    torch.set_num_threads(args.threads)
    torch.manual_seed(1337 + rank)

    text = args.text.read_text()
    ids = {char: index for index, char in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[char] for char in text[: len(text) * 9 // 10]])
    model = GPT(len(ids), args.layers, args.heads, args.width, args.context)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    step_loss = torch.compile(model) if args.compile else model
    if args.processes > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=args.processes)
        step_loss = nn.parallel.DistributedDataParallel(step_loss)
    rows = args.rows // args.processes
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")

    took = []
    for _ in range(args.steps):
        start = time.perf_counter()
        begins = torch.randint(len(data) - args.context, (rows,))
        tokens = torch.stack([data[begin : begin + args.context] for begin in begins])
        targets = torch.stack([data[begin + 1 : begin + 1 + args.context] for begin in begins])
        with autocast:
            loss = step_loss(tokens, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        took.append(time.perf_counter() - start)
    if rank == 0:
        seconds = statistics.median(took[WARMUP_STEPS:])
        print(json.dumps({"seconds": seconds, "tokens_per_second": args.rows * args.context / seconds, "loss": loss.item()}))
    if args.processes > 1:
        torch.distributed.destroy_process_group()


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        if args.processes == 1:
            train(0, args, meeting)
        else:
            torch.multiprocessing.spawn(train, (args, meeting), nprocs=args.processes)


if __name__ == "__main__":
    main()
