"""The sections of docs/benchmarks.md: their prose, without measured numbers, and their commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A section of the page.

    In its commands `{data}` stands for the folder of real corpora, `{shards}` for a prepared
    run_dir, `{recipe}` for its recipe, `{bpe}` for a run_dir with a vocabulary for newswire,
    `{text}` for a file of newswire, and `{build}` for a folder for scratch files.
    """

    name: str
    title: str
    text: str
    command: str
    """A program, and the arguments that it always gets."""

    cpu: str | None
    """Further arguments on a machine without a GPU; None: it is not for one."""

    gpu: str
    """Further arguments on a machine with one."""

    toy: str
    """Further arguments with --toy."""


BENCHMARKS = (
    Benchmark(
        name="systems",
        title="Training step",
        text="""
Forward, backward and AdamW at base size (6 levels, dropout 0.1, sentences of 24 to 32 tokens). The
optimizer is the one that training asks DeepSpeed for: torch's AdamW, fused.
*Transformer* is fairseq2's own layers. *RingFormer* is what is used: the level signals are folded
into the weights of q, k, v and of the FFN once a step; *not folded* applies them to every token
instead. *Published math* (`benchmarks/published_math.py`) has our parameters and our result, but
multiplies every token with d×d level matrices, runs attention in separate steps, projects the
encoder's output at every level, and holds all logits.

What makes a RingFormer as fast as a Transformer: keys and values of the encoder's output are
projected once and not at every level; q, k and v are one product; the levels' weights are cut out
of the folded ones by one `unbind`, whose gradient is one `stack`, where indexing would add N
gradients of the size of all levels; and the loss is chunked.
""",
        command="train_step --parts systems",
        cpu="--tokens 2048 4096 --rounds 5",
        gpu="--tokens 8192 32768 --rounds 10 --dtype bfloat16",
        toy="--tokens 64 --rounds 1 --model_dim 64 --vocab_size 100",
    ),
    Benchmark(
        name="few_tokens",
        title="Training step with few tokens",
        text="""
The same with a small vocabulary and few tokens, where folding has fewer tokens to pay for itself
and the output projection hides nothing.
""",
        command="train_step --parts systems --only RingFormer",
        cpu="--tokens 512 --vocab_size 1000 --rounds 5",
        gpu="--tokens 1024 --vocab_size 1000 --rounds 20 --dtype bfloat16",
        toy="--tokens 32 --rounds 1 --model_dim 64 --vocab_size 100",
    ),
    Benchmark(
        name="signals",
        title="Level signals that are applied",
        text="""
Where signals are not folded, in a ring for images and with few tokens, those of q, k and v are
A_iᵀ (B_i x). In a narrow model one product with a matrix that has the three A_i on its diagonal,
and zeros beside them, is faster than three: it is one call, and nothing is copied together. Which
models are narrow is `SMALL` in `models/ringformer/level_signal.py`; here both ways are taken at all
widths.
""",
        command="signals",
        cpu="--widths 64 128 256 --dtype bfloat16 --rounds 8",
        gpu="--widths 128 256 512 1024 --images 1024 --dtype bfloat16 --rounds 8",
        toy="--widths 64 --images 4 --rounds 1",
    ),
    Benchmark(
        name="checkpoints",
        title="Activation checkpointing: time",
        text="""
The policies of `training.activation_checkpointing`. On a CPU "the host" is a copy in the same
memory, and attention is a small part of what is recomputed: there, offload and the selective
policy show that they work, not what they are for.
""",
        command="train_step --parts checkpoints",
        cpu="--tokens 1024 --rounds 5",
        gpu="--tokens 8192 --rounds 10 --dtype bfloat16",
        toy="--tokens 32 --rounds 1 --model_dim 64 --vocab_size 100",
    ),
    Benchmark(
        name="memory",
        title="Activation checkpointing: memory",
        text="""
The peak beside the parameters, with gradients and the chunk of logits at hand; on a CPU that of
the whole process, one for each row. What is left with checkpoints does not grow with the levels:
logits of a chunk of tokens, gradients, the one level that is being recomputed, and on a CPU what
the C allocator does not give back between them. So the more tokens, the more checkpoints save.
""",
        command="train_step --parts memory",
        cpu="--tokens 2048 --rounds 5",
        gpu="--tokens 8192 --rounds 5 --dtype bfloat16",
        toy="--tokens 32 --rounds 1 --model_dim 64 --vocab_size 100 --only published",
    ),
    Benchmark(
        name="compilation",
        title="torch.compile",
        text="""
`training.compile`, which compiles the layers. *First* is the step that does so. On a CPU matrix
products take nearly all of the time, and are the same with and without; do not expect a gain
there.
""",
        command="train_step --parts compilation",
        cpu="--tokens 512 --vocab_size 1000 --rounds 5",
        gpu="--tokens 8192 --rounds 10 --dtype bfloat16",
        toy="--tokens 32 --rounds 1 --model_dim 64 --vocab_size 100",
    ),
    Benchmark(
        name="precision",
        title="Training in bfloat16",
        text="""
The same step in float32 and in bfloat16 (`--deepspeed_config ds_configs/zero1_bf16.json`; here
without DeepSpeed's float32 copy of the weights). A CPU that has instructions for bfloat16
(AVX512-BF16, AMX) multiplies matrices in it twice as fast and more; the wider the model, the larger
the products' share of a step. The gradient of torch's fused attention takes it ten times as long
there, so training on a CPU attends by products and softmax (`models/attention.py`). A CPU without
such instructions is slower in bfloat16, and training says so.
""",
        command="train_step --parts precision",
        cpu="--tokens 1024 --vocab_size 16000 --rounds 5",
        gpu="--tokens 8192 --rounds 10",
        toy="--tokens 32 --rounds 1 --model_dim 64 --vocab_size 100",
    ),
    Benchmark(
        name="real",
        title="Training on real sentences",
        text="""
The first steps of an epoch of Multi30k at base size, and the same captions as the published
implementation batches them, padded to 50 tokens. The last row is how the published implementation
trains, so its ratio is what batching by length and our math gain together; the row above is the
padding's share of it.
""",
        command="real_batches --run_dir {shards}",
        cpu="--steps 1 --rounds 5",
        gpu="--steps 3 --max_tokens 8192 --rounds 10 --dtype bfloat16",
        toy="--steps 1 --rounds 1 --max_tokens 256 --model_dim 64",
    ),
    Benchmark(
        name="decode",
        title="Decoding",
        text="""
Base size, random weights, sentences with the lengths of newswire, each translated to exactly its
source's length, so that only speed differs. Hugging Face is `MarianMTModel.generate` with the
plain Transformer's sizes; it takes sentences in batches of 64 in the order given, or sorted by
length.

With level signals folded a RingFormer does the same products as a Transformer; its one layer's
weights are no smaller, for they differ at every level. On a CPU with many sentences most of the
time is matrix products at the processor's peak, a good part of it the output projection; with one
sentence they are bound by reading the weights.
""",
        command="decode",
        cpu="--sentences 1 24 --rounds 5",
        gpu="--sentences 1 64 --rounds 5",
        toy="--sentences 1 4 --rounds 1 --model_dim 64",
    ),
    Benchmark(
        name="bfloat16",
        title="Decoding in bfloat16",
        text="""
The same with all systems in bfloat16 (`--evaluation.dtype bfloat16` for our commands). On a CPU
it pays where the processor has bfloat16 instructions.
""",
        command="decode --dtype bfloat16 --beams 4",
        cpu="--sentences 1 24 --rounds 5",
        gpu="--sentences 1 512 --rounds 5",
        toy="--sentences 2 --rounds 1 --model_dim 64",
    ),
    Benchmark(
        name="export",
        title="Decoding an export with CTranslate2",
        text="""
The same base-size RingFormer with random weights in every engine, on real sentences of
newstest2014, each forced to its source's length. So these rates are the search's, and what comes
out is no translation: a trained model ends its outputs where it will, and has another rate. The
export uses one worker a core (the last row of each precision). On a GPU there are PyTorch's rows
alone.

We had set two targets: that PyTorch takes at most 1.5 times as long as CTranslate2's float32, and
that int8 is 10 times as fast as the PyTorch search from before the export existed. Where the
first is met, they exclude each other: int8 would have to be 6.7 times as fast as float32, and the
processor's int8 instructions do four times the multiplications of its float32 ones. Tried and not
faster: larger batches, CTranslate2's AVX-512 code in place of the AVX2 that it chooses, and MKL.
""",
        command="decode --only RingFormer --text {text} --vocabulary {bpe}/vocabulary/spm.model",
        cpu="--beams 4 --sentences 75 --rounds 5",
        gpu="--beams 4 --sentences 512 --rounds 5",
        toy="--beams 4 --sentences 4 --rounds 1 --model_dim 64",
    ),
    Benchmark(
        name="latency",
        title="Serving on a CPU",
        text="""
What models of base size cost where they are served: one sentence at a time, and 32 together.
*6-2* are six levels in the encoder and two in the decoder. *Folded* and *static* are what a
RingFormer is to CTranslate2: N layers of which most matrices are the same, and of which all are.
With ONNX Runtime (`--format onnx`) the layer is there once, with its level signals beside it.

The targets, over the Transformer 6-6 in CTranslate2, in int8: files of a static ring at most 0.27
with a vocabulary of 8,000 and 0.42 with 32,000, of a published one 0.35 and 0.5; one sentence 1.8
times as fast for static 6-6, 4.5 times for static 6-2 with a shortlist on both sides, 1.3 times for
the published ring; a start-up of a second at most.
""",
        command="latency",
        cpu="--rounds 5",
        gpu="--rounds 5",
        toy="--vocabularies 96 --precisions int8 --threads 1 --rounds 1 --model_dim 64 "
        "--only Transformer RingFormer",
    ),
    Benchmark(
        name="prepare",
        title="Data preparation",
        text="""
The command as it is run, from plain text to shards, on all real corpora below the data folder,
repeated with a number of its own behind each sentence where more is needed. Memory is the
proportional set size of all processes together; it should hardly grow with the corpus, for most
of it is what SentencePiece takes to train on its sample, a million lines.

The binarize stage reads, encodes, shuffles and writes; beside it stands SentencePiece's own batch
`encode` alone. The target was 0.8 of its rate. The faster a vocabulary encodes (unigram), the
more reading, shuffling and writing weigh.

For corpora of a thousand million pairs: every shard reads from every piece, so let both be larger
(`pairs_per_piece: 500000`, `pairs_per_shard: 1000000`). Not spread over workers are finding the
lines of one large plain file and its checksum; the command itself holds one byte a pair. No such
run was made.
""",
        command="prepare --data {data} --scratch {build}",
        cpu="--pairs 500000 1500000 --rounds 5",
        gpu="--pairs 500000 4000000 --rounds 5",
        toy="--pairs 2000 4000 --rounds 1 --vocab_size 500",
    ),
    Benchmark(
        name="feed",
        title="Feeding the trainer",
        text="""
What stands between shards and the model, for as many pairs as WMT14 De→En has, with the lengths
of real ones. The batch plan is made once, then read from its cache. Padding depends on how many
pairs there are of a length: it is less with more pairs, and more where sentences are long; the
target is 5%. Compare collation with the tokens/s of training: one process should be far ahead.
""",
        command="feed --run_dir {shards}",
        cpu="--rounds 5",
        gpu="--rounds 5",
        toy="--rounds 1 --shards 20 --pairs 20000 --steps 5",
    ),
    Benchmark(
        name="loop",
        title="The training loop",
        text="""
The recipe as it trains, with ZeRO 1. *Bare engine* is DeepSpeed's `engine(…)`, `backward`, `step`
over batches that lie ready; the *silent loop* feeds itself, seeds, sets the learning rate and
agrees on signals; logging adds progress lines, metrics and MLflow on sqlite, with what the
machine does every 10 s. The fused Adam and the batches are the same on all sides. On a CPU a rank
has one thread.

The neighbours on a shared machine move ratios of whole times by far more than logging can
(target: 1%). The two last columns are exact: what the training thread waits in logging calls, and
the CPU time of the threads that do the rest. A checkpoint is flushed to the disk before training
goes on.
""",
        command="train_loop --config {recipe}",
        cpu="--steps 8 --rounds 5 --training.max_tokens 1024 --training.log_every 4",
        gpu="--steps 100 --rounds 5 --training.max_tokens 16384 "
        "--training.deepspeed_config ds_configs/zero1_bf16.json",
        toy="--steps 2 --rounds 1 --ranks 1 --training.max_tokens 256 --training.log_every 1",
    ),
    Benchmark(
        name="gpu",
        title="One GPU",
        text="""
All that we want to know of a GPU, by one command of at most eight minutes that needs neither
network nor data: training steps of RingFormer and Transformer, eager and compiled, with the share
of the GPU's peak that they reach (MFU; `benchmarks/gpu_speed.py` says how FLOPs are counted);
ZeRO 1 and 3; activation checkpointing; the loss; kernels, launches and waits of a step; decoding;
whether bf16 comes to the loss of float32; and whether every ZeRO stage with every checkpointing
policy gives what torch alone gives.

```sh
python -m benchmarks.gpu --dry     # first: every row at toy size, on the GPU if there is one
python -m benchmarks.gpu           # → build/gpu/gpu.json, and gpu.md, which goes here
```

Rows come in the order of their worth; one that fails says why, and one for which no time is left
says so: `--minutes`, `--only SECTION…`. `torch.compile` comes last, since it takes longest. The
native library of fairseq2 is not needed, so any torch will do: where there is none that fits, put a
package `fairseq2n` with `__version__ = "0.8.1"` and `DOC_MODE = True` first on `PYTHONPATH`.
""",
        command="gpu --output {build}/gpu",
        cpu=None,
        gpu="--rounds 10",
        toy="--dry",
    ),
)

