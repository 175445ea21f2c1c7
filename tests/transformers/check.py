"""Hugging Face transformers and everstep compute the same: argument: the everstep binary.

Outwards: a freshly trained model is exported, in shards, and loaded with AutoModelForCausalLM and AutoTokenizer. Inwards: a model of
transformers is saved with save_pretrained and imported. Both ways float32 logits must agree to 1e-5 and 32 greedily generated tokens
be the same. An architecture is a file in this folder with TRAINED and MADE.
"""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ARCHITECTURES = ["llama", "gpt2", "deepseek_v3"]
TOLERANCE = 1e-5
NEW_TOKENS = 32
PROMPT = "line 12: the step after the 7th is not lost"
SHARD_BYTES = 50_000

RUN = """
[run]
name = "check"
seed = 7
steps = 30
[data]
train = ["corpus.txt"]
[data.tokenizer]
kind = "{tokenizer}"
{vocabulary}
[model]
layers = 2
heads = 4
width = 64
context = 96
{model}
[batch]
slots = 2
rows = 4
[optimizer]
lr = 1e-2
[compute]
threads = 1
"""


def everstep(*arguments):
    command = [str(BINARY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stderr}")
    return done.stdout


def compare(what, run_dir, step, folder):
    """Prints the largest difference between everstep's logits at a step and those of the folder in transformers."""
    ours = json.loads(everstep("logits", "--run-dir", run_dir, *step, "--prompt", PROMPT, "--max-tokens", NEW_TOKENS))
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # transformers passes over the modules that stand behind the last layer.
    behind = f"model.layers.{model.config.num_hidden_layers}."
    loading["unexpected_keys"] = [key for key in loading["unexpected_keys"] if not key.startswith(behind)]
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        assert not loading[kind], f"{what}: {kind}: {loading[kind]}"
    model.eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    assert tokens[0].tolist() == ours["tokens"], f"{what}: tokens {tokens[0].tolist()}, everstep {ours['tokens']}"
    with torch.no_grad():
        theirs = model(tokens).logits[0]
        # Neither stops early, so that all tokens are compared.
        made = model.generate(
            tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    difference = (theirs.double() - torch.tensor(ours["logits"], dtype=torch.float64)).abs().max().item()
    scale = theirs.abs().max().item()
    made = made[0, tokens.shape[1] :].tolist()
    equal = made == ours["continued"]
    verdict = "ok" if difference <= TOLERANCE and equal and len(made) == NEW_TOKENS else "FAILED"
    print(
        f"{what:62} largest logit {scale:7.3f}, largest difference {difference:.1e}, "
        f"{NEW_TOKENS} greedy tokens {'equal' if equal else 'differ'}: {verdict}"
    )
    return verdict == "ok"


def exported(work, name, model, tokenizer):
    """A model that everstep trained, in transformers."""
    vocabulary = "vocab_size = 300" if tokenizer == "bpe" else ""
    run_file = work / "run.toml"
    run_file.write_text(RUN.format(model=model, tokenizer=tokenizer, vocabulary=vocabulary))
    run_dir = work / f"run-{name}"
    everstep("train", run_file, "--run-dir", run_dir)
    good = True
    for dtype in ["float32", "bfloat16"]:
        folder = work / f"hf-{name}-{dtype}"
        everstep("export", "--run-dir", run_dir, "--max-shard-bytes", SHARD_BYTES, "--dtype", dtype, folder)
        assert (folder / "model.safetensors.index.json").exists()
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == dtype
        if dtype == "float32":
            good &= compare(f"trained by everstep: {name}", run_dir, [], folder)
        else:
            # Rounded weights give other logits, so what was exported is imported and compared.
            good &= imported(work, f"{name} exported in {dtype}", folder)
    return good


def imported(work, name, folder):
    """A folder that everstep starts from."""
    run_file = work / f"{name}.toml".replace(" ", "-")
    everstep("import", folder, "--train", work / "corpus.txt", "--out", run_file)
    run_dir = work / f"run of {name}"
    settings = ["run.stop_at=1", "batch.slots=1", "batch.rows=1", "compute.threads=1"]
    everstep("train", run_file, "--run-dir", run_dir, *[part for field in settings for part in ("--set", field)])
    return compare(f"imported by everstep: {name}", run_dir, ["--step", "0"], folder)


def made(work, name, config, dtype, tokenizer):
    """A model that transformers made."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too, so that one that is lost or swapped shows.
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name_of, buffer in model.named_buffers():
            if name_of.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    folder = work / f"made-{name}-{dtype}"
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.copy(tokenizer, folder)
    return imported(work, f"{name} of transformers in {dtype}", folder)


def main():
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        lines = [f"line {line}: the step after the {line * line % 977}th is not lost\n" for line in range(2000)]
        (work / "corpus.txt").write_text("".join(lines))
        for architecture in ARCHITECTURES:
            cases = importlib.import_module(architecture)
            for name, model, tokenizer in cases.TRAINED:
                good &= exported(work, name, model, tokenizer)
            tokenizer = work / f"hf-{cases.TRAINED[0][0]}-float32" / "tokenizer.json"
            for name, config in cases.MADE:
                for dtype in ["float32", "bfloat16", "float16"]:
                    good &= made(work, name, config, dtype, tokenizer)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    BINARY = pathlib.Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
