"""The command `quest`: each subcommand is a typed function that tyro turns into a command line.

MODEL is, everywhere, a packed directory, a run directory (its latest checkpoint) or one checkpoint, hf:DIR for a
Hugging Face Llama, or paper:PATH for a checkpoint of the QuEST paper's code. What goes wrong ends as one message on
standard error and exit code 1 (2: wrong usage; 130, 143: stopped by SIGINT, SIGTERM); QUEST_DEBUG=1 shows where it
happened.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

# What a command needs is imported inside it, so that --help and wrong usage answer at once.

Model = Positional[
    Annotated[
        str, tyro.conf.arg(metavar="MODEL", help="packed directory, run directory, checkpoint, hf:DIR or paper:PATH")
    ]
]
Output = Positional[
    Annotated[
        Path, tyro.conf.arg(metavar="OUT", help="directory to write; a model there is replaced when all is written")
    ]
]
Device = Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="auto: the GPU if there is one")]


def train(args: list[str]) -> int:
    """Train a model (a configuration file, options, or both)."""
    from quest.train.config import parse
    from quest.train.trainer import train as run

    result = run(parse(args))
    return 0 if result.signal is None else 128 + result.signal  # as a shell says which signal ended a process


def evaluate(
    model: Model,
    /,
    data: tuple[str, ...] = (),
    text_field: str = "text",
    max_bytes: int | None = None,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    tokenizer: str | None = None,
    batch_size: int = 8,
    device: Device = "auto",
    output: Path | None = None,
) -> None:
    """Loss, perplexity and bits per byte of a model on text, and scores in lm-eval's tasks.

    Args:
        data: text files, JSONL, Parquet, folders, or names of data sets.
        text_field: field of JSONL and Parquet records that holds the text.
        max_bytes: read so many bytes of text and no more.
        tasks: tasks of lm-eval, such as hellaswag, arc_easy or piqa (needs the package lm_eval).
        limit: at most so many examples of each task.
        tokenizer: directory, tokenizer.json or "gpt2", for a model that comes without one.
        batch_size: sequences that run at once.
        output: also write the results to this JSON file.
    """
    if not data and not tasks:
        raise ValueError("nothing to evaluate on; give --data FILE… or --tasks NAME…")
    from quest.infer.evaluate import evaluate as measure

    network, words = _open(model, tokenizer, device)
    results: dict[str, Any] = {"model": model}
    if data:
        from quest.train.data import DataConfig
        from quest.train.data.sources import Corpus

        started = time.perf_counter()
        corpus = Corpus(data, DataConfig(train=data, text_field=text_field))
        result = measure(network, words, corpus, max_bytes=max_bytes, batch_size=batch_size)
        rate = result.tokens / (time.perf_counter() - started)
        print(
            f"loss {result.loss:.4f}   perplexity {result.perplexity:.2f}   bits per byte {result.bits_per_byte:.4f}\n"
            f"{result.tokens:,} tokens, {result.text_bytes:,} bytes, {rate:,.0f} tokens/s"
        )
        results["data"] = {
            "sources": list(data),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "text_bytes": result.text_bytes,
        }
    if tasks:
        from quest.infer.harness import evaluate_tasks

        results["tasks"] = evaluate_tasks(network, words, tasks, batch_size=batch_size, limit=limit)
        for task, metrics in results["tasks"].items():
            values = (f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            print(f"{task}: {'   '.join(values)}")
    if output is not None:
        output.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


def generate(
    model: Model,
    /,
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int | None = None,
    tokenizer: str | None = None,
    device: Device = "auto",
) -> None:
    """Continue a prompt; the text appears as it is made.

    Args:
        prompt: what to continue; empty begins a document.
        max_new_tokens: stop after so many tokens, or at the end of the document.
        temperature: 0 takes the likeliest token every time; higher is more varied.
        top_p: choose among the fewest tokens whose probabilities reach this sum.
        top_k: choose among so many of the likeliest tokens.
        seed: the same seed gives the same text.
        tokenizer: directory, tokenizer.json or "gpt2", for a model that comes without one.
    """
    from quest.infer.generate import generate as stream
    from quest.models.tokenizer import StreamDecoder

    network, words = _open(model, tokenizer, device)
    ids = words.encode(prompt) or [words.eos_id]
    tokens = stream(
        network,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=(words.eos_id,),
    )
    print(prompt, end="", flush=True)
    decoder = StreamDecoder(words)
    for token in tokens:
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())


def export(
    model: Model,
    output: Output,
    /,
    format: Literal["packed", "hf"] = "packed",
    tokenizer: str | None = None,
) -> None:
    """Write a model as a packed directory, or as a Hugging Face Llama with the real numbers that its codes stand for.

    Args:
        format: packed (codes, scales; what quest runs) or hf (what transformers opens).
        tokenizer: directory, tokenizer.json or "gpt2", for a model that comes without one.
    """
    from quest.infer.load import open_model
    from quest.models.hf import save_hf
    from quest.models.packed import save_packed
    from quest.models.tokenizer import Tokenizer

    network, words = open_model(model)
    words = words if tokenizer is None else Tokenizer.load(tokenizer)
    if format == "hf":
        save_hf(network, output, words)
        print(f"wrote {output}")
    else:
        sizes = save_packed(network, output, words, {"source": model})
        print(f"wrote {output}: {sizes}")


def import_(
    source: Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]],
    output: Output,
    /,
    quant: str = "none",
    tokenizer: str | None = None,
) -> None:
    """Bring a model of another format in, as a packed directory.

    Args:
        source: hf:DIR (a Hugging Face Llama) or paper:PATH (a checkpoint of the QuEST paper's code).
        quant: quantizer that the weights of an hf: model are rounded to without training, such as "int8" or
            "int4-hadamard-trust"; the layers' inputs get it too. A paper: model brings its own.
        tokenizer: directory, tokenizer.json or "gpt2", for a model that comes without one.
    """
    kind, _, path = source.partition(":")
    if kind not in ("hf", "paper") or not path:
        raise ValueError(f"expected hf:DIR or paper:PATH, got {source!r}; `quest export` takes quest's own models")
    if kind == "paper" and quant != "none":
        raise ValueError(f"--quant {quant}: a checkpoint of the paper's code brings its quantizers; leave it out")
    from quest import QuantConfig, convert, prepare
    from quest.infer.load import open_model
    from quest.models.packed import save_packed
    from quest.models.tokenizer import Tokenizer

    network, words = open_model(source)
    words = words if tokenizer is None else Tokenizer.load(tokenizer)
    if quant != "none":
        convert(prepare(network, QuantConfig(quant, quant)))
    sizes = save_packed(network, output, words, {"source": source})
    print(f"wrote {output}: {sizes}")


def plot(
    runs: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]], /, output: Path = Path("loss.png")
) -> None:
    """Draw the loss curves of several runs on one axis.

    Args:
        runs: run directories.
        output: the PNG to write.
    """
    from quest.train.plot import plot_losses

    if not runs:
        raise ValueError("expected at least one run directory")
    plot_losses(runs, output)
    print(f"wrote {output}")


def bench(m: int = 512, n: int = 4096, k: int = 4096, device: Device = "auto") -> None:
    """Time this machine's quantizers and low-bit layers against torch, one layer of one size.

    Args:
        m: rows of the input (tokens).
        n: outputs of the layer.
        k: inputs of the layer.
    """
    from quest.infer.bench import bench_layer

    for row in bench_layer(m, n, k, _device(device)):
        print(row)


def info() -> None:
    """What a bug report needs: versions, build, processor, GPUs, libraries and the product each format gets."""
    from quest.info import describe

    print(json.dumps(describe(), indent=2, ensure_ascii=False))


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "import": import_,
    "plot": plot,
    "bench": bench,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: the process's own); returns the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        print(f"quest: unknown command {name!r}; did you mean {near!r}?\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        if name == "train":  # reads its options itself: a file comes between defaults and command line
            return train(rest)
        tyro.cli(COMMANDS[name], prog=f"quest {name}", args=rest)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"\nquest {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("QUEST_DEBUG") == "1":
            raise
        # What our own checks say stands for itself; anything else is named, as it may be a bug.
        expected = isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("quest.")
        what = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        what = what.removeprefix(f"{COMMANDS[name].__name__}: ")  # which the line begins with anyway
        print(f"quest {name}: {what}\n(QUEST_DEBUG=1 shows where)", file=sys.stderr)
        return 1


def _usage() -> str:
    lines = [f"  {name:10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: quest COMMAND …   (quest COMMAND --help tells its options)", "", *lines])


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; expected an NVIDIA GPU and a CUDA build of torch")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _open(model: str, tokenizer: str | None, device: str) -> tuple[Any, Any]:
    from quest.infer.fuse import fuse_prologues
    from quest.infer.load import open_model
    from quest.models.tokenizer import Tokenizer

    network, words = open_model(model, _device(device))
    fuse_prologues(network)
    if tokenizer is not None:
        words = Tokenizer.load(tokenizer)
    if words is None:
        raise ValueError(f"{model} has no tokenizer; give one with --tokenizer")
    if words.vocab_size > network.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} ids, {model} only {network.config.vocab_size}; "
            "give the one that it was trained with"
        )
    return network, words