INTRODUCTION = """
# Benchmarks

How fast it is, and what memory it takes. What the models are worth is in
[results.md](results.md).

This page is made by `python -m benchmarks.run_all` (`--list`, `--only NAME…`), from programs in
`benchmarks/`, each of which runs all systems in turns; ratios are taken within a round and given
as median (min–max) of five rounds or more. Where one round says more than 1 and another less, the
page says *equal*. Ratios of fewer rounds, which earlier versions of the programs made, say of how
many, and are worth less. Machines differ and are shared: compare ratios, not seconds, and run them
again on yours. What another machine measured, with a GPU for example, stands in a subsection of
its own; a section without one of a GPU was not measured on any. Commands are for the checkout,
with `. .venv/bin/activate` and `OMP_NUM_THREADS` set to the number of cores; `--help` of a
program has larger sizes.
"""

NOT_REGENERATED = """
## Measured once, by hand

The same translations from an export: the model of `recipes/multi30k_de_en.yaml` (319,104 core
parameters, average of 3 checkpoints) on the 1,000 sentences of test_2016_flickr, beam 4 (November
2026, 2 cores of an AMD EPYC, torch 2.9.1):

| engine | BLEU | chrF2 | sentences that differ from PyTorch's |
|---|---|---|---|
| PyTorch float32 | 30.92 ± 1.43 | 50.44 | |
| CTranslate2 float32 | 30.92 ± 1.43 | 50.44 | 0 of 1,000 |
| CTranslate2 int8 | 30.96 ± 1.41 | 50.46 | 99 of 1,000 |

(`./run.sh`, then `./run.sh export --format ctranslate2 --output F`, with `--quantization int8` for
the last row, and `./run.sh evaluate --model F`, all with `--config recipes/multi30k_de_en.yaml`.)

The same with ONNX Runtime, of a model that has trained for half as long (1,500 steps, its last
checkpoint). *All hypotheses* are the four of the beam; *alone* is
a batch of one sentence, beside one of many:

| engine | BLEU | sentences that differ from PyTorch's | that differ alone |
|---|---|---|---|
| PyTorch float32 | 26.45 | | |
| ONNX Runtime float32 | 26.45 | 0 of 1,000, in all hypotheses | 0 |
| ONNX Runtime int8 | 26.45 | 115 of 1,000 | 20 |
| CTranslate2 float32 | 26.45 | 0 of 1,000 | 0 |
| CTranslate2 int8 | 26.37 | 110 of 1,000 | |

## Large data

Measured once, on a machine that others kept busy (load 16 on 2 cores), so compare rows and not
seconds. A rank's feed of 4,096 tokens a step from a file system that takes 5 ms for a pair: with
one step read ahead it is what every version before `training.read_ahead_steps` did.

```sh
python -m benchmarks.feed --run_dir runs/quickstart --parts slow --steps 32
```

| read_ahead_steps | source and target tokens/s |
|---|---|
| 1 | 5,348 |
| 8 (the default) | 34,400 |
| 32 | 136,773 |

Ranks on one machine that plan for the same 50,000,000 pairs, by one plan for all and, as where
nothing can be written, by one each. The peak counts mapped files; the maker has it, and the other
three ranks have 49 MB each. What is a rank's own afterwards is the maker's: its allocator keeps it.
One rank of the version before took 23.4 s, 19.9 s and 2,942 MB; four would take four times the MB.

```sh
python -m benchmarks.feed --run_dir runs/quickstart --parts sharing --pairs 50000000 --ranks 4 1
```

| | first batch, s | next epoch, s | peak of a rank, MB | peaks of all, MB | own afterwards, MB |
|---|---|---|---|---|---|
| 4 ranks, one plan for all | 145.3 | 12.8 | 1,549 | 1,696 | 631 |
| 4 ranks, a plan each | 114.6 | 70.0 | 1,818 | 7,229 | 1,075 |
| 1 rank, one plan for all | 19.8 | 12.7 | 1,550 | 1,550 | 631 |
| 1 rank, a plan each | 19.8 | 12.3 | 2,129 | 2,129 | 1,312 |

## Serving many clients

Measured once, on 2 idle cores of an Intel Xeon (November 2026). 200 clients ask the
[server](serving.md#a-server-and-a-page) for one sentence after the other, then one client by
itself; *in batch* are the same sentences by what `./run.sh translate` does. The model is about the
smallest there is (319,104 core parameters, Multi30k, int8, CTranslate2, beam 4), so HTTP weighs as
much as it can. The clients run on the same two cores: processor time is what the server costs,
sentences per second what is left of it here.

```sh
python -m benchmarks.serve --model F --text test_2016_flickr.de --rounds 3 --seconds 20
python -m benchmarks.serve --model F --text test_2016_flickr.de --rounds 3 --seconds 10 --clients 1
```

| clients | answers | errors | median, p95, ms | sentences/s | in batch | CPU ms each | in batch |
|---|---|---|---|---|---|---|---|
| 200 | 10,632 | 0 | 370, 486 | 525 | 698 (0.75) | 3.13 | 2.81 (0.90) |
| 200 | 11,080 | 0 | 355, 460 | 547 | 743 (0.74) | 3.02 | 2.64 (0.87) |
| 200 | 10,696 | 0 | 368, 483 | 527 | 713 (0.74) | 3.10 | 2.75 (0.89) |
| 1 | 1,502 | 0 | 6.4, 9.3 | 150 | 695 | 5.51 | 2.82 |
| 1 | 1,425 | 0 | 6.7, 9.9 | 142 | 648 | 5.86 | 2.98 |
| 1 | 1,474 | 0 | 6.5, 9.6 | 147 | 692 | 5.62 | 2.82 |

Of 200 a client waits for about as long as their sentences take. One by itself waits for its own,
4.9 ms of this model, a millisecond in which others could come, and half of one for HTTP.

## Not measured

Training of more than one machine, and on more than one GPU. On one GPU, what has no subsection of
one above; where there is one, run_all asks its programs for bf16 and larger sizes. fp16 was not
tried.
"""
